"""Which target of the registry this machine is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mctune.core.target import Target, targets


@dataclass(frozen=True)
class Seen:
    """The GPU that kernels run on, as its driver reports it: its name, and its number of multiprocessors."""

    name: str
    cores: int


def seen() -> Seen | None:
    """The first GPU that torch sees, which is the one that kernels run on; ``None`` without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Seen(properties.name, properties.multi_processor_count)


def here(gpu: Seen | None) -> Target | None:
    """The registry's entry for a GPU; ``None`` where there is no GPU, or the registry does not know it.

    Cards of one name differ in memory and in multiprocessors: of several entries that one is taken whose whole name is
    in the GPU's, the longest first, then the one with as many multiprocessors.
    """
    if gpu is None:
        return None
    name = _plain(gpu.name)
    named = [target for target in targets() if not target.on_cpu and target.name.split("-")[0] in name]
    whole = [target for target in named if all(part in name for part in target.name.split("-"))]
    whole.sort(key=lambda target: -len(target.name))
    equal = [target for target in named if target.cores == gpu.cores]
    return next(iter([*whole, *equal, *named]), None)


def present(target: Target) -> bool:
    """Whether kernels for ``target`` can be timed here: it is a CPU, or the first GPU."""
    return target.on_cpu or here(seen()) == target


def _plain(name: str) -> str:
    """``NVIDIA GeForce RTX 4090`` and ``rtx4090`` meet as ``nvidiageforcertx4090``."""
    return name.lower().replace(" ", "").replace("-", "")
