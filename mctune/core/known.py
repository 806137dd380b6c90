"""A configuration that somebody has tried already, wherever that is written down."""

from __future__ import annotations

from dataclasses import dataclass

from mctune.core.config import Config
from mctune.core.outcome import Predicted, Timed
from mctune.core.problem import Problem
from mctune.core.target import KINDS, Target


@dataclass(frozen=True)
class Machine:
    """What a configuration was tried on, as studies and tables name it."""

    name: str
    title: str = ""
    arch: str = ""
    cores: int = 0

    @classmethod
    def of(cls, target: Target) -> Machine:
        """The machine that a target is."""
        return cls(target.name, target.title, target.arch, target.cores)

    @property
    def kind(self) -> str:
        """``cpu``, ``cuda`` or ``hip``, which the name of an architecture tells.

        Examples:
            >>> Machine("h100-sxm", arch="sm_90").kind, Machine("mi300x", arch="gfx942").kind
            ('cuda', 'hip')
        """
        kinds = {"sm_": "cuda", "gfx": "hip"}
        return next((kind for start, kind in kinds.items() if self.arch.startswith(start)), KINDS[0])


@dataclass(frozen=True)
class Known:
    """A configuration and its time in milliseconds.

    Args:
        config: names and values; whoever uses them sees which of them its own space has.
        ms: the time, measured or predicted.
        measured: whether it was measured.
        source: where it comes from, for a person to read.
        problem: what it was tried at, segment length included; ``None`` where the source does not say.
        machine: on what; ``None`` likewise.
        backend: what compiled it, ``tvm`` or ``triton``; empty likewise.
    """

    config: Config
    ms: float
    measured: bool
    source: str
    problem: Problem | None = None
    machine: Machine | None = None
    backend: str = ""


@dataclass(frozen=True)
class Tuned:
    """What a table of tuned kernels says of one: ``backend`` (``tvm`` or ``triton``) compiled it."""

    problem: Problem
    config: Config
    backend: str
    outcome: Timed | Predicted
