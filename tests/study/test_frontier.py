"""Segment length against time."""

from __future__ import annotations

import pytest

from mctune.core.config import Config
from mctune.core.errors import NoValidConfigError, UsageError
from mctune.core.outcome import Crashed, Outcome
from mctune.core.problem import Problem
from mctune.study.frontier import frontier, recommend
from mctune.study.record import Trial
from tests.study.spaces import timed

PROBLEM = Problem(T=1000, H=2, Dk=16, Dv=32, segment_length=256)


def trials(*rows: tuple[int, int, float | None]) -> list[Trial]:
    outcomes: list[Outcome] = [Crashed("x") if ms is None else timed(ms) for _, _, ms in rows]
    return [
        Trial(n, Config.of({"segment_length": length, "BT": bt}), outcome, 0.1)
        for n, ((length, bt, _), outcome) in enumerate(zip(rows, outcomes, strict=True))
    ]


def test_one_point_a_length_with_the_best_time_and_its_cache() -> None:
    points = frontier(trials((256, 8, 3.0), (64, 8, 4.0), (256, 16, 2.0), (256, 32, 2.0), (512, 8, None)), PROBLEM)
    assert [(p.problem.segment_length, p.states, p.outcome.ms, p.config["BT"]) for p in points] == [
        (64, 16, 4.0, 8),
        (256, 4, 2.0, 16),
    ]
    assert all(point.bytes >= point.states * 2 * 16 * 32 * 4 for point in points)


def test_the_shortest_segment_within_the_slowdown_is_recommended() -> None:
    points = frontier(trials((32, 8, 2.4), (64, 8, 2.2), (128, 8, 2.05), (256, 8, 2.0), (512, 8, 2.1)), PROBLEM)
    lengths = [recommend(points, slowdown).problem.segment_length for slowdown in (1.0, 1.03, 1.1, 1.2, 10.0)]
    assert lengths == [256, 128, 64, 32, 32]
    assert recommend(points) == recommend(points, 1.10)


def test_without_a_segment_length_there_is_one_point() -> None:
    logarithmic = Problem(T=1000, H=2, Dk=16, Dv=32, segmentation="logarithmic")
    rows = [Trial(n, Config.of({"BT": n}), timed(5.0 - n), 0.1) for n in range(3)]
    points = frontier(rows, logarithmic)
    assert [(point.problem, point.config["BT"]) for point in points] == [(logarithmic, 2)]
    assert recommend(points) == points[0]


def test_nothing_to_recommend() -> None:
    with pytest.raises(NoValidConfigError):
        recommend(frontier(trials((64, 8, None)), PROBLEM))
    with pytest.raises(UsageError, match=r"max_slowdown=0\.9"):
        recommend(frontier(trials((64, 8, 1.0)), PROBLEM), 0.9)
