"""`mctune search --workers`: processes that share a study; what they cannot do is refused before anything begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mctune.cli._workers import check_workers
from mctune.core.errors import UsageError
from mctune.core.host import usable_cores
from mctune.core.target import resolve
from mctune.study.storage import studies_in
from mctune.study.study import load_study
from tests.study.postgres import postgres

SERVER = "postgresql://me@host/mctune"
PROBLEM = "B=1,T=40,H=1,Dk=16,Dv=16,aggregation=residual"


@pytest.mark.parametrize(
    ("count", "target", "measure", "storage", "told"),
    [
        (2, "t4", False, None, r"--workers 2: a SQLite file is searched by one process; .* --storage postgresql://"),
        (2, "t4", False, "study.db", "a SQLite file is searched by one process"),
        (2, "cpu", True, SERVER, "has all cores of this CPU already.* on other machines"),
        (
            999,
            "t4",
            False,
            SERVER,
            rf"--workers 999: this machine has {usable_cores()} cores.*at most {usable_cores()}",
        ),
    ],
)
def test_what_workers_cannot_do_is_refused(
    count: int, target: str, measure: bool, storage: str | None, told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        check_workers(count, resolve(target)[0], measure, storage)


def test_as_many_workers_as_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,3")
    check_workers(2, resolve("t4")[0], True, SERVER)
    with pytest.raises(UsageError, match="this machine has 2 GPUs, one for each worker; at most 2"):
        check_workers(3, resolve("t4")[0], True, SERVER)


def test_two_workers_search_one_study_and_leave_the_rest_to_others(tmp_path: Path) -> None:
    out, workers = tmp_path / "mctune_t4", min(2, usable_cores())
    with postgres() as server:
        command = [
            *(sys.executable, "-m", "mctune", "search", "--gpu", "t4", "--backend", "tvm", "--problem", PROBLEM),
            *("--segment-lengths", "16", "--trials", "4", "--storage", server.url, "--workers", str(workers)),
            *("--join", "--out", str(out)),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        (name,) = studies_in(server.url, 5.0)
        trials = load_study(server.url, name)[1]
    logs = [done.stderr, *((out / "search" / f"worker-{number}.log").read_text() for number in range(1, workers))]
    assert len(trials) == len({trial.config for trial in trials}) == 4
    assert all("4 trials in all" in log for log in logs), logs
    assert not (out / "tuned.json").exists()
