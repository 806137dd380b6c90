"""What a machine does to every candidate alike: it shows in one that is timed in between, and changes nothing else."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctune.backends import get_backend
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Outcome, Predicted, Timed, cost, from_json, parts, shares, to_json
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.core.workload import Case
from mctune.study.events import SearchRequest
from mctune.study.leaders import Deciding
from mctune.study.one import OneStudy
from mctune.study.record import Trial
from mctune.study.samplers.parts import judged
from mctune.study.storage import sqlite_url
from mctune.study.study import run_study
from mctune.workers.payload import Beside
from mctune.workers.pool import Workers
from tests.study.test_chain import SPACE, parts_of

PROBLEM = Problem(T=512, H=2, Dk=32, Dv=32, segment_length=64, aggregation="grm", pass_="backward")


def quiet(config: Config) -> Timed:
    """What a candidate takes on a machine that does nothing else."""
    of = parts_of(config, 5)
    whole = 1.0 + sum(of.values())
    return Timed(whole, whole, whole, 7, 0.0, parts=tuple(of.items()))


def slowed(outcome: Timed, by: float) -> Timed:
    """The same while it does: all takes so much longer, and so does what is timed in between."""
    own = tuple((name, ms * by) for name, ms in outcome.parts)
    return replace(outcome, ms=outcome.ms * by, low=outcome.low * by, high=outcome.high * by, parts=own, pace=by)


@settings(max_examples=5)
@given(exponents=st.lists(st.integers(-2, 3), min_size=1, max_size=9))
def test_a_busy_machine_changes_nothing_of_a_search(exponents: list[int]) -> None:
    """The same candidates are proposed, and what is said of their operations is the same. (By powers of 2, so that
    rounding is no difference.)"""
    paces = iter([2.0**exponent for exponent in exponents] * 40)

    def busy(config: Config) -> Outcome:
        return slowed(quiet(config), next(paces))

    one = run_study(SPACE, (), quiet, trials=40, seed=1, start=8)
    other = run_study(SPACE, (), busy, trials=40, seed=1, start=8)
    assert [trial.config for trial in one.trials] == [trial.config for trial in other.trials]
    assert [trial.ms for trial in one.trials] == [trial.ms for trial in other.trials]
    pairs = [[(trial.config, trial.outcome) for trial in result.trials] for result in (one, other)]
    assert judged(SPACE, pairs[0]) == judged(SPACE, pairs[1])


@given(by=st.floats(0.5, 4.0))
def test_times_are_recorded_as_they_were_and_compared_over_the_pace(by: float) -> None:
    there = from_json(to_json(slowed(quiet(SPACE.default), by)))
    alone = quiet(SPACE.default)
    assert isinstance(there, Timed) and there.ms == alone.ms * by and there.pace == by
    assert cost(there) == pytest.approx(alone.ms)
    assert parts(there) == pytest.approx(dict(alone.parts)) and shares(there) == pytest.approx(shares(alone))


@pytest.mark.parametrize("pace", [0.0, -1.0, math.inf, math.nan])
def test_a_pace_that_no_machine_has_is_refused(pace: float) -> None:
    with pytest.raises(UsageError, match="pace is a factor above 0"):
        from_json(to_json(replace(quiet(SPACE.default), pace=pace)))


class Busy:
    """Stands in for workers: a candidate takes as many ms as its numbers make, times a pace that goes up and down."""

    count, least_s = 2, 1.0

    def __init__(self) -> None:
        self.asked: list[tuple[Config, Beside | None]] = []

    def evaluate(self, candidate: dict[str, Any], limit_s: float, until: Any, *, measure: bool) -> dict[str, Any]:
        config, beside = Config.of(candidate["config"]), Beside.of(candidate)
        self.asked.append((config, beside))
        by = 1.0 + len(self.asked) % 3
        pace = 1.0 if beside is None else by * self.alone(beside.config) / beside.ms
        ms = self.alone(config) * by
        return {"outcome": to_json(Timed(ms, ms, ms, 7, 1e-7, pace=pace))}

    @staticmethod
    def alone(config: Config) -> float:
        return 1.0 + sum(abs(math.log2(value)) for _, value in config.items if isinstance(value, int) and value > 0)

    def compare(self, candidates: list[dict[str, Any]], limit_s: float) -> dict[str, Any]:
        return {"samples": [[2.0] * 7 for _ in candidates], "failures": []}

    def hold(self, candidate: dict[str, Any], limit_s: float) -> dict[str, Any]:
        return {"outcome": to_json(Predicted(0.0, "", 1e-7))}


def test_candidates_are_timed_beside_the_first_of_their_segment_length(tmp_path: Path) -> None:
    lengths = (32, 64)
    case = Case(PROBLEM, lengths)
    request = SearchRequest(target=resolve("cpu")[0], cases=(case,), out=tmp_path, trials=10, warm=False, backend="tvm")
    study = OneStudy(request, get_backend("tvm").measuring(), case, sqlite_url(tmp_path / "s.db"))
    listener: Any = SimpleNamespace(note=lambda text: None, study_started=lambda *_: None, trial_done=lambda *_: None)
    workers = Busy()
    report, _ = study.run(cast(Workers, workers), listener, None)
    alone = {config for config, beside in workers.asked if beside is None}
    assert {config["segment_length"] for config in alone} == set(lengths) and len(workers.asked) == 10
    firsts = {beside.config for _, beside in workers.asked if beside is not None}
    assert len(firsts) == len(lengths) and firsts <= alone
    for config, beside in workers.asked:
        assert beside is None or beside.config["segment_length"] == config["segment_length"]
    # The same machine, whenever it was: what was timed beside one candidate is in one order with all others.
    for length in lengths:
        own = [trial for trial in study.so_far() if trial.config["segment_length"] == length]
        timed = [trial for trial in own if isinstance(trial.outcome, Timed) and trial.config not in alone]
        units = {round((trial.ms or 0.0) / workers.alone(trial.config), 9) for trial in timed}
        assert len(units) <= 1
    assert report.recommended is not None and report.recommended.outcome.ms == 2.0

    # The next run goes on beside the same ones.
    again = Busy()
    longer = OneStudy(replace(request, trials=14), study.backend, case, study.storage)
    longer.run(cast(Workers, again), listener, None)
    assert len(again.asked) == 4 and {beside.config for _, beside in again.asked if beside} <= firsts | alone
    assert all(beside is not None for _, beside in again.asked)


def test_a_gpu_has_no_others_beside(tmp_path: Path) -> None:
    case = Case(replace(PROBLEM, dtype="bfloat16", Dk=64, Dv=64), (64,))
    request = SearchRequest(target=resolve("a100")[0], cases=(case,), out=tmp_path, trials=6, warm=False)
    study = OneStudy(request, get_backend("triton").measuring(), case, sqlite_url(tmp_path / "s.db"))
    listener: Any = SimpleNamespace(note=lambda text: None, study_started=lambda *_: None, trial_done=lambda *_: None)
    workers = Busy()
    study.run(cast(Workers, workers), listener, None)
    assert len(workers.asked) == 6 and all(beside is None for _, beside in workers.asked)


def test_what_is_timed_again_is_as_it_was_measured() -> None:
    trial = Trial(0, SPACE.default, slowed(quiet(SPACE.default), 2.0), 0.1)
    listener: Any = SimpleNamespace(note=lambda text: None)
    deciding = Deciding(cast(Workers, Busy()), listener, lambda config: {"config": config.to_dict()}, 1.0)
    leaders = deciding.time_again({64: [trial]})
    assert leaders is not None
    outcome = leaders[64].trial.outcome
    assert isinstance(outcome, Timed) and (outcome.ms, outcome.pace) == (2.0, 1.0)
    assert shares(outcome) == pytest.approx(shares(trial.outcome))
