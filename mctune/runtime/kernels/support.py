"""What serves what: which backend has kernels for which device, family of memories and pass. Said here, once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

from ..traits import PASSES, RECURRENCES


@dataclass(frozen=True)
class Support:
    """Whether something is served, and why not: ``Support()``, or ``Support.no("what, the limit, the remedy")``."""

    reason: str | None = None

    @classmethod
    def no(cls, reason: str) -> Support:
        """A refusal; ``reason`` completes "it is not served:"."""
        return cls(reason)

    def __bool__(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Served:
    """A row of :data:`SERVED`: what the templates of ``templates/<backend>/<family>`` are compiled for.

    Attributes:
        backend: ``tvm`` or ``triton``.
        device: torch's name of the device kind that its kernels run on; ``cuda`` is AMD's GPUs too.
        family: the memories that they compute, ``matrix`` or ``deep``.
        passes: what there are templates for.
        dtype: the one that its kernels read, whatever the call's; ``None`` if they read the call's own.
        fixed: sizes of a problem, besides its widths, that a kernel is compiled for; it serves any of the others.
        exact: whether a kernel reads the very dtype that it was compiled for; else one of 16 bits reads both.
        maker: what compiles for it, and the folder of its launchers: the backend itself, unless that has several.
    """

    backend: str
    device: str
    family: str
    passes: tuple[str, ...] = PASSES
    dtype: str | None = None
    fixed: tuple[str, ...] = ()
    exact: bool = False
    maker: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "maker", self.maker or self.backend)


SERVED = (
    Served("tvm", "cpu", "matrix", dtype="float32"),
    Served("tvm", "cpu", "deep", dtype="float32"),
    Served("triton", "cuda", "matrix"),
    Served("triton", "cuda", "deep", fixed=("inner_chunk",)),
    Served("tvm", "cuda", "matrix", exact=True, maker="tvm.gpu"),
)
BACKENDS = tuple(dict.fromkeys(row.backend for row in SERVED))


def served(
    device: str | None = None, family: str | None = None, backend: str | None = None, maker: str | None = None
) -> tuple[Served, ...]:
    """The rows of a device kind, a family, a backend and a maker, the preferred first; ``None`` is any."""
    wanted = {"device": device, "family": family, "backend": backend, "maker": maker}
    return tuple(
        row for row in SERVED if all(value is None or getattr(row, name) == value for name, value in wanted.items())
    )


def runs_on(device: str, row: Served) -> bool:
    """Whether a row's kernels run on a device kind: on their own, or where something runs them on a CPU instead."""
    return device == row.device or (device == "cpu" and runs_instead(row.maker))


def runs_instead(maker: str) -> bool:
    """Whether this process runs a maker's kernels for a GPU on the CPU."""
    return _INSTEAD.get(maker, lambda: False)()


_INSTEAD = {
    "triton": lambda: os.environ.get("TRITON_INTERPRET") == "1",
    "tvm.gpu": lambda: bool(os.environ.get("MCTUNE_LIBCUDA")),
}
"""Whether kernels for a GPU run on the CPU: in Triton's interpreter, or by what stands in for CUDA's driver."""


@cache
def support(recurrence: str, device: str, dtype: str) -> Support:
    """Whether there can be a kernel for a call, tuned or not."""
    family = RECURRENCES[recurrence].family
    if not served(family=family):
        families = {row.family for row in SERVED}
        have = " and ".join(name for name, row in RECURRENCES.items() if row.family in families)
        return Support.no(f"recurrence={recurrence!r} has no kernels yet, only {have} have")
    if not any(runs_on(device, row) for row in served(family=family)):
        devices = dict.fromkeys(row.device for row in served(family=family))
        return Support.no(f"the tensors are on {device} and kernels run on {' and '.join(devices)}")
    if dtype == "float64":
        return Support.no("the tensors are float64 and kernels compute in float32")
    return Support()
