"""Fill Triton's cache on disk with the kernels of an emitted package, so that the first call of a model finds them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mctune.backends.triton.calls import call_on_meta
from mctune.backends.triton.device import VirtualDevice
from mctune.core.errors import UsageError
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.verify.package import launcher_of, load_package


@dataclass(frozen=True)
class Warmed:
    """One tuned problem: the kernels that a call of it launches, and those of them that had to be compiled."""

    problem: Problem
    launched: tuple[str, ...]
    compiled: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "problem": self.problem.to_dict(),
            "launched": list(self.launched),
            "compiled": list(self.compiled),
            "seconds": self.seconds,
        }


def tuned_for(path: Path) -> Target:
    """The target that a package was tuned for.

    Raises:
        UsageError: if there is no package at ``path``, or the registry does not have its target.
    """
    return resolve(load_package(path).runtime.kernels.dispatch.TABLE.target or "")[0]


def warm_package(path: Path, target: Target) -> Iterator[Warmed]:
    """Compile every Triton kernel of a package for ``target``, in each variant that calls of other sizes launch.

    The keys are those that the JIT looks up: the package's own launchers run, on tensors without memory. Where the
    target has a GPU of another architecture, they are not the right ones.

    Raises:
        DoesNotFit: if a kernel takes more than a block of the target has.
        UsageError: if the package has no Triton kernels.
    """
    module = load_package(path)
    entries = [entry for entry in module.runtime.kernels.dispatch.TABLE.entries if entry.backend == "triton"]
    if not entries:
        raise UsageError(f"{path} has no Triton kernels: there is nothing to compile before a first call")
    for entry in entries:
        problem = Problem.from_dict(dict(entry.problem))
        started = time.monotonic()
        launcher = launcher_of(module, entry)
        with VirtualDevice(target) as device:
            for variant, even, state_dtype in variants(problem):
                for alone in (True, False) if problem.pass_ != "decode" else (None,):
                    call_on_meta(variant, launcher, even, state_dtype, alone)
        launched = tuple(dict.fromkeys(launch.name for launch in device.launches))
        yield Warmed(problem, launched, tuple(device.compiled), time.monotonic() - started)


def variants(problem: Problem) -> Iterator[tuple[Problem, bool, str]]:
    """Calls that together launch every variant of a problem's kernels: what :func:`call_on_meta` is given of them.

    Sizes are arguments of the kernels. What they decide at compile time: whether any segment is cut up, or continues
    another, and whether a pass keeps something or is given it; of a decode step whether all sequences are at the same
    place; and under ssc, by powers of two, for how many cached states there is room. A decode step is also compiled for
    each dtype that states can be cached in.
    """
    if problem.pass_ != "decode":
        for T in dict.fromkeys((problem.T, max(problem.T - 1, 1), 1)):
            yield problem.replace(T=T), True, "float32"
        return
    C = problem.segment_length or 1
    room = [-(-problem.T // C)]
    if problem.reads.sparse:
        room += [1 << bit for bit in range(4, (room[0] - 1).bit_length())]
    for count, even, state_dtype in product(room, (True, False), ("float32", "bfloat16", "float16")):
        yield problem.replace(T=count * C, B=max(problem.B, 2)), even, state_dtype
