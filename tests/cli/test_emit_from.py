"""``mctune emit --from``: a package from a table of what was tuned, without any study."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mctune.backends import get_backend
from mctune.core.config import Config
from mctune.core.environment import environment
from mctune.core.known import Tuned
from mctune.core.outcome import Outcome, Predicted, Timed, kind
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.study.tabled import tabled

SMALL = Problem(T=64, H=1, Dk=16, Dv=16, segment_length=32)
CPU = resolve("cpu")[0]


def default(problem: Problem) -> Config:
    space = get_backend("tvm").space(problem)
    found = space.first_valid(lambda config: space.valid(config, problem, CPU))
    assert found is not None
    return found.replace(segment_length=problem.segment_length or 0)


def timed(ms: float) -> Timed:
    return Timed(ms, ms, ms, 7, 1e-7)


def entry(problem: Problem, config: Config, outcome: Outcome, backend: str = "tvm") -> dict[str, Any]:
    told = {"kind": kind(outcome), **vars(outcome)}
    return {"problem": problem.to_dict(), "config": config.to_dict(), "backend": backend, "outcome": told}


def table(path: Path, *entries: dict[str, Any], **target: Any) -> Path:
    made_with = environment(CPU)
    about = {"schema": 1, "target": {**made_with["target"], **target}, "versions": made_with["versions"]}
    path.write_text(json.dumps({**about, "entries": entries}))
    return path


def test_a_table_becomes_a_package_whose_kernels_were_verified(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = SMALL.replace(segment_length=64)
    broken = default(SMALL.replace(segment_length=16)).replace(chunk=10**6)
    file = table(
        tmp_path / "tuned.json",
        entry(SMALL, default(SMALL), timed(1.0)),
        entry(longer, default(longer), timed(2.0)),
        entry(SMALL.replace(segment_length=16), broken, timed(3.0)),
        entry(SMALL.replace(segment_length=8), default(SMALL), Predicted(0.1, "model"), backend="triton"),
    )
    out = tmp_path / "from_table"
    ran = run("emit", "--from", str(file), "--out", str(out), "--json")
    assert ran.code == 0, ran.err
    # What breaks a constraint today, and what no backend here serves, is left out by name.
    assert "cannot ship forward linear grm constant independent B1 T64 H1 D16 C16" in ran.err
    assert "left out: forward linear grm constant independent B1 T64 H1 D16 C8 float32 by triton" in ran.err
    entries = json.loads((out / "tuned.json").read_text())["entries"]
    assert [(one["problem"]["segment_length"], one["outcome"]["ms"], one["recommended"]) for one in entries] == [
        (32, 1.0, True), (64, 2.0, False)
    ]  # fmt: skip
    assert all(one["verified"]["error"] <= one["verified"]["tolerance"] for one in entries)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        package = importlib.import_module("from_table")
        q, k, v, u = (torch.randn(1, 64, 1, 16) for _ in range(4))
        y = package.memory_caching(q, k, v, u, segment_length=32)
        torch.testing.assert_close(y, package.memory_caching(q, k, v, u, segment_length=32, backend="eager"))
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "from_table"]:
            del sys.modules[name]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--gpu", "h100"), 2, "was tuned for cpu, not h100-sxm: `mctune search --gpu h100-sxm --from"),
        (("--workload", "quick"), 2, "--from and --workload exclude each other"),
        (("--segment-lengths", "64"), 2, "--from and --segment-lengths exclude each other"),
        (("--max-slowdown", "0.5"), 2, "max_slowdown=0.5"),
        ((), 4, "nothing in"),
    ],
)
def test_what_a_table_cannot_be_emitted_as(
    run: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    served = entry(SMALL, default(SMALL), timed(1.0), backend="tvm" if arguments else "triton")
    file = table(tmp_path / "tuned.json", served)
    ran = run("emit", "--from", str(file), "--out", str(tmp_path / "out_of_it"), *arguments)
    assert (ran.code, message in ran.err) == (code, True), ran.err
    assert "Traceback" not in ran.err and not (tmp_path / "out_of_it").exists()


def test_another_cpu_is_told_of(run: Callable[..., Any], tmp_path: Path) -> None:
    file = table(
        tmp_path / "tuned.json", entry(SMALL, default(SMALL), timed(1.0), "triton"), title="Old CPU", arch="v0"
    )
    ran = run("emit", "--from", str(file), "--out", str(tmp_path / "elsewhere"))
    assert "the times are of Old CPU (v0), and this is" in ran.err


def test_a_bench_output_is_no_table(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps({"rows": [], "environment": environment(CPU)}))
    ran = run("emit", "--from", str(tmp_path / "bench.json"))
    assert ran.code == 2 and "is no tuned table" in ran.err


def test_segment_lengths_of_a_problem_are_one_study_and_measured_apart_from_predicted() -> None:
    gpu = resolve("h100")[0]
    at = SMALL.replace(dtype="bfloat16", Dk=64, Dv=64)
    config = Config.of({"n": 1})
    entries = [
        Tuned(at.replace(segment_length=length), config.replace(n=n), backend, outcome)
        for n, (length, backend, outcome) in enumerate(
            [
                (64, "triton", timed(2.0)), (32, "triton", timed(1.0)), (32, "triton", timed(0.5)),
                (32, "triton", Predicted(0.1, "m")), (32, "tvm", Predicted(0.2, "m")),
            ]
        )
    ]  # fmt: skip
    report, left_out = tabled(gpu, Path("out"), entries, 1.1)
    assert not left_out
    told = [
        (study.maker, [(p.problem.segment_length, p.outcome.ms) for p in study.frontier]) for study in report.studies
    ]
    assert told == [("triton", [(32, 0.5), (64, 2.0)]), ("triton", [(32, 0.1)]), ("tvm.gpu", [(32, 0.2)])]
    assert report.studies[0].recommended == report.studies[0].frontier[0]
    assert report.studies[0].case.segment_lengths == (32, 64)


def test_a_table_becomes_a_repository_for_the_kernels_library(run: Callable[..., Any], tmp_path: Path) -> None:
    file, out = table(tmp_path / "tuned.json", entry(SMALL, default(SMALL), timed(1.0))), tmp_path / "memory-cache"
    emit = ("emit", "--format", "hf-kernels", "--from", str(file), "--out")
    ran = run(*emit, str(tmp_path / "Memory_Cache"))
    assert ran.code == 2 and "the folder's name is the kernel's" in ran.err and "Traceback" not in ran.err
    ran = run(*emit, str(out), "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["package"] == json.loads(ran.out)["out"] == str(out)
    assert {path.name for path in out.iterdir()} == {"README.md", "benchmarks", "build"}
    (tuned,) = out.glob("build/*x86_64-linux/tuned/*.json")
    (found,) = json.loads(tuned.read_text())["entries"]
    assert found["verified"]["error"] <= found["verified"]["tolerance"] and found["outcome"]["ms"] == 1.0
