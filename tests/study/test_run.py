"""A whole search: who gets how much of the time, and what becomes of a winner that is found wrong at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from mctune.backends import get_backend
from mctune.core.config import Config
from mctune.core.errors import DeviceError, MctuneError, UsageError
from mctune.core.outcome import Predicted, Wrong, to_json
from mctune.core.problem import Problem
from mctune.core.space import Int, SearchSpace
from mctune.core.target import resolve
from mctune.core.workload import Case
from mctune.study import run as module
from mctune.study.events import FrontierPoint, Listener, SearchReport, SearchRequest, StudyReport
from mctune.study.one import OneStudy
from mctune.study.record import Trial
from mctune.study.run import search, ship
from mctune.workers import pool
from mctune.workers.worker import WorkerDied
from tests.study.spaces import timed

PROBLEM = Problem(aggregation="grm", T=512, H=1, Dk=16, Dv=16, segment_length=32, dtype="bfloat16")
CASE = Case(PROBLEM, (32, 64))


class Workers:
    """Stands in for :class:`mctune.workers.pool.Workers`."""

    count, least_s = 2, 3.0
    wrong: tuple[int, ...] = ()
    interrupt = -1
    portable_archs: ClassVar[set[str | None]] = set()

    def prepare(self) -> None:
        pass

    start = prepare

    def ship(self, candidate: dict[str, Any], portable_arch: str | None, limit_s: float) -> Any:
        number = candidate["config"]["n"]
        self.portable_archs.add(portable_arch)
        if number == self.interrupt:
            time.sleep(0.3)
            raise KeyboardInterrupt
        if number in self.wrong:
            return WorkerDied(f"{number} is wrong", "verify")
        return {"library": f"{number}.json", "source": f"{number}.py", "portable": None, "errors": [1e-3], "by": "test",
                "tolerance": 1e-2, "cases": [], "parts": {}}  # fmt: skip


WORKERS = cast(pool.Workers, Workers())


class Clock:
    """Stands in for ``time``: it goes when a study runs."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Study:
    """Stands in for a study that had ``done`` candidates before; it takes its whole share and ``over`` seconds more."""

    def __init__(self, clock: Clock, done: int, over: float = 0.0, params: int = 5) -> None:
        self.case, self.clock, self.done, self.over, self.shares = CASE, clock, done, over, list[float]()
        self.params = params

    def run(
        self, workers: object, listener: object, share: float | None, left: float | None
    ) -> tuple[StudyReport, bool]:
        assert share is not None and left is not None and share <= left
        self.shares.append(share)
        self.clock.now += share + self.over
        return self.report([0] * (self.done + 10)), False

    def space(self) -> SearchSpace:
        return SearchSpace(tuple(Int(f"p{number}", (1, 2)) for number in range(self.params)))

    def so_far(self) -> Sequence[int]:
        return [0] * self.done

    def report(self, trials: Sequence[int]) -> StudyReport:
        return StudyReport(CASE, (("timed", len(trials)),), (), None)


@pytest.fixture
def request_(tmp_path: Path) -> SearchRequest:
    return SearchRequest(target=resolve("h200")[0], cases=(CASE,), out=tmp_path, trials=9, timeout_s=100.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def searched(
    request: SearchRequest, studies: Sequence[Study], monkeypatch: pytest.MonkeyPatch
) -> tuple[SearchReport, list[str]]:
    notes: list[str] = []
    listener: Any = SimpleNamespace(note=notes.append, study_done=lambda report: None)
    heard: Listener = listener
    monkeypatch.setattr(module, "_studies", lambda request: studies)
    monkeypatch.setattr(module, "predict_first", lambda *about: 0.0)
    monkeypatch.setattr(module, "judged", lambda study: "")
    return search(request, heard, WORKERS), notes


def test_the_time_is_shared(request_: SearchRequest, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = [Study(clock, 0, over=10.0), Study(clock, 0), Study(clock, 0)]
    report, notes = searched(request_, studies, monkeypatch)
    # The first one's overtime is not taken from the second.
    left = 100 - 100 / 3 - 10
    assert [study.shares for study in studies] == [
        [pytest.approx(100 / 3)], [pytest.approx(left / 2 - 10)], [pytest.approx(left / 2 + 10)]
    ]  # fmt: skip
    assert report.seconds == pytest.approx(100) and not notes


def test_what_takes_least_comes_first(request_: SearchRequest, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate of a wide space takes longer; the report keeps the request's order."""
    wide, narrow = Study(clock, 1, params=9), Study(clock, 2, over=-40.0, params=3)
    report, _ = searched(request_, [wide, narrow], monkeypatch)
    assert (narrow.shares, wide.shares) == ([50.0], [90.0])
    assert [study.trials for study in report.studies] == [11, 12]


class Predicting(Study):
    """A study whose candidates are predicted; ``events`` is what happens to it and others, in order."""

    def __init__(self, clock: Clock, events: list[str], name: str, ends: type[BaseException] | None = None) -> None:
        super().__init__(clock, 1, over=-30.0)
        self.events, self.name, self.ends = events, name, ends

    def run(
        self, workers: object, listener: object, share: float | None, left: float | None
    ) -> tuple[StudyReport, bool]:
        self.events.append(f"{self.name} searched")
        super().run(workers, listener, share, left)
        return REPORT, False

    def decided(self, workers: object, listener: object, trials: Sequence[int]) -> StudyReport:
        if self.ends is not None:
            time.sleep(0.3)
            raise self.ends("no device any more")
        self.events.append(f"{self.name} verified")
        return replace(REPORT, frontier=(SHORT,))


@pytest.mark.parametrize("ends", [None, KeyboardInterrupt, DeviceError])
def test_predicted_studies_are_verified_when_all_are_over(
    request_: SearchRequest, clock: Clock, monkeypatch: pytest.MonkeyPatch, ends: type[BaseException] | None
) -> None:
    """So none takes another's time. What Ctrl-C or a fault keeps from it is verified before it ships."""
    events: list[str] = []
    studies = [Predicting(clock, events, "a"), Predicting(clock, events, "b", ends), Predicting(clock, events, "c")]
    report, notes = searched(replace(request_, measure=False), studies, monkeypatch)
    assert events[:3] == ["a searched", "b searched", "c searched"] and "a verified" in events
    assert notes[0] == "verifying the fastest of 3 studies, side by side"
    verified = [study.frontier == (SHORT,) for study in report.studies]
    if ends is None:
        assert verified == [True] * 3 and notes[-1] == "  3/3 verified"
    else:
        assert not verified[1] and report.studies[1] == REPORT
    assert report.interrupted == (ends is KeyboardInterrupt)
    assert isinstance(report.failure, DeviceError) == (ends is DeviceError)
    # A worker that helps others leaves it to them.
    events.clear()
    searched(replace(request_, measure=False, decide=False), studies, monkeypatch)
    assert len(events) == 3


def test_a_sampler_that_cannot_be_had_ends_a_search_before_it_begins(request_: SearchRequest) -> None:
    with pytest.raises(UsageError, match=r"'nothing.there:Sampler': No module named 'nothing'"):
        search(replace(request_, sampler="nothing.there:Sampler"), cast(Listener, None), WORKERS)
    assert not request_.out.exists() or not list(request_.out.iterdir())


def test_nothing_runs_when_the_time_is_over(
    request_: SearchRequest, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workers, "least_s", 40.0)
    studies = [Study(clock, 40), Study(clock, 7), Study(clock, 20, over=25.0), Study(clock, 30)]
    report, notes = searched(request_, studies, monkeypatch)
    # Those with the fewest candidates first, each with enough time; the others unchanged, in the request's order.
    assert [study.shares for study in studies] == [[], [40.0], [40.0], []]
    assert [study.trials for study in report.studies] == [40, 17, 30, 30]
    assert report.seconds == 105 and len(notes) == 2 and "40 trials of earlier runs" in notes[0]


def test_a_limit_under_what_a_study_takes_is_kept(
    request_: SearchRequest, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workers, "least_s", 400.0)
    studies = [Study(clock, 0), Study(clock, 0)]
    searched(request_, studies, monkeypatch)
    assert [study.shares for study in studies] == [[100.0], []]


class Slow:
    """Stands in for workers whose first ``wrong`` candidates are wrong; it notes how long each of them had."""

    count = 1

    def __init__(self, wrong: int) -> None:
        self.wrong, self.had = wrong, list[float]()

    def evaluate(self, candidate: dict[str, Any], limit_s: float, until: float, *, measure: bool) -> dict[str, Any]:
        self.had.append(until - time.monotonic())
        wrong = len(self.had) <= self.wrong
        return {"outcome": to_json(Wrong(1.0, 1e-5, "T=1") if wrong else Predicted(1.0, "nothing"))}

    def verify(self, candidate: dict[str, Any], limit_s: float) -> dict[str, Any]:
        return {"outcome": to_json(Predicted(1.0, "nothing", error=1e-4))}


def test_until_a_candidate_has_a_time_those_under_way_may_finish(request_: SearchRequest) -> None:
    """On a slow machine a study would otherwise end with nothing, and what it searches for would be missing."""
    url = f"sqlite:///{request_.out / 'study.db'}"
    listener: Any = SimpleNamespace(note=print, study_started=lambda *about: None, trial_done=lambda *about: None)
    shares = []
    for trials in (4, 6):
        request = replace(request_, trials=trials, measure=False)
        study, workers = OneStudy(request, get_backend("triton"), CASE, url), Slow(wrong=2)
        report, _ = study.run(cast(Any, workers), listener, 100.0, 1000.0)
        assert report.frontier
        shares.append(["all" if had > 500 else "share" for had in workers.had])
    assert shares == [["all", "all", "all", "share"], ["share", "share"]]


def point(number: int, length: int, ms: float) -> FrontierPoint:
    problem = PROBLEM.replace(segment_length=length)
    return FrontierPoint(problem, 1, 1, Config.of({"n": number, "segment_length": length}), timed(ms))


SHORT, LONG = point(1, 32, 1.05), point(2, 64, 1.0)
SPARE = (point(3, 32, 1.2), point(4, 64, 1.02), point(5, 32, 3.0))
REPORT = StudyReport(CASE, (), (SHORT, LONG), SHORT, spare=SPARE, maker="tvm")


@pytest.mark.parametrize("measure", [True, False])
def test_the_next_best_at_every_segment_length_stand_by(request_: SearchRequest, measure: bool) -> None:
    study = OneStudy(replace(request_, measure=measure), get_backend("triton"), CASE, "sqlite://")
    times = [(32, 5.0), (64, 1.0), (32, 2.0), (32, 3.0), (64, 4.0), (32, 9.0), (32, 4.0)]
    trials = [Trial(n, point(n, C, ms).config, timed(ms), 0.1) for n, (C, ms) in enumerate(times)]
    report = study.report(trials)
    assert [one.config["n"] for one in report.frontier] == [2, 1]
    # Only the predicted candidate that stands for its length was verified.
    assert [one.config["n"] for one in report.spare] == ([3, 4, 6] if measure else [])
    assert all(one.problem.segment_length == one.config["segment_length"] for one in report.spare)


def shipped(request: SearchRequest, note: Callable[[str], None] = lambda _: None) -> list[tuple[int, bool]]:
    report = SearchReport(request.target, request.out, (REPORT, replace(REPORT)), 1.0)
    winners = ship(request, report, note, WORKERS)
    assert len(winners) % 2 == 0 and winners[: len(winners) // 2] == winners[len(winners) // 2 :]
    return [(winner.config.integer("n"), winner.recommended) for winner in winners[: len(winners) // 2]]


@pytest.mark.parametrize(
    ("wrong", "wanted"),
    [
        ((), [(1, True), (2, False)]),
        ((2,), [(1, True), (4, False)]),
        ((1,), [(3, False), (2, True)]),
        ((1, 3), [(5, False), (2, True)]),
        ((1, 3, 5), [(2, True)]),
    ],
)
def test_what_is_not_right_gives_way_to_the_next_best(
    request_: SearchRequest, monkeypatch: pytest.MonkeyPatch, wrong: tuple[int, ...], wanted: list[tuple[int, bool]]
) -> None:
    monkeypatch.setattr(Workers, "wrong", wrong)
    notes: list[str] = []
    assert shipped(request_, notes.append) == wanted
    assert len(notes) == 2 * len(wrong)
    assert all(f"{number} is wrong" in " ".join(notes) for number in wrong)


@pytest.mark.parametrize(
    ("arch", "portable"), [("x86-64-v4", "x86-64-v3"), ("x86-64-v3", "x86-64-v3"), ("x86-64-v2", None), ("sm_90", None)]
)
def test_what_serves_other_cpus_ships_where_it_can_be_verified(
    request_: SearchRequest, arch: str, portable: str | None
) -> None:
    target = resolve("h100" if arch == "sm_90" else "cpu")[0]
    Workers.portable_archs.clear()
    shipped(replace(request_, target=replace(target, arch=arch)))
    assert Workers.portable_archs == {portable}


def test_where_nothing_is_right_nothing_ships(request_: SearchRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "wrong", (1, 2, 3, 4, 5))
    with pytest.raises(MctuneError, match="is wrong"):
        shipped(request_)


def test_ctrl_c_ships_what_is_verified(request_: SearchRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "interrupt", 2)
    notes: list[str] = []
    assert shipped(request_, notes.append) == [(1, True)]
    assert "2 of 4 kernels" in notes[0]
    monkeypatch.setattr(Workers, "wrong", (1, 3, 5))
    with pytest.raises(KeyboardInterrupt):
        shipped(request_)
