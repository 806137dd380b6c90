"""benchmarks/search_replay.py on a tiny measured space."""

from __future__ import annotations

import gzip
import itertools
import json
import re
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


def test_a_replay_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    file, out = space_file(tmp_path / "tiny.json.gz"), tmp_path / "out"
    arguments = (file, "--budgets", "10,30", "--out", out, "--samplers")
    assert run(*arguments, "mix,random", "--seeds", 1).returncode == 0
    first = (out / "runs.jsonl").read_text().splitlines()
    done = run(*arguments, "mix,random@10x1,optuna.samplers:BruteForceSampler@30x2", "--seeds", 3, "--json")
    assert done.returncode == 0, done.stderr
    lines = (out / "runs.jsonl").read_text().splitlines()
    assert lines[:2] == first and len(lines) == 2 + 2 + 1 + 2
    rows = {(row["sampler"], row["budget"]): row for row in json.loads(done.stdout)["rows"]}
    assert {key: row["seeds"] for key, row in rows.items()} == {
        ("mix", 10): 3, ("mix", 30): 3, ("random", 10): 1,
        ("optuna.samplers:BruteForceSampler", 10): 2, ("optuna.samplers:BruteForceSampler", 30): 2,
    }  # fmt: skip
    table = (out / "README.md").read_text()
    assert re.search(r"BruteForceSampler \| 30 \| \S+ \| \S+ \| [+-]\S+ ± \S+ \|", table)


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
    done = run(space_file(tmp_path / "tiny.json.gz"), "--samplers", "mix@many")
    assert done.returncode == 2 and "'mix@many': write NAME, NAME@EVALUATIONS" in done.stderr


def pass_file(path: Path) -> Path:
    """Two operations with 16 points each that were measured side by side; the best of both were never together."""
    values: dict[str, list[Any]] = {
        name: [1, 2, 4, 8] for name in ("read_rows", "read_cols", "write_rows", "write_cols")
    }
    points = list(itertools.product([1, 2, 4, 8], repeat=2))
    cache: dict[str, Any] = {}
    for (a, b), (c, d) in zip(points, points[5:] + points[:5], strict=True):
        parts = {"read": 1.0 + abs(a - 4) + abs(b - 2), "write": 2.0 + abs(c - 2) + abs(d - 8)}
        cache[f"{a},{b},{c},{d}"] = {"time": sum(parts.values()) + 0.5, "parts": parts}
    blocks = {name: {"operations": [name], "params": [f"{name}_rows", f"{name}_cols"]} for name in ("read", "write")}
    document = {"tune_params_keys": list(values), "tune_params": values, "cache": cache, "blocks": blocks}
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    return path


def test_a_pass_that_was_measured_by_operation_is_all_that_they_make_together(tmp_path: Path) -> None:
    file = pass_file(tmp_path / "pass.json.gz")
    done = run(file, f"{file}#write", "--seeds", 2, "--budgets", "12,16", "--samplers", "chain,mix", "--json")
    assert done.returncode == 0, done.stderr
    rows = {(row["space"], row["sampler"], row["budget"]): row for row in json.loads(done.stdout)["rows"]}
    assert {space for space, _, _ in rows} == {"pass", "pass#write"}
    # 256 points, of which 16 were measured: the optimum is 3.5 ms.
    assert all(row["worst"] < 4 for row in rows.values())
    assert rows["pass", "chain", 16]["mean"] <= rows["pass", "mix", 16]["mean"]
    assert rows["pass#write", "mix", 16]["optimum_found"] == 2
    assert "has no block 'gone'; it has read, write" in run(f"{file}#gone", "--seeds", 1).stderr
