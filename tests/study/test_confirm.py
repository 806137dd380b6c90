"""Whose fault a failure is: a machine's is never recorded of a candidate."""

from __future__ import annotations

from typing import Any, cast

import pytest

from mctune.core.config import Config
from mctune.core.errors import DeviceError
from mctune.core.outcome import Crashed, FailedBuild, Outcome, TimedOut, Wrong, to_json
from mctune.study.confirm import evaluated
from mctune.study.study import CutShort, load_study, run_study
from mctune.workers.pool import Workers
from mctune.workers.worker import WorkerDied, WorkerTimedOut
from tests.study.spaces import SPACE, evaluate, timed, valid

Reply = dict[str, Any] | WorkerDied | WorkerTimedOut
GOOD: Reply = {"outcome": to_json(timed(1.0))}
BUILD: Reply = {"outcome": to_json(FailedBuild("no"))}
WRONG: Reply = {"outcome": to_json(Wrong(1.0, 1e-5, "T=1"))}
CRASH, FULL, KILLED = (
    WorkerDied("SIGSEGV", "time"),
    WorkerDied("full", "build", "", "machine"),
    WorkerDied("9", "", "", "outside"),
)


class Planted:
    """Answers one after another; ``trial`` is what is wrong with the machine."""

    def __init__(self, *replies: Reply, trial: str = "") -> None:
        self.replies, self.trial, self.again = list(replies), trial, list[bool]()

    def evaluate(
        self, candidate: object, limit_s: float, until: float | None = None, *, measure: bool, again: bool = False
    ) -> Reply:
        self.again.append(again)
        return self.replies.pop(0)

    def try_out(self, limit_s: float) -> str:
        return self.trial


@pytest.mark.parametrize(
    ("replies", "outcome"),
    [
        ((GOOD,), timed(1.0)),
        ((WRONG,), Wrong(1.0, 1e-5, "T=1")),
        ((BUILD, BUILD), FailedBuild("no")),
        ((BUILD, GOOD), timed(1.0)),
        ((CRASH, GOOD), timed(1.0)),
        ((CRASH, CRASH), Crashed("SIGSEGV (time)")),
        ((FULL, GOOD), timed(1.0)),
        ((KILLED, KILLED, GOOD), timed(1.0)),
        ((WorkerTimedOut(3.0, "build"),), TimedOut(3.0, "build")),
    ],
)
def test_a_failure_that_stays_on_a_sound_machine_is_the_candidates(
    replies: tuple[Reply, ...], outcome: Outcome
) -> None:
    workers = Planted(*replies)
    assert evaluated(cast(Workers, workers), {}, 1.0, None) == outcome
    assert not workers.replies and workers.again == [False] + [True] * (len(replies) - 1)


@pytest.mark.parametrize("replies", [(BUILD, BUILD), (CRASH, CRASH), (WorkerTimedOut(3.0, "build"),), (KILLED,) * 3])
def test_where_a_trial_kernel_fails_too_it_is_the_machines(replies: tuple[Reply, ...]) -> None:
    with pytest.raises(DeviceError, match="no compiler; no candidate is to blame"):
        evaluated(cast(Workers, Planted(*replies, trial="DeviceError: no compiler")), {}, 1.0, None)


def test_a_machine_that_says_so_is_believed() -> None:
    with pytest.raises(DeviceError, match=r"full \(build\)"):
        evaluated(cast(Workers, Planted(FULL, FULL)), {}, 1.0, None)


def test_what_a_run_found_before_its_machine_failed_is_kept_and_the_rest_is_tried_again(tmp_path: Any) -> None:
    url, calls = f"sqlite:///{tmp_path / 'search.db'}", []

    def failing(config: Config) -> Outcome:
        calls.append(config)
        if len(calls) == 5:
            raise DeviceError("no space")
        return evaluate(config)

    with pytest.raises(CutShort, match="no space") as raised:
        run_study(SPACE, [valid], failing, trials=9, storage=url)
    assert len(raised.value.trials) == 4 and raised.value.exit_code == 3
    assert len(load_study(url)[1]) == 4
    result = run_study(SPACE, [valid], evaluate, trials=9, storage=url)
    assert len(result.trials) == 9 and calls[4] in {trial.config for trial in result.trials}


def test_a_run_in_which_nothing_was_ever_built_proves_nothing_the_first_time(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path / 'search.db'}"
    broken = run_study(SPACE, [valid], lambda config: FailedBuild("no compiler"), trials=5, storage=url)
    assert len(broken.trials) == 5
    mended = run_study(SPACE, [valid], lambda config: timed(1.0), trials=5, storage=url)
    assert [trial.config for trial in mended.trials] == [trial.config for trial in broken.trials]
    assert all(trial.ms == 1.0 for trial in mended.trials)
    # What fails in two such runs has failed.
    other = f"sqlite:///{tmp_path / 'other.db'}"
    for total, new in ((3, 3), (3, 3), (6, 3)):
        tried: list[Config] = []
        run_study(SPACE, [valid], lambda config: tried.append(config) or Crashed("boom"), trials=total, storage=other)  # type: ignore[func-returns-value] # noqa: B023
        assert len(tried) == new
