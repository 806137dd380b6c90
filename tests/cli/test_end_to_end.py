"""Search, kill, go on, emit, verify, report: real kernels, as a user would run the commands."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mctune.core.host import CPU_ARCH
from tests.instruction_sets import cpus

CPUS = [one.arch for one in cpus()]
PROBLEM = ("--problem", "T=256,H=2,Dk=16,Dv=16", "--segment-lengths", "32,64")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "NO_COLOR": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "mctune", *arguments],
        cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A background job may have inherited that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run(folder: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def configs(folder: Path) -> list[str]:
    """Configurations of finished trials."""
    with closing(sqlite3.connect(folder / "build" / "mctune_cpu" / "search" / "study.db")) as database:
        rows = database.execute(
            "select value_json from trial_user_attributes a join trials t on a.trial_id = t.trial_id "
            "where key = 'config' and state = 'COMPLETE'"
        ).fetchall()
    return [row[0] for row in rows]


def wait_for_trials(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        try:
            if len(configs(folder)) >= count:
                return
        except sqlite3.OperationalError:
            pass
        time.sleep(0.1)
    raise AssertionError("no trial finished")


@pytest.fixture(scope="module", params=(CPUS[0], *(pytest.param(arch, marks=pytest.mark.slow) for arch in CPUS[1:])))
def searched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A search for each CPU that this one can be; the first was killed once, interrupted once, and finished.

    A minute of one core for the first, half of one for another: five processes that import torch and TVM, some ten
    candidates that TVM compiles, and a package with a build for other CPUs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CPU_ARCH, request.param)
        folder = tmp_path_factory.mktemp("searched")
        yield _searched(folder) if request.param == CPUS[0] else (folder, _plain(folder))


def _plain(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(folder, "search", *PROBLEM, "--trials", "4", "--json")[0])
    return found


def _searched(folder: Path) -> tuple[Path, dict[str, Any]]:
    killed = start(folder, "search", *PROBLEM, "--trials", "200")
    wait_for_trials(killed, folder, 2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = configs(folder)
    interrupted = start(folder, "search", *PROBLEM, "--trials", "200")
    wait_for_trials(interrupted, folder, len(before) + 1)
    interrupted.send_signal(signal.SIGINT)
    out, err = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130, err
    assert "recommended" in out and "done before" in err
    assert (folder / "build" / "mctune_cpu" / "tuned.json").is_file()
    middle = configs(folder)
    total = len(middle) + 2
    out, err = run(folder, "search", *PROBLEM, "--trials", str(total), "--json")
    after = configs(folder)
    assert set(before) <= set(middle) <= set(after)
    assert len(after) == len(set(after)) == total
    assert f"{len(middle)} done before" in err
    return folder, json.loads(out)


def test_the_report_has_a_frontier_and_recommends_by_slowdown(searched: tuple[Path, dict[str, Any]]) -> None:
    study = searched[1]["studies"][0]
    points = study["frontier"]
    assert [point["segment_length"] for point in points] == [32, 64]
    assert [point["states"] for point in points] == [8, 4]
    assert points[0]["bytes"] == 8 * 2 * (16 * 16 + 16) * 4
    fastest = min(point["ms"] for point in points)
    assert study["recommended"] == next(point for point in points if point["ms"] <= 1.1 * fastest)


def test_the_package_carries_every_length_and_verifies(searched: tuple[Path, dict[str, Any]]) -> None:
    folder = searched[0]
    table = json.loads((folder / "build" / "mctune_cpu" / "tuned.json").read_text())
    assert [entry["problem"]["segment_length"] for entry in table["entries"]] == [32, 64]
    assert table["target"]["arch"] == os.environ[CPU_ARCH]
    assert all(entry["outcome"]["kind"] == "timed" and entry["verified"]["error"] < 2e-5 for entry in table["entries"])
    out, _err = run(folder, "verify", "build/mctune_cpu", "--json")
    checks = json.loads(out)
    assert len(checks) >= 8 and all(check["passed"] and check["backend"] == "tvm" for check in checks)


@pytest.mark.parametrize("searched", CPUS[:1], indirect=True)
def test_emit_writes_the_package_again_from_the_studies(searched: tuple[Path, dict[str, Any]]) -> None:
    folder = searched[0]
    package = folder / "build" / "mctune_cpu"
    kernel = next((package / "kernels").glob("forward*.so"))
    kernel.write_bytes(kernel.read_bytes() + b"tampered")
    _, err = run(folder, "verify", "build/mctune_cpu", code=1)
    assert kernel.name in err
    run(folder, "emit", *PROBLEM)
    run(folder, "verify", "build/mctune_cpu")
    _, err = run(folder, "emit", "--problem", "T=256,H=3,Dk=16,Dv=16", code=2)
    assert "mctune search" in err


@pytest.mark.parametrize("searched", CPUS[:1], indirect=True)
def test_report_publishes_the_package(searched: tuple[Path, dict[str, Any]]) -> None:
    folder = searched[0]
    run(folder, "report", "build/mctune_cpu")
    text = (folder / "results" / "cpu" / "README.md").read_text()
    assert "measured" in text
    assert len((folder / "results" / "cpu" / "rows.csv").read_text().splitlines()) == 3


def test_what_cannot_be_searched_is_said_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = run(tmp_path, "search", "--gpu", "a100", "--measure", *PROBLEM, code=3)
    assert "a100-80g (NVIDIA A100 80 GB) is not on this machine" in err and "a100 means a100-80g" in err
    _, err = run(tmp_path, "search", "--gpu", "v100", "--backend", "triton", *PROBLEM, code=2)
    assert "no matrix units" in err and "take --backend tvm" in err
    _, err = run(tmp_path, "search", "--gpu", "v100", PROBLEM[0], f"{PROBLEM[1]},dtype=bfloat16", code=2)
    assert "multiplies float16 only; take dtype=float16, or float32" in err
    _, err = run(tmp_path, "search", "--problem", "recurrence=gru,T=256,H=2,Dk=16,Dv=16", code=2)
    assert "gru" in err and "linear, swla, dla, titans" in err
    _, err = run(tmp_path, "search", *PROBLEM, "--storage", "nosuch://x", code=2)
    assert "nosuch://x" in err
    monkeypatch.setenv(CPU_ARCH, "x86-64-v9")
    _, err = run(tmp_path, "search", *PROBLEM, code=2)
    assert "MCTUNE_CPU_ARCH=x86-64-v9: this CPU can be x86-64" in err and len(err.splitlines()) == 1
