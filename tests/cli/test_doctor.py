"""Each check against an installation where it fails, and what the command makes of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mctune.cli import _checks
from mctune.cli._checks import BAD, OK, WARN
from mctune.core.environment import TVM_PAIR
from mctune.runtime.kernels.tvm import loader as tvm_loader

GOOD = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1", "torch": "2.13.0+cpu", "triton": "3.7.1"}


def test_the_pins_agree_with_the_constraints_and_the_shipped_runtime() -> None:
    pins = (Path(__file__).resolve().parents[2] / "constraints.txt").read_text().splitlines()
    assert f"apache-tvm=={TVM_PAIR[0]}" in pins and f"apache-tvm-ffi=={TVM_PAIR[1]}" in pins
    assert TVM_PAIR[1] == tvm_loader.FFI_VERSION


@pytest.mark.parametrize(
    ("changes", "statuses", "remedy"),
    [
        ({}, [OK, OK], ""),
        ({"apache-tvm-ffi": "0.1.15"}, [BAD, OK], "pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1"),
        ({"apache-tvm": "0.28.0"}, [WARN, OK], "tested only with 0.27.0.post1"),
        ({"triton": "3.6.0"}, [OK, WARN], "torch 2.13.0+cpu is built for triton 3.7"),
        ({"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.3.5"}, [OK, OK], ""),
        (
            {"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.4.0"},
            [OK, OK, WARN],
            "numpy 2.4.0; pip install 'numpy<2.4'",
        ),
        ({"numpy": "2.5.2"}, [OK, OK], ""),
        ({"torch": "3.0", "triton": "9.9"}, [OK, OK], ""),
        ({"apache-tvm": None, "triton": None}, [], ""),
    ],
)
def test_pairs(changes: dict[str, str | None], statuses: list[str], remedy: str) -> None:
    checks = list(_checks.check_pairs({**GOOD, **changes}))
    assert [check.status for check in checks] == statuses
    assert remedy in " ".join(check.remedy for check in checks)
    assert all(check.remedy for check in checks if check.status != OK)


def test_packages() -> None:
    found = {check.name: check for check in _checks.check_packages({**GOOD, "optuna": None, "triton": None})}
    assert found["torch"].status == OK and found["torch"].found == "2.13.0+cpu"
    assert found["optuna"].status == BAD and "pip install optuna" in found["optuna"].remedy
    assert found["triton"].status == OK and "optional" in found["triton"].found


def test_python() -> None:
    assert [_checks.check_python(v).status for v in ((3, 9, 1), (3, 10, 0), (3, 13, 2), (3, 14, 0))] == [
        WARN, OK, OK, WARN,
    ]  # fmt: skip


def tool(folder: Path, name: str, script: str = "") -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    bare = list(_checks.check_compilers({}))
    assert [check.status for check in bare] == [BAD, BAD]
    assert "apt-get install gcc" in bare[0].remedy and "CXX" in bare[1].remedy
    gcc, odd = tool(tmp_path, "gcc"), tool(tmp_path, "odd")
    found = list(_checks.check_compilers({"CXX": "odd -m64"}))
    assert [(check.status, check.found) for check in found] == [(OK, str(gcc)), (OK, str(odd))]
    assert next(_checks.check_compilers({"CC": "absent"})).status == BAD


def test_gpus_are_what_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin:/usr/bin")
    tool(tmp_path, "nvidia-smi", "echo 'NVIDIA H200'; echo 'NVIDIA L4'")
    assert _checks.nvidia_gpus() == ["NVIDIA H200", "NVIDIA L4"]
    assert [check.found for check in _checks.check_gpus()][:2] == ["NVIDIA H200", "NVIDIA L4"]
    tool(tmp_path, "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert _checks.nvidia_gpus() == []


def test_hazards_of_triton_matter_where_there_is_a_gpu_that_has_them() -> None:
    for gpus, status in ((["NVIDIA H200"], WARN), (["NVIDIA L4"], OK), ([], OK)):
        found = {check.name: check for check in _checks.check_hazards("3.6.0", gpus)}
        assert {check.status for check in found.values()} == {status} and len(found) >= 5
        wait = found["triton: wgmma wait"]
        assert "mended in 3.9" in wait.found and ("triton #11047" in wait.remedy) == (status == WARN)
    assert "triton: wgmma wait" not in {check.name for check in _checks.check_hazards("3.9.0", ["NVIDIA H100 PCIe"])}
    assert not list(_checks.check_hazards(None, ["NVIDIA H200"]))


def test_threads() -> None:
    found = {
        check.name: check
        for check in _checks.check_threads({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "2", "TVM_BIND_THREADS": "1"}, 2)
    }
    assert found["OMP_NUM_THREADS"].status == WARN and "2 cores" in found["OMP_NUM_THREADS"].remedy
    assert found["MKL_NUM_THREADS"].status == found["TVM_NUM_THREADS"].status == OK
    assert found["TVM_BIND_THREADS"].status == WARN
    unset = list(_checks.check_threads({}, 2))
    assert all(check.status == OK for check in unset)


def test_the_command_here(run: Callable[..., object]) -> None:
    ran, data = run("doctor"), json.loads(run("doctor", "--json").out)
    assert ran.code == 0 and data["usable"] is True
    assert [check["name"] for check in data["checks"]] == [line.split("  ")[0] for line in ran.out.splitlines()[1:]]


def test_the_command_where_something_is_missing(run: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "version", lambda package: None if package == "optuna" else GOOD.get(package, "1"))
    ran = run("doctor")
    assert ran.code == 3
    assert "optuna: pip install optuna" in ran.err
    assert ran.err.splitlines()[-1].startswith("mctune: error: not usable as it is: optuna")
    assert json.loads(run("doctor", "--json").out)["usable"] is False
