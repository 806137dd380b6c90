"""benchmarks/search_replay.py on a tiny measured space."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def space_file(path: Path) -> Path:
    """60 points: 10 break the constraints, those with a=8 crash, the optimum is 1 ms."""
    values: dict[str, list[Any]] = {
        "a": [1, 2, 4, 8],
        "b": [0.5, 1.0, 2.0],
        "c": ["x", "y"],
        "flag": [0, 1],
        "one": [7],
    }
    cache: dict[str, Any] = {}
    for n, (a, b, c, flag, one) in enumerate(itertools.product(*values.values())):
        if n % 5 == 4:
            continue
        ms: float | str = 1.0 + abs(a - 2) + b - 0.5 + (c == "x") + flag
        if a == 8:
            ms = "CompilationFailedConfig" if flag else "RuntimeFailedConfig"
        cache[f"{a},{b},{c},{flag},{one}"] = {"time": ms, "times": [ms] * 3}
    document = {"tune_params_keys": list(values), "tune_params": values, "cache": cache}
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "search_replay.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=120)


def test_a_space_is_replayed_to_exhaustion(tmp_path: Path) -> None:
    file, out = space_file(tmp_path / "tiny.json.gz"), tmp_path / "out"
    done = run(file, "--seeds", 2, "--budgets", "5,100", "--samplers", "mix,grid", "--json", "--out", out)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content == json.loads((out / "replay.json").read_text())
    assert "optuna" in content["versions"] and str(tmp_path) not in content["command"]
    assert [(row["sampler"], row["budget"]) for row in content["rows"]] == [
        ("mix", 5),
        ("mix", 100),
        ("grid", 5),
        ("grid", 100),
    ]
    for row in content["rows"]:
        assert row["seeds"] == row["finished"] == 2
        assert 1.0 <= row["mean"] <= row["worst"]

    grid = content["rows"][-1]
    assert grid["failures"] == 10  # of 12 points with a=8, 2 break the constraints
    assert all(row["mean"] == 1.0 == row["worst"] for row in content["rows"] if row["budget"] == 100)
    assert "| tiny | mix | 100 | 1.0000 |" in (out / "README.md").read_text()


def test_a_table_is_printed(tmp_path: Path) -> None:
    done = run(space_file(tmp_path / "tiny.json.gz"), "--seeds", 1, "--budgets", "10", "--samplers", "random")
    assert done.returncode == 0 and "| tiny | random | 10 |" in done.stdout


@pytest.mark.parametrize(
    "text", ["{}", "not json", '{"tune_params_keys": ["a"], "tune_params": {"a": [1]}, "cache": {}}']
)
def test_a_file_that_is_no_space_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.json"
    file.write_text(text)
    done = run(file)
    assert done.returncode == 2 and "broken.json" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_sampler_is_named(tmp_path: Path) -> None:
    done = run(space_file(tmp_path / "tiny.json.gz"), "--samplers", "annealing")
    assert done.returncode == 2 and "annealing" in done.stderr
