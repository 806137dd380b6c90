"""Whether the machine that a search is for is the one that it runs on."""

from __future__ import annotations

import torch

from mctune.core.target import Target


def present(target: Target) -> bool:
    """Whether kernels for ``target`` can be timed here: it is a CPU, or torch sees a GPU of its name."""
    if target.on_cpu:
        return True
    wanted = target.name.split("-")[0]
    return any(wanted in _plain(torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count()))


def _plain(name: str) -> str:
    """``NVIDIA GeForce RTX 4090`` and ``rtx4090`` meet as ``nvidiageforcertx4090``."""
    return name.lower().replace(" ", "").replace("-", "")
