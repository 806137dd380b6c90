"""Many workers on one study, over a PostgreSQL server of the test's own: killed, stopped, and the server restarted."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import FailedBuild, Outcome
from mctune.core.space import Choice, Int, SearchSpace
from mctune.study.claim import Timing
from mctune.study.record import Trial
from mctune.study.storage import opened
from mctune.study.study import load_study, run_study
from tests.study.postgres import Postgres, postgres
from tests.study.spaces import timed

ROOT = Path(__file__).parents[2]
SMALL = SearchSpace((Int("x", range(9)), Int("y", range(7)), Choice("form", ("a", "b"))))
HASTY = Timing(beat_s=0.25, grace_s=2.0)


def fits(config: Config) -> bool:
    return config["form"] == "a" or config.integer("x") % 2 == 1


VALID = frozenset(config for config in SMALL.points() if fits(config))


def cheap(config: Config) -> Outcome:
    if config.integer("x") == 8:
        return FailedBuild("no such intrinsic")
    return timed(1.0 + config.integer("x") + config.integer("y"))


def work(url: str, name: str, log: str, trials: int) -> None:
    """One worker; it logs each evaluation as it begins and ends, and takes some 50 ms for it."""

    def evaluate(config: Config) -> Outcome:
        with Path(log).open("a") as file:
            print("begin", config.to_json(), file=file)
        time.sleep(0.05)
        with Path(log).open("a") as file:
            print("end", config.to_json(), file=file)
        return cheap(config)

    result = run_study(SMALL, [fits], evaluate, trials=trials, storage=url, study_name=name, timing=HASTY)
    print(result.stopped, len(result.trials))


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture
def name() -> str:
    return f"study-{secrets.token_hex(4)}"


@pytest.fixture
def worker(server: Postgres, name: str, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts worker ``which`` of the test's study; all of them are killed at the end."""
    begun: list[subprocess.Popen[str]] = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def start(which: int, trials: int = 1000, url: str = server.url) -> subprocess.Popen[str]:
        code = f"from tests.study.test_postgres import work; work({url!r}, {name!r}, 'log{which}', {trials})"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def finished(url: str, name: str) -> tuple[Trial, ...]:
    try:
        return load_study(url, name)[1]
    except UsageError:
        return ()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.alone
def test_killed_and_stopped_workers_and_a_restarted_server_lose_and_repeat_nothing(
    server: Postgres, name: str, worker: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Three at once; one dies by ``kill -9``, one sleeps longer than its claim lives. 20 s."""
    workers = [worker(which) for which in range(3)]
    logs = [tmp_path / f"log{which}" for which in range(3)]
    wait_for(lambda: all(log.exists() for log in logs))

    wait_for(lambda: logs[0].read_text().count("end") >= 3 and _busy(logs[0]))
    workers[0].send_signal(signal.SIGKILL)
    wait_for(lambda: _busy(logs[1]))
    workers[1].send_signal(signal.SIGSTOP)
    asleep = time.monotonic()
    wait_for(lambda: len(finished(server.url, name)) >= 30)
    server.stop()
    time.sleep(1.0)
    server.start()
    wait_for(lambda: len(finished(server.url, name)) >= 50)
    wait_for(lambda: time.monotonic() - asleep > 2 * HASTY.grace_s)
    workers[1].send_signal(signal.SIGCONT)

    for process in workers[1:]:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.split()) == (0, ["exhausted", str(len(VALID))]), err
    trials = finished(server.url, name)
    assert Counter(trial.config for trial in trials) == Counter(VALID)
    assert all(trial.outcome == cheap(trial.config) for trial in trials)
    # Evaluated twice is only what was cut off: by the kill, and by the sleep.
    begun = Counter(line for log in logs for line in log.read_text().splitlines() if line.startswith("begin"))
    assert sum(begun.values()) <= len(VALID) + 2
    states = Counter(trial.state for trial in optuna.load_study(study_name=name, storage=driver(server)).trials)
    assert states[TrialState.RUNNING] == 0


def _busy(log: Path) -> bool:
    text = log.read_text() if log.exists() else ""
    return text.count("begin") > text.count("end")


def driver(server: Postgres) -> str:
    return server.url.replace("postgresql://", "postgresql+psycopg://")


def test_trials_are_a_total_over_all_workers(
    server: Postgres, name: str, worker: Callable[..., subprocess.Popen[str]]
) -> None:
    workers = [worker(which, 25) for which in range(3)]
    for process in workers:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.split()) == (0, ["trials", "25"]), err
    assert len({trial.config for trial in finished(server.url, name)}) == 25


def test_one_worker_goes_on_as_it_does_over_a_file(server: Postgres, name: str) -> None:
    whole = run_study(SMALL, [fits], cheap, trials=40, seed=2)
    for total in (1, 10, 25, 40):
        result = run_study(SMALL, [fits], cheap, trials=total, seed=2, storage=server.url, study_name=name)
    assert [trial.config for trial in result.trials] == [trial.config for trial in whole.trials]


def test_after_kill_9_one_worker_goes_on_at_once_and_proposes_the_same(
    server: Postgres, name: str, worker: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Its process is known to have ended: the long grace of the others is not waited for."""
    first = worker(0)
    wait_for(lambda: (tmp_path / "log0").exists() and (tmp_path / "log0").read_text().count("end") >= 12)
    first.kill()
    first.wait()
    result = run_study(SMALL, [fits], cheap, trials=40, storage=server.url, study_name=name)
    whole = run_study(SMALL, [fits], cheap, trials=40)
    assert [trial.config for trial in result.trials] == [trial.config for trial in whole.trials]


def test_the_result_of_a_worker_whose_trial_was_taken_over_is_dropped(server: Postgres, name: str) -> None:
    """Another tells the trial while it is evaluated; the point is evaluated again and counted once."""
    taken: list[Config] = []

    def slow(config: Config) -> Outcome:
        if len(taken) < 2:
            study = optuna.load_study(study_name=name, storage=driver(server))
            running = next(trial for trial in study.trials if trial.state == TrialState.RUNNING)
            study.tell(running.number, state=TrialState.FAIL)
            taken.append(config)
        return cheap(config)

    result = run_study(SMALL, [fits], slow, trials=20, storage=server.url, study_name=name)
    assert len({trial.config for trial in result.trials}) == len(result.trials) == 20
    assert taken[0] == taken[1] and taken[0] in {trial.config for trial in result.trials}


def test_a_worker_for_something_else_is_refused_and_a_description_has_one_author(server: Postgres, name: str) -> None:
    def search(target: str) -> None:
        run_study(SMALL, [fits], cheap, trials=2, storage=server.url, study_name=name, attrs={"target": target})

    search("h100")
    with pytest.raises(UsageError, match=r'target is "h100" there and "a100-80g" here') as refused:
        search("a100-80g")
    assert len(str(refused.value).splitlines()) == 1


def test_failures_of_a_run_that_goes_on_are_not_doubted(server: Postgres, name: str) -> None:
    """A second worker begins while the first has seen nothing but failures, which it must not try again."""
    tried: list[Config] = []

    def some(config: Config) -> Outcome | None:
        beside.append(config)
        return cheap(config) if len(beside) < 15 else None

    def fails(config: Config) -> Outcome:
        tried.append(config)
        if len(tried) == 4:
            run_study(SMALL, [fits], some, trials=100, storage=server.url, study_name=name)
        return FailedBuild("always")

    beside: list[Config] = []
    result = run_study(SMALL, [fits], fails, trials=21, storage=server.url, study_name=name)
    assert len(beside) == 15 and not set(beside) & set(tried[:4])
    assert len({trial.config for trial in result.trials}) == len(result.trials) == 21


@pytest.mark.alone
def test_workers_over_optunas_proxy_which_is_started_again(
    server: Postgres, name: str, worker: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Neither of them knows the server. 10 s."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "from optuna.storages import RDBStorage, run_grpc_proxy_server\n"
        f"run_grpc_proxy_server(RDBStorage({driver(server)!r}), host='127.0.0.1', port={port})"
    )

    def proxy() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    before = proxy()
    try:
        workers = [worker(which, url=f"grpc://127.0.0.1:{port}") for which in range(2)]
        wait_for(lambda: len(finished(server.url, name)) >= 20)
    finally:
        before.kill()
        before.wait()
    after = proxy()
    try:
        for process in workers:
            out, err = process.communicate(timeout=120)
            assert (process.returncode, out.split()) == (0, ["exhausted", str(len(VALID))]), err
    finally:
        after.kill()
        after.wait()
    trials = finished(server.url, name)
    assert Counter(trial.config for trial in trials) == Counter(VALID)


def test_a_proxy_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"cannot open the storage grpc://127\.0\.0\.1:1: .*; give an Optuna URL"):
        opened("grpc://127.0.0.1:1", 0.5)
