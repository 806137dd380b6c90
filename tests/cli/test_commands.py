"""targets, spaces, report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mctune.core.target import targets
from mctune.core.workload import workload_names
from mctune.runtime.kernels.support import SERVED


def test_targets(run: Callable[..., object]) -> None:
    text, data = run("targets"), json.loads(run("targets", "--json").out)
    assert [line.split()[0] for line in text.out.splitlines()[1:]] == [target.name for target in targets()]
    assert [target["name"] for target in data] == [target.name for target in targets()]
    t4 = next(line for line in text.out.splitlines() if line.startswith("t4"))
    assert "1.27?" in t4 and "sm_75" in t4
    assert "?" in text.err


def test_targets_say_what_compiles_for_them(run: Callable[..., object]) -> None:
    ran, data = run("targets"), {target["name"]: target for target in json.loads(run("targets", "--json").out)}
    assert data["cpu"]["backend"] == "tvm" and data["h100-sxm"]["backend"] == "triton, tvm"
    assert data["t4"]["backend"] == data["v100"]["backend"] == "tvm"
    assert not {name for name, target in data.items() if target["backend"] is None}
    lines = {line.split()[0]: line for line in ran.out.splitlines()[1:]}
    assert " tvm " in lines["v100"] and " triton " in lines["mi300x"] and "tvm" not in lines["mi300x"]
    assert "kernels by triton, tvm" in run("targets", "a100").out


def test_one_target_by_its_alias(run: Callable[..., object]) -> None:
    ran = run("targets", "A100")
    assert ran.code == 0 and ran.out.startswith("a100-80g: ")
    assert "A100 means a100-80g" in ran.err
    assert "calibrate on the device (unsure)" in ran.out
    data = json.loads(run("targets", "a100", "--json").out)
    assert data["shared_bytes"] == 166912 and data["sources"]["dram_gbs"]


def test_the_cpu_target_names_its_lanes(run: Callable[..., object]) -> None:
    assert "float32 lanes" in run("targets", "cpu").out


def test_spaces(run: Callable[..., object]) -> None:
    text, data = run("spaces").out, json.loads(run("spaces", "--json").out)
    assert [space["name"] for space in data["spaces"]] == sorted(
        f"{row.maker.replace('.', '/')}/{row.family}/{pass_}" for row in SERVED for pass_ in row.passes
    )
    assert tuple(workload["name"] for workload in data["workloads"]) == workload_names()
    assert "tvm/matrix/forward" in text and "quick" in text


def test_one_space_in_full(run: Callable[..., object]) -> None:
    text, data = run("spaces", "tvm/forward").out, json.loads(run("spaces", "tvm/forward", "--json").out)
    (space,) = data["spaces"]
    assert not data["workloads"]
    assert all(parameter["name"] in text and parameter["values"] for parameter in space["params"])
    assert all(constraint["reason"] in text for constraint in space["constraints"])
    assert set(space["default"]) == {parameter["name"] for parameter in space["params"]}


def test_one_workload_in_full(run: Callable[..., object]) -> None:
    text = run("spaces", "quick").out
    assert "forward linear grm constant independent B1 T4096 H4 D64 C64,128,256,512 float32" in text
    (workload,) = json.loads(run("spaces", "quick", "--json").out)["workloads"]
    assert len(workload["cases"]) == 6


def test_an_unknown_space(run: Callable[..., object]) -> None:
    ran = run("spaces", "tvm/backwards")
    assert ran.code == 2 and "tvm/matrix/forward" in ran.err


@pytest.fixture
def package(tmp_path: Path) -> Path:
    entry = {
        "problem": {"T": 64, "H": 1, "Dk": 8, "Dv": 8, "segment_length": 16},
        "config": {"BT": 8},
        "backend": "tvm",
        "outcome": {"kind": "timed", "ms": 1.5, "low": 1.0, "high": 2.0, "repeats": 3, "error": 1e-7},
    }
    table = {"schema": 1, "target": {"name": "cpu"}, "versions": {"torch": "2"}, "entries": [entry]}
    (tmp_path / "tuned.json").write_text(json.dumps(table))
    return tmp_path


def test_report(run: Callable[..., object], package: Path) -> None:
    out = package / "results"
    ran = run("report", str(package), "--out", str(out), "--json")
    assert ran.code == 0
    assert json.loads(ran.out) == [{"folder": str(out / "cpu"), "rows": 1}]
    assert {path.name for path in (out / "cpu").iterdir()} == {
        "rows.csv",
        "environment.json",
        "README.md",
        "tuned.json",
    }


def test_report_of_nothing(run: Callable[..., object], tmp_path: Path) -> None:
    assert run("report").code == 2
    ran = run("report", str(tmp_path / "absent.json"))
    assert ran.code == 2 and "does not exist" in ran.err
