"""What a backend does for the search: compile one configuration for a target, and run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mctune.core.config import Config
from mctune.core.outcome import TooLarge
from mctune.core.problem import Problem
from mctune.core.space import SearchSpace
from mctune.core.target import Target
from mctune.runtime.kernels.support import Support


@dataclass(frozen=True)
class Built:
    """The files of one compiled candidate: ``library`` is what was compiled, ``source`` what it came from."""

    library: Path
    source: Path
    parts: tuple[tuple[str, str], ...] = ()
    """(operation, file beside ``library``) of every module of a kernel that has several; ``library`` is one of them."""

    def record(self, problem: Problem, config: Config) -> dict[str, Any]:
        """What a launcher is told of the candidate, as an entry of a tuned table says it."""
        return {"problem": problem.to_dict(), "config": config.to_dict(), "parts": dict(self.parts)}


class OperationError(Exception):
    """``operation`` of a pass could not be rendered or compiled; the cause says why."""

    def __init__(self, operation: str) -> None:
        super().__init__(operation)
        self.operation = operation


@dataclass(frozen=True)
class Launch:
    """One launch of a compiled kernel, and the resources that the kernel needs.

    Attributes:
        name: the jitted function's.
        grid: programs along x, y, z.
        num_warps, num_stages: of which it was compiled.
        warp_size: threads a warp.
        shared: bytes of shared memory a block.
        registers: 32-bit registers a thread.
        spills: bytes of stack a thread that registers did not hold.
        asm: PTX, or the assembly of an AMD GPU.
        binary: the cubin, or the hsaco.
        arguments: (parameter, type) as Triton spells it, ``*bf16`` or ``i32``: those that the code has a use for.
        values: (parameter, value) of every number, flag and string among the arguments, compile-time ones included.
        operation: the template whose kernel it is, where that is known.
        notes: what the assembler says of its performance: a number and a text, for example ``C7515 wgmma.mma_async
            instructions are serialized due to ..``.
    """

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    warp_size: int
    shared: int
    registers: int
    spills: int
    asm: str
    binary: bytes
    arguments: tuple[tuple[str, str], ...]
    values: tuple[tuple[str, int | float | bool | str], ...]
    notes: tuple[str, ...] = ()
    operation: str = ""

    @property
    def serialized(self) -> bool:
        """Whether each of its warpgroups' products waits for the one before."""
        return any("serialized" in note for note in self.notes)

    @property
    def threads(self) -> int:
        """Threads a block."""
        return self.num_warps * self.warp_size

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


Kernel = Any
"""What a launcher of ``mctune.runtime`` is called like, by pass: ``TvmForward``, ``TvmBackward`` or ``TvmDecode``."""


Watch = Callable[[str, Callable[..., Any]], Callable[..., Any]]
"""``watch(operation, function)`` is what a kernel calls in the place of the function that launches an operation."""


def unwatched(operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself."""
    return function


class Backend(Protocol):
    """One way to compile templates."""

    name: str
    maker: str
    """A name of :func:`mctune.backends.registry.makers`."""

    def supports(self, problem: Problem, target: Target | None = None) -> Support:
        """Whether a template computes a problem, on a target, or why not and what works instead."""

    def ready(self, here: bool = True) -> None:
        """Refuse a machine that lacks what compiling takes, with what to install.

        Unless the target is ``here``, also one that lacks what verifying without it takes.
        """

    def try_out(self, target: Target, folder: Path) -> None:
        """Compile for the target, and run where that is a CPU, a kernel that no machine in order fails on.

        Nothing that is kept on disk is used, and nothing stays in ``folder``. Called in a worker process.
        """

    def identity(self) -> dict[str, str]:
        """What its results depend on besides problem, configuration and target: versions, the templates' digest."""

    def space(self, problem: Problem) -> SearchSpace:
        """The parameters that the templates of ``problem`` take, without the segment length."""

    def measuring(self) -> Backend:
        """The same backend, with spaces that also have what only a run on the device can verify."""

    def build(self, problem: Problem, config: Config, target: Target, folder: Path) -> Built:
        """Render and compile into ``folder``; files are named by the configuration, the same one twice is kept."""

    def compile(self, problem: Problem, config: Config, built: Built, target: Target) -> tuple[Launch, ...] | TooLarge:
        """What one call launches on the target, present or absent, or why the target cannot hold it."""

    def load(self, problem: Problem, config: Config, built: Built, watch: Watch = unwatched) -> Kernel:
        """The compiled candidate as a function of torch tensors; its operations are launched through ``watch``."""
