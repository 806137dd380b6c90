"""Segment length against time. It changes what is computed, so it is reported and recommended, not chosen by speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from mctune.core.errors import NoValidConfigError, UsageError
from mctune.core.outcome import Predicted, Timed
from mctune.core.problem import Problem
from mctune.core.work import cached_state_bytes, cached_states
from mctune.study.events import FrontierPoint
from mctune.study.record import Trial

SEGMENT_LENGTH = "segment_length"


class Solved(Protocol):
    """A problem with the time of what solves it."""

    @property
    def problem(self) -> Problem:
        """Its segment length counts."""

    @property
    def outcome(self) -> Timed | Predicted:
        """Its time counts."""


_S = TypeVar("_S", bound=Solved)


def frontier(trials: Sequence[Trial], problem: Problem) -> tuple[FrontierPoint, ...]:
    """The fastest configuration at each segment length that has one, shortest first; the earlier one of equals.

    Args:
        trials: of a study of ``problem``. A configuration without the parameter ``segment_length`` (logarithmic
            segmentation, or a space that leaves it out) counts under the problem's own.
        problem: what was computed; each point carries it with its own segment length.
    """
    fastest: dict[int | None, tuple[float, FrontierPoint]] = {}
    for trial in trials:
        if trial.ms is None or not isinstance(trial.outcome, Timed | Predicted):
            continue
        own = problem
        if SEGMENT_LENGTH in trial.config:
            own = problem.replace(segment_length=trial.config.integer(SEGMENT_LENGTH))
        known = fastest.get(own.segment_length)
        if known is None or trial.ms < known[0]:
            point = FrontierPoint(own, cached_states(own), cached_state_bytes(own), trial.config, trial.outcome)
            fastest[own.segment_length] = trial.ms, point
    return tuple(fastest[length][1] for length in sorted(fastest, key=lambda length: length or 0))


def recommend(points: Sequence[_S], max_slowdown: float = 1.10) -> _S:
    """The shortest segment (the most memory) whose time is within ``max_slowdown`` of the fastest point's.

    Raises:
        UsageError: if ``max_slowdown`` is under 1.
        NoValidConfigError: if there are no points.
    """
    if not max_slowdown >= 1.0:
        raise UsageError(f"max_slowdown={max_slowdown}: the fastest segment length has 1.0; give at least that")
    if not points:
        raise NoValidConfigError("no segment length has a configuration that works; see what failed and why")
    limit = max_slowdown * min(point.outcome.ms for point in points)
    within = [point for point in points if point.outcome.ms <= limit]
    return min(within, key=lambda point: point.problem.segment_length or 0)
