"""A search on a machine that is out of order records nothing of it, and goes on once the machine is mended.

Each run draws one such machine and one moment of Ctrl-C; the seed is printed when it fails.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import optuna

from mctune.study.storage import sqlite_url

ROOT = Path(__file__).parents[2]
PROBLEM = "T=32,H=1,Dk=16,Dv=16,segment_length=16"
SEED = secrets.randbits(32)
LIMIT_S = 300


def search(out: Path, env: dict[str, str], trials: int = 1) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    command = [
        sys.executable,
        "-m",
        "mctune",
        "search",
        "--problem",
        PROBLEM,
        "--trials",
        str(trials),
        "--out",
        str(out),
    ]
    # What a shell starts in the background ignores SIGINT, and so would the search.
    return subprocess.Popen(command, env=environment, cwd=out.parent, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def truncated(out: Path) -> dict[str, str]:
    """Kernels of an earlier search, cut short by a machine that stopped."""
    assert search(out, {}).wait(LIMIT_S) == 0
    for library in (out / "search" / "kernels").glob("*.so"):
        os.truncate(library, random.Random(SEED).randrange(library.stat().st_size))
    (out / "search" / "study.db").unlink()
    return {}


FILLS_UP = "case $* in */trial*|*nothing*) exec g++ $*;; esac; echo No space left on device; exit 1"
MACHINES: dict[str, Callable[[Path], dict[str, str]]] = {
    "no such compiler": lambda out: {"CC": "ccache-that-is-not-there gcc"},
    "a compiler with an option": lambda out: {"CC": "env LANG=C gcc"},
    "a compiler that fails": lambda out: {"CXX": "/bin/false"},
    "a compiler that writes nothing": lambda out: {"CXX": "/bin/true"},
    "a compiler that is killed": lambda out: {"CXX": script(out.parent / "cc", "kill -9 $$")},
    "a disk that fills up": lambda out: {"CXX": script(out.parent / "cc", FILLS_UP)},
    "no temporary directory": lambda out: {"TMPDIR": "/nowhere"},
    "no home": lambda out: {"HOME": "/proc", "XDG_CACHE_HOME": "/proc/cache"},
    "a cache that is a file": lambda out: {"XDG_CACHE_HOME": script(out.parent / "cache", "")},
    "files cut short": truncated,
}


def test_a_machine_out_of_order_leaves_no_mark(tmp_path: Path) -> None:
    """20 s: two searches of one candidate."""
    rng = random.Random(SEED)
    machine = rng.choice(sorted(MACHINES))
    print(f"seed {SEED}: {machine}")
    out = tmp_path / "mctune_hostile"
    first = search(out, MACHINES[machine](out))
    _, said = first.communicate(timeout=LIMIT_S)
    assert first.returncode in (0, 3) and "Traceback" not in said, said
    if first.returncode:
        assert len([line for line in said.splitlines() if line.startswith("mctune: error: ")]) == 1, said
        assert recorded(out) == 0
    again = search(out, {}, trials=2)
    _, said = again.communicate(timeout=LIMIT_S)
    assert again.returncode == 0 and "failed" not in said and "crashed" not in said, said


def test_a_worker_that_is_killed_from_outside_is_not_its_candidates_fault(tmp_path: Path) -> None:
    """20 s: a search some of whose processes are killed, as by a kernel that is out of memory."""
    out = tmp_path / "mctune_killed"
    running = search(out, {}, trials=4)
    rng, deaths = random.Random(SEED), 0

    def kill() -> None:
        nonlocal deaths
        while running.poll() is None and deaths < 2:
            time.sleep(rng.uniform(0.5, 6.0))
            for child in children(running.pid):
                os.kill(child, signal.SIGKILL)
                deaths += 1

    thread = threading.Thread(target=kill)
    thread.start()
    _, said = running.communicate(timeout=LIMIT_S)
    thread.join()
    assert running.returncode == 0 and "crashed" not in said and "Traceback" not in said, f"seed {SEED}: {said}"


def test_ctrl_c_at_any_moment_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    """20 s: while Python starts, while modules are imported, while candidates are tried."""
    rng, out = random.Random(SEED), tmp_path / "mctune_interrupted"
    for most in (1.5, 8.0, 16.0):
        running, wait = search(out, {}, trials=500), rng.uniform(0.5, most)
        time.sleep(wait)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=LIMIT_S)
        where = f"seed {SEED}, after {wait:.2f} s: {running.returncode} {said}"
        assert running.returncode == 130 and "Traceback" not in said and "interrupted" in said.splitlines()[-1], where
    done = recorded(out)
    last = search(out, {}, trials=done + 1)
    _, said = last.communicate(timeout=LIMIT_S)
    assert last.returncode == 0 and recorded(out) == done + 1, f"seed {SEED}: {said}"


def recorded(out: Path) -> int:
    """Trials that count in the studies of a package."""
    if not (out / "search" / "study.db").is_file():
        return 0
    url = sqlite_url(out / "search" / "study.db")
    studies = (optuna.load_study(study_name=name, storage=url) for name in optuna.get_all_study_names(url))
    return sum(len(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))) for study in studies)


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found
