"""What a search is asked for, what it reports while it runs, and what it found."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mctune.core.config import Config
from mctune.core.errors import MctuneError, UsageError
from mctune.core.known import Known
from mctune.core.outcome import Outcome, Predicted, Timed
from mctune.core.problem import Problem
from mctune.core.target import Target
from mctune.core.workload import Case

SAMPLERS = ("chain", "mix", "tpe", "gp", "cmaes", "random", "grid")
"""Samplers that have a name; any other is ``module:Class``."""


def check_sampler(name: str) -> None:
    """Refuse what is neither a name nor ``module:Class``; whether that exists is seen when it is made."""
    if name not in SAMPLERS and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise UsageError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}, nor module:Class")


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """One search, a study for each case.

    Args:
        target: the machine to tune for.
        cases: problems with the segment lengths that each may take.
        out: the directory of the package to be emitted; the default storage lives in it too.
        trials: unique candidates a study, those of an interrupted earlier run included.
        timeout_s: seconds for all studies together, ``None`` for no limit; then what they have is decided between.
        sampler: one of :data:`SAMPLERS`, or ``module:Class``.
        seed: of the sampler and of the random inputs.
        storage: an Optuna storage URL; ``None`` is SQLite in ``out``.
        max_slowdown: the shortest segment within this factor of the fastest one's time is recommended.
        trial_timeout_s: seconds after which a candidate is killed; those that may ship have ``holding_s``.
        backend: ``tvm`` or ``triton``; ``auto`` is all that serve the target, a study each.
        measure: whether candidates are timed on the target, which must be here, or compiled for it and predicted.
        warm: whether a new study begins with what is known of problems and machines like its own.
        known: that, besides what the other studies of its storage hold.
        decide: whether the best are decided between; a worker that joins others leaves that to them.
    """

    target: Target
    cases: tuple[Case, ...]
    out: Path
    trials: int
    timeout_s: float | None = None
    sampler: str = "chain"
    seed: int = 0
    storage: str | None = None
    max_slowdown: float = 1.10
    trial_timeout_s: float = 60.0
    measure: bool = True
    backend: str = "auto"
    warm: bool = True
    known: tuple[Known, ...] = ()
    decide: bool = True

    def __post_init__(self) -> None:
        if not self.cases:
            raise UsageError("nothing to search: give a workload or a problem")
        check_sampler(self.sampler)
        if self.seed < 0:
            raise UsageError(f"seed={self.seed}: must be at least 0")
        if self.trials < 1:
            raise UsageError(f"trials={self.trials}: must be at least 1")
        if not self.max_slowdown >= 1:
            raise UsageError(f"max_slowdown={self.max_slowdown:g}: a factor of at least 1 (1.10 allows 10% more time)")
        for name, seconds in (("timeout", self.timeout_s), ("trial_timeout", self.trial_timeout_s)):
            if seconds is not None and not 0 < seconds < float("inf"):
                raise UsageError(f"{name}={seconds:g}: must be more than 0 seconds, and not infinite")

    @property
    def holding_s(self) -> float:
        """Seconds for a last check of what may ship: kernels for a GPU that is not here are interpreted, slowly."""
        return 10 * self.trial_timeout_s


@dataclass(frozen=True)
class FrontierPoint:
    """The best candidate at one segment length: ``states`` cached states a sequence and head, ``bytes`` in all.

    ``problem`` carries the segment length (``None`` under logarithmic segmentation).
    """

    problem: Problem
    states: int
    bytes: int
    config: Config
    outcome: Timed | Predicted

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "segment_length": self.problem.segment_length,
            "states": self.states,
            "bytes": self.bytes,
            "ms": self.outcome.ms,
            "notes": list(self.outcome.notes),
            "config": self.config.to_dict(),
            "problem": self.problem.to_dict(),
        }


@dataclass(frozen=True)
class StudyReport:
    """What one study found: ``outcomes`` counts its candidates by kind; ``recommended`` is a point of ``frontier``,
    ``None`` when no candidate was valid; ``ties`` are the configurations within noise of the recommended one;
    ``spare`` is what stands in, the best first, for a point of the frontier that turns out not to be right; ``maker``
    is what compiled them, a name of :func:`mctune.backends.registry.makers`."""

    case: Case
    outcomes: tuple[tuple[str, int], ...]
    frontier: tuple[FrontierPoint, ...]
    recommended: FrontierPoint | None
    ties: tuple[Config, ...] = ()
    spare: tuple[FrontierPoint, ...] = ()
    maker: str = ""

    @property
    def trials(self) -> int:
        """Candidates evaluated."""
        return sum(count for _, count in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "problem": self.case.problem.to_dict(),
            "segment_lengths": list(self.case.segment_lengths),
            "backend": self.maker.partition(".")[0],
            "trials": self.trials,
            "outcomes": dict(self.outcomes),
            "frontier": [point.to_dict() for point in self.frontier],
            "recommended": self.recommended.to_dict() if self.recommended else None,
            "ties": [config.to_dict() for config in self.ties],
        }


@dataclass(frozen=True)
class SearchReport:
    """What a search found until it ended: ``interrupted`` when that was Ctrl-C, ``failure`` when it was the machine or
    the storage."""

    target: Target
    out: Path
    studies: tuple[StudyReport, ...]
    seconds: float
    interrupted: bool = False
    failure: MctuneError | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "target": self.target.name,
            "out": str(self.out),
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "failure": str(self.failure) if self.failure else None,
            "studies": [study.to_dict() for study in self.studies],
        }


class Listener(Protocol):
    """What follows a search; called in the searching process, between candidates."""

    def study_started(self, case: Case, total: int, done: int) -> None:
        """A study of ``total`` trials begins; an earlier run has done ``done`` of them."""

    def trial_done(self, number: int, config: Config, outcome: Outcome, best_ms: float | None) -> None:
        """One candidate was evaluated; ``best_ms`` is the study's best so far."""

    def note(self, text: str) -> None:
        """One line for a person to read."""

    def study_done(self, report: StudyReport) -> None:
        """A study is over, its finalists timed."""
