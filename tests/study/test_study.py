"""The study engine: what is recorded, what is refused, and that nothing is lost or repeated."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from mctune.core.config import Config
from mctune.core.errors import MctuneError, UsageError
from mctune.core.outcome import (
    Crashed,
    FailedBuild,
    Outcome,
    Predicted,
    Timed,
    TimedOut,
    TooLarge,
    Wrong,
    cost,
    from_json,
)
from mctune.core.space import Choice, Int, SearchSpace
from mctune.study import record
from mctune.study.events import SAMPLERS
from mctune.study.record import Trial
from mctune.study.study import StudyResult, load_study, run_study
from tests.study.spaces import SPACE, evaluate, timed, valid

LINE = SearchSpace((Int("x", range(8)),))
EVERY_KIND: tuple[Outcome, ...] = (
    FailedBuild("no such intrinsic"),
    TooLarge("needs 300 B of 200 B", 300, 200, "B"),
    Crashed("signal 11"),
    TimedOut(5.0, "build"),
    Wrong(0.5, 2e-5, "T=1"),
    Timed(2.0, 1.9, 2.1, 20, 1e-7),
    Predicted(3.0, "roofline", notes=("cached_kernel: C7515 serialized",)),
    Wrong(float("inf"), 2e-5, "T=7"),
)


def always(config: Config) -> bool:
    return True


def plain(trials: tuple[Trial, ...]) -> list[tuple[Config, Outcome]]:
    return [(trial.config, trial.outcome) for trial in trials]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'search.db'}"


CHEAP = [name for name in SAMPLERS if name != "gp"]
"""The Gaussian process of Optuna takes a tenth of a second a trial and more; tests/study has it."""


@pytest.mark.parametrize("sampler", CHEAP)
def test_equal_seeds_give_equal_searches_without_duplicates_or_invalid_points(sampler: str) -> None:
    def searched(seed: int) -> list[tuple[Config, Outcome]]:
        return plain(run_study(SPACE, [valid], evaluate, trials=60, sampler=sampler, seed=seed).trials)

    first = searched(5)
    assert first == searched(5)
    assert len({config for config, _ in first}) == 60
    assert all(valid(config) for config, _ in first)
    assert sampler == "grid" or first != searched(6)


@pytest.mark.parametrize("sampler", CHEAP)
def test_a_small_space_is_exhausted_and_the_search_ends(sampler: str) -> None:
    space = SearchSpace((Int("x", range(9)), Choice("y", ("a", "b")), Choice("z", (False, True))))

    def odd(config: Config) -> bool:
        return config.integer("x") % 2 == 1 or config["y"] == "a"

    result = run_study(space, [odd], lambda config: timed(1.0 + config.integer("x")), trials=500, sampler=sampler)
    assert result.stopped == "exhausted"
    assert {trial.config for trial in result.trials} == {config for config in space.points() if odd(config)}


def test_a_space_without_a_valid_point_ends_at_once() -> None:
    result = run_study(LINE, [lambda config: False], evaluate, trials=5)
    assert (result.trials, result.stopped, result.best) == ((), "exhausted", None)


def test_every_candidate_may_fail() -> None:
    result = run_study(SPACE, [valid], lambda config: Crashed("boom"), trials=50)
    assert len(result.trials) == 50 and result.best is None


def test_every_kind_of_outcome_is_recorded_as_a_complete_trial(url: str) -> None:
    shown: list[Trial] = []
    result = run_study(
        LINE, [always], lambda config: EVERY_KIND[config.integer("x")], trials=8, storage=url, on_trial=shown.append
    )
    assert {trial.config.integer("x"): trial.outcome for trial in result.trials} == dict(enumerate(EVERY_KIND))
    assert tuple(shown) == result.trials
    best = result.best
    assert best is not None and best.ms == 2.0

    stored = optuna.load_study(study_name="mctune", storage=url)
    assert Counter(trial.state for trial in stored.trials) == {TrialState.COMPLETE: 8}
    assert stored.best_value == 2.0
    for trial in stored.trials:
        outcome = from_json(trial.user_attrs["outcome"])
        assert Config.from_json(trial.user_attrs["config"]) == Config.of(trial.params)
        assert trial.user_attrs["seconds"] >= 0
        assert trial.constraints == {"failed": float(cost(outcome) is None)}


def test_going_on_is_the_same_as_never_having_stopped(url: str) -> None:
    whole = run_study(SPACE, [valid], evaluate, trials=45, seed=2)
    for total in (1, 10, 30, 45, 45):
        result = run_study(SPACE, [valid], evaluate, trials=total, seed=2, storage=url)
        assert len(result.trials) == total and result.stopped == "trials"
    assert plain(result.trials) == plain(whole.trials)


def test_kill_9_loses_no_finished_trial_and_repeats_none(url: str, tmp_path: Path) -> None:
    log = tmp_path / "evaluations"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def run(dies_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.study.spaces", url, str(log), str(dies_at)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    for dies_at, finished in ((7, 6), (30, 28)):  # the 30th evaluation overall is candidate 29: the 7th was made twice
        assert run(dies_at).returncode == -signal.SIGKILL
        assert len(load_study(url)[1]) == finished
    last = run(0)
    assert last.returncode == 0 and last.stdout.split() == ["40"], last.stderr

    _, trials = load_study(url)
    assert len({trial.config for trial in trials}) == len(trials) == 40
    evaluations = log.read_text().splitlines()
    assert len(evaluations) == 42
    cut_off = Counter(evaluations[6:7] + evaluations[29:30])
    assert Counter(evaluations) - cut_off == Counter(trial.config.to_json() for trial in trials)
    assert plain(trials) == plain(run_study(SPACE, [valid], evaluate, trials=40, seed=3).trials)


def test_a_trial_cut_off_between_its_outcome_and_the_end_is_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    end = record.finish

    def cut_off(study: optuna.Study, running: FrozenTrial, outcome: Outcome | None) -> bool:
        if running.number == 3:
            raise RuntimeError("power cut")
        return end(study, running, outcome)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(record, "finish", cut_off)
        run_study(SPACE, [valid], evaluate, trials=10, storage=url)
    evaluated: list[Config] = []

    def watched(config: Config) -> Outcome:
        evaluated.append(config)
        return evaluate(config)

    result = run_study(SPACE, [valid], watched, trials=10, storage=url)
    assert len(result.trials) == 10 and len(evaluated) == 6
    assert optuna.load_study(study_name="mctune", storage=url).trials[3].state == TrialState.COMPLETE


@pytest.mark.parametrize("stored", [True, False])
def test_ctrl_c_returns_what_is_there_and_the_study_goes_on(url: str, stored: bool) -> None:
    calls = 0

    def interrupted(config: Config) -> Outcome:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return evaluate(config)

    storage = url if stored else None
    result = run_study(SPACE, [valid], interrupted, trials=20, seed=1, storage=storage)
    assert result.interrupted and len(result.trials) == 5 and result.best is not None
    if stored:
        again = run_study(SPACE, [valid], evaluate, trials=20, seed=1, storage=storage)
        assert plain(again.trials) == plain(run_study(SPACE, [valid], evaluate, trials=20, seed=1).trials)


def test_the_timeout_ends_a_run() -> None:
    result = run_study(SPACE, [valid], evaluate, trials=20, timeout=0.0)
    assert result.stopped == "timeout" and result.trials == ()


@pytest.mark.parametrize("at_once", (1, 3))
def test_what_the_time_cuts_off_is_not_counted_and_is_tried_again(url: str, at_once: int) -> None:
    left = 5

    def timely(config: Config) -> Outcome | None:
        nonlocal left
        left -= 1
        return evaluate(config) if left >= 0 else None

    result = run_study(SPACE, [valid], timely, trials=20, seed=1, storage=url, at_once=at_once)
    assert result.stopped == "timeout" and len(result.trials) == 5
    states = Counter(trial.state for trial in optuna.load_study(study_name="mctune", storage=url).trials)
    assert states == {TrialState.COMPLETE: 5, TrialState.FAIL: 1}
    again = run_study(SPACE, [valid], evaluate, trials=20, seed=1, storage=url, at_once=at_once)
    assert len({trial.config for trial in again.trials}) == 20


def test_ctrl_c_at_any_moment_ends_the_run_and_nothing_else(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the database's transactions too, many times in one process: what is left open there locks the next run."""
    monkeypatch.setattr("mctune.study.study.PATIENCE_S", 2.0)  # a lock that is never released times out soon
    moments = random.Random(0)
    before = (
        signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT)),
    )
    runs: list[StudyResult | None] = []
    try:
        while len(runs) < 400 and not (runs and runs[-1] and runs[-1].stopped == "trials"):
            # Later and later, so that even on a slow machine one run makes progress.
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.001, 0.03 + 0.005 * len(runs)))
            try:
                runs.append(run_study(SPACE, [valid], evaluate, trials=12, seed=1, storage=url))
            except KeyboardInterrupt:
                runs.append(None)  # the run had ended, or not yet begun
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGALRM, before[1])
    assert sum(1 for run in runs if run and run.interrupted) >= 3
    assert runs[-1] and plain(runs[-1].trials) == plain(run_study(SPACE, [valid], evaluate, trials=12, seed=1).trials)


def test_a_storage_that_cannot_be_written_is_said_in_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mctune.study.study.PATIENCE_S", 0.1)
    other: list[sqlite3.Connection] = []

    def kept(config: Config) -> Outcome:
        if not other:
            other.append(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=30, isolation_level=None))
            other[0].execute("begin exclusive")
        return timed(1.0)

    with pytest.raises(MctuneError, match=r"cannot be written: .*database is locked; what was") as raised:
        run_study(LINE, [always], kept, trials=3, storage=url)
    assert url in str(raised.value) and len(str(raised.value).splitlines()) == 1
    other[0].close()
    assert len(run_study(LINE, [always], kept, trials=3, storage=url).trials) == 3


@pytest.mark.alone
def test_ctrl_c_does_not_wait_for_the_candidates_beside() -> None:
    ended = threading.Event()

    def beside(config: Config) -> Outcome:
        if config.integer("x") == 0:
            raise KeyboardInterrupt
        ended.wait(20)
        return timed(1.0)

    began = time.monotonic()
    result = run_study(LINE, [always], beside, trials=8, sampler="grid", at_once=8)
    ended.set()
    assert result.interrupted and time.monotonic() - began < 10


def test_a_study_of_something_else_is_refused(url: str, tmp_path: Path) -> None:
    about = {"problem": {"T": 4096}, "target": "cpu"}
    run_study(LINE, [always], lambda config: timed(1.0), trials=2, storage=url, attrs=about)
    assert load_study(url)[0] == about
    with pytest.raises(UsageError, match='target is "cpu" there and "a100-80g" here'):
        run_study(LINE, [always], evaluate, trials=3, storage=url, attrs={**about, "target": "a100-80g"})
    with pytest.raises(UsageError, match=r"x is \[0, 1.*give another study name"):
        run_study(LINE.fixed(x=(0, 1)), [always], evaluate, trials=3, storage=url, attrs=about)
    run_study(
        LINE, [always], lambda config: timed(1.0), trials=2, storage=url, study_name="other", attrs={"target": "x"}
    )
    optuna.create_study(storage=url, study_name="foreign").ask()
    with pytest.raises(UsageError, match="mctune did not make it"):
        run_study(LINE, [always], evaluate, trials=3, storage=url, study_name="foreign", attrs=about)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trials=0"):
        run_study(LINE, [always], evaluate, trials=0)
    with pytest.raises(UsageError, match=r"annealing.*mix, tpe, gp, cmaes, random, grid, nor module:Class"):
        run_study(LINE, [always], evaluate, trials=1, sampler="annealing")
    with pytest.raises(UsageError, match="no parameter 'segment_length'"):
        run_study(LINE, [always], evaluate, trials=1, balance="segment_length")
    with pytest.raises(UsageError, match=r"cannot open the storage sqlite:////nowhere/at/all\.db"):
        run_study(LINE, [always], evaluate, trials=1, storage="sqlite:////nowhere/at/all.db")
    with pytest.raises(UsageError, match="cannot open the storage nonsense"):
        run_study(LINE, [always], evaluate, trials=1, storage="nonsense")
    with pytest.raises(UsageError, match="holds no study 'mctune'"):
        load_study(f"sqlite:///{tmp_path / 'empty.db'}")


def test_a_search_waits_for_who_holds_its_file(url: str) -> None:
    """A copy, a report or a dashboard may hold it for longer than the five seconds that SQLite waits by itself."""

    def hold(held: threading.Event) -> None:
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=30, isolation_level=None)) as other:
            other.execute("begin exclusive")
            held.set()
            time.sleep(6.5)
            other.execute("rollback")

    def disturbed(config: Config) -> Outcome:
        if not others:
            held = threading.Event()
            others.append(threading.Thread(target=hold, args=(held,)))
            others[0].start()
            assert held.wait(30)
        return timed(1.0 + config.integer("x"))

    others: list[threading.Thread] = []
    assert len(run_study(LINE, [always], disturbed, trials=3, storage=url).trials) == 3
    others[0].join()
    assert len(load_study(url)[1]) == 3


@pytest.mark.parametrize("trials", (6, 7))
def test_candidates_side_by_side(trials: int, url: str) -> None:
    meeting = threading.Barrier(2, timeout=20)

    def both(config: Config) -> Outcome:
        meeting.wait()
        return Timed(float(config.integer("x") + 1), 0.0, 9.0, 3, 1e-7)

    space = SearchSpace((Int("x", range(64)),))
    even = trials // 2 * 2
    attrs = {"about": "x"}
    result = run_study(space, [always], both, trials=even, storage=url, attrs=attrs, at_once=2)
    assert len({trial.config for trial in result.trials}) == even
    if trials > even:
        result = run_study(space, [always], lambda c: EVERY_KIND[5], trials=trials, storage=url, attrs=attrs, at_once=2)
    assert len({trial.config for trial in result.trials}) == trials
    assert [trial.number for trial in result.trials] == list(range(trials))
