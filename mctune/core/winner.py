"""A tuned kernel between the search that found it and the package that ships it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mctune.core.config import Config
from mctune.core.outcome import Predicted, Timed, kind
from mctune.core.problem import Problem


@dataclass(frozen=True)
class Winner:
    """A tuned kernel on its way into a package.

    Args:
        problem: the problem it was tuned at, segment length included.
        config: its configuration.
        outcome: its time in milliseconds, measured or predicted.
        backend: ``tvm`` or ``triton``: which one compiled it.
        device: torch's name of the device kind that it is for.
        library, source: the kernel that was timed, and what it came from.
        portable: the same source compiled for any x86-64-v3 CPU and verified, not timed; ``None`` without one.
        cpu_flags: instruction sets that ``library`` needs, as /proc/cpuinfo names them.
        recommended: whether the search recommends this segment length.
        verified: how it was held to the oracle (cases, error, tolerance).
        parts: (operation, file) of every module of a kernel that has several, all in one folder; ``library`` is one.
    """

    problem: Problem
    config: Config
    outcome: Timed | Predicted
    backend: str
    device: str
    library: Path
    source: Path
    portable: Path | None
    cpu_flags: tuple[str, ...]
    recommended: bool
    verified: dict[str, Any]
    parts: tuple[tuple[str, Path], ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """What a table has one winner of: a problem by a backend."""
        return self.problem.key, self.backend

    def record(self) -> dict[str, Any]:
        """The entry of the tuned table."""
        return {
            "problem": self.problem.to_dict(),
            "config": self.config.to_dict(),
            "kernel": f"kernels/{self.library.name}",
            "source": f"kernels/{self.source.name}",
            "parts": {operation: path.name for operation, path in self.parts},
            "portable": f"kernels/{self.portable.name}" if self.portable else None,
            "cpu_flags": list(self.cpu_flags),
            "backend": self.backend,
            "device": self.device,
            "outcome": {"kind": kind(self.outcome), **asdict(self.outcome)},
            "recommended": self.recommended,
            "verified": self.verified,
        }
