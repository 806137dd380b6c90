"""The worker survives everything that a candidate can do, and says what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mctune.core.errors import MctuneError, UsageError
from mctune.workers.worker import Worker, WorkerDied, WorkerTimedOut

HERE = Path(__file__).parent
LIMIT_S = 30.0


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.syspath_prepend(str(HERE))
    with Worker("planted:entry", {"name": "x"}) as running:
        yield running


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone_soon(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)


def test_one_process_answers_many_calls(worker: Worker) -> None:
    first = worker.call({"n": 1, "text": "é" * 100_000}, LIMIT_S)
    second = worker.call({"n": 2}, LIMIT_S)
    assert isinstance(first, dict) and isinstance(second, dict)
    assert first["echo"] == {"n": 1, "text": "é" * 100_000}
    assert second["setup"] == {"name": "x"}
    assert first["pid"] == second["pid"] != os.getpid()
    assert worker.started == 1


@pytest.mark.parametrize(
    ("do", "message", "stage"),
    [
        ("abort", "SIGABRT", "build"),
        ("segfault", "SIGSEGV", "verify"),
        ("raise", "ValueError: a kernel refused", "build"),
        ("exit", "SystemExit: 3", "build"),
        ("exit_now", "status 7", "build"),
        ("not_json", "TypeError", "build"),
    ],
)
def test_a_death_is_reported_and_the_next_call_gets_a_fresh_process(
    worker: Worker, do: str, message: str, stage: str
) -> None:
    died = worker.call({"do": do}, LIMIT_S)
    assert isinstance(died, WorkerDied)
    assert message in died.message and "\n" not in died.message
    assert died.stage == stage
    assert isinstance(worker.call({}, LIMIT_S), dict)
    assert worker.started == 2


def test_a_crash_shows_where_it_happened(worker: Worker) -> None:
    died = worker.call({"do": "segfault"}, LIMIT_S)
    assert isinstance(died, WorkerDied)
    assert "Segmentation fault" in died.log and "planted.py" in died.log


@pytest.mark.alone
def test_a_hang_is_killed_in_time_and_names_its_stage(worker: Worker) -> None:
    worker.call({}, LIMIT_S)
    began = time.monotonic()
    assert worker.call({"do": "hang"}, 0.3) == WorkerTimedOut(0.3, "time")
    assert time.monotonic() - began < 5
    assert isinstance(worker.call({}, LIMIT_S), dict)


def test_a_process_outlives_the_thread_that_it_was_started_in(worker: Worker) -> None:
    answers: list[object] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: answers.append(worker.call({}, LIMIT_S)))
        thread.start()
        thread.join()
        # The operating system takes a moment to end the process.
        time.sleep(0.2)
    first, second = answers
    assert isinstance(first, dict) and isinstance(second, dict)
    assert first["pid"] == second["pid"] and worker.started == 1


@pytest.mark.alone
def test_a_call_is_halted_from_another_thread(worker: Worker) -> None:
    worker.call({}, LIMIT_S)
    timer = threading.Timer(0.3, worker.halt)
    timer.start()
    began = time.monotonic()
    assert isinstance(worker.call({"do": "hang"}, LIMIT_S), WorkerDied)
    assert time.monotonic() - began < 5
    died = worker.call({}, LIMIT_S)
    assert isinstance(died, WorkerDied) and "halted" in died.message and worker.started == 1


@pytest.mark.alone
def test_the_whole_process_group_is_killed(worker: Worker, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    answer = worker.call({"do": "hang_with_child", "pid_file": str(pid_file)}, 2.0)
    assert isinstance(answer, WorkerTimedOut)
    assert gone_soon(int(pid_file.read_text()))


def test_what_a_candidate_prints_stays_out_of_the_protocol(worker: Worker) -> None:
    answer = worker.call({"do": "garbage"}, LIMIT_S)
    assert isinstance(answer, dict) and answer["echo"] == {"do": "garbage"}
    died = worker.call({"do": "abort"}, LIMIT_S)
    assert isinstance(died, WorkerDied) and "garbage" not in died.log
    assert "Aborted" in died.log


def test_a_process_that_died_between_calls_is_replaced(worker: Worker) -> None:
    first = worker.call({}, LIMIT_S)
    assert isinstance(first, dict)
    os.kill(first["pid"], signal.SIGKILL)
    assert gone_soon(first["pid"])
    second = worker.call({}, LIMIT_S)
    assert isinstance(second, dict) and second["pid"] != first["pid"]


def test_an_interrupted_call_leaves_no_stale_answer(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    first = worker.call({}, LIMIT_S)
    assert isinstance(first, dict)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            worker.call({"do": "hang"}, LIMIT_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert gone_soon(first["pid"])
    answer = worker.call({"n": 5}, LIMIT_S)
    assert isinstance(answer, dict) and answer["echo"] == {"n": 5}


def test_close_kills(worker: Worker) -> None:
    answer = worker.call({}, LIMIT_S)
    assert isinstance(answer, dict)
    worker.close()
    worker.close()
    assert gone_soon(answer["pid"])


def test_added_environment_reaches_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    with Worker("planted:entry", {}, env={"MCTUNE_PLANTED": "7"}) as running:
        assert running.call({"do": "environment", "name": "MCTUNE_PLANTED"}, LIMIT_S) == {"value": "7"}
    assert "MCTUNE_PLANTED" not in os.environ


@pytest.mark.parametrize(
    ("entry", "setup", "message"),
    [
        ("planted:entry", {"fail": "no device"}, "RuntimeError: cannot set up: no device"),
        ("planted:absent", {}, "has no attribute 'absent'"),
        ("no_such_module:entry", {}, "No module named 'no_such_module'"),
    ],
)
def test_a_worker_that_cannot_start_is_an_error_not_a_candidates_fault(
    monkeypatch: pytest.MonkeyPatch, entry: str, setup: dict[str, str], message: str
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    with Worker(entry, setup) as running, pytest.raises(MctuneError, match=entry) as caught:
        running.call({}, LIMIT_S)
    assert message in str(caught.value)


def test_a_malformed_entry_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="module:function"):
        Worker("planted.entry")


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = (
        "from mctune.workers.worker import Worker\n"
        "w = Worker('planted:entry', {})\n"
        f"open({str(pid_file)!r}, 'w').write(str(w.call({{}}, 30)['pid']))\n"
        "w.call({'do': 'hang'}, 600)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", script], env=env)
    try:
        deadline = time.monotonic() + 20
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        child = int(pid_file.read_text())
        assert alive(child)
    finally:
        parent.kill()
        parent.wait()
    assert gone_soon(child)
