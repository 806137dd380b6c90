"""A measured search of a GPU: candidates are compiled and judged side by side, and timed one at a time elsewhere.

The process that times runs Triton's interpreter here, where there may be no GPU.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mctune.backends.presence import Seen, here
from mctune.core.outcome import FailedBuild, Predicted, Timed, TooLarge, Wrong, from_json, to_json
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.core.workload import Case
from mctune.study.events import SearchRequest
from mctune.study.run import at_work
from mctune.verify.spread import walk
from mctune.workers import pool as module
from mctune.workers.pool import Workers
from mctune.workers.worker import WorkerDied

TARGET, _ = resolve("rtx3090")
PROBLEM = Problem(aggregation="mean", T=64, H=1, Dk=20, Dv=33, segment_length=32, dtype="float16")
CONFIG = walk(random.Random(0), PROBLEM, TARGET)
LIMIT_S = 240.0


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(module, "usable_cores", lambda: 3)
    request = SearchRequest(target=TARGET, cases=(Case(PROBLEM, (32,)),), out=tmp_path, trials=1, measure=True)
    with at_work(request) as running:
        running.prepare()
        yield running


def test_what_does_not_compile_never_reaches_the_device(workers: Workers) -> None:
    assert workers.count == 2 and workers._device is not None
    wide = PROBLEM.replace(Dk=256, Dv=256, T=4096, segment_length=256, dtype="bfloat16")
    big = walk(random.Random(0), wide, TARGET).replace(
        piece=256, read_BT=128, read_BV=128, read_num_warps=8, read_num_stages=4
    )
    reply = workers.evaluate({"problem": wide.to_dict(), "config": big.to_dict()}, LIMIT_S)
    assert isinstance(reply, dict)
    outcome = from_json(reply["outcome"])
    assert isinstance(outcome, TooLarge) and "a block has 101376" in outcome.message
    reply = workers.evaluate({"problem": PROBLEM.to_dict(), "config": CONFIG.replace(piece=512).to_dict()}, LIMIT_S)
    assert isinstance(reply, dict) and isinstance(from_json(reply["outcome"]), FailedBuild)
    assert workers._device.started == 0


def test_what_compiles_is_timed_on_what_was_judged(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = workers.evaluate({"problem": PROBLEM.to_dict(), "config": CONFIG.to_dict()}, LIMIT_S)
    assert isinstance(reply, dict)
    outcome = from_json(reply["outcome"])
    assert isinstance(outcome, Timed) and outcome.ms > 0 and 0 < outcome.error < 2e-3
    # Inputs and the oracle's results come from the other process.
    assert workers._device is not None and workers._device.started == 1
    died = workers._device.call(
        {"evaluate": {"problem": PROBLEM.to_dict(), "config": CONFIG.to_dict()}, "prepared": "/nowhere.pt"}, LIMIT_S
    )
    assert isinstance(died, WorkerDied) and "No such file" in died.message and died.fault == "machine"


def test_what_the_compiler_says_stays_with_a_measured_candidate(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Predicted(1.0, "m", notes=("cached_kernel: C7515 serialized",))
    reply = {"outcome": to_json(said), "ready": True, "built": {}}
    monkeypatch.setattr(workers, "_compile", lambda payload, limit_s, until: reply)
    assert workers._device is not None
    for outcome in (Timed(2.0, 1.9, 2.1, 20, 1e-7), Wrong(0.5, 2e-5, "T=1")):
        answered = {"outcome": to_json(outcome)}
        monkeypatch.setattr(workers._device, "call", lambda payload, limit_s, answered=answered: answered)
        noted = workers.evaluate({"problem": {}, "config": {}}, LIMIT_S)
        assert isinstance(noted, dict)
        expected = replace(outcome, notes=said.notes) if isinstance(outcome, Timed) else outcome
        assert from_json(noted["outcome"]) == expected


def test_a_kernel_ships_after_it_was_judged_on_other_inputs(workers: Workers) -> None:
    reply = workers.ship({"problem": PROBLEM.to_dict(), "config": CONFIG.to_dict()}, None, LIMIT_S)
    assert isinstance(reply, dict) and 0 < reply["errors"][0] < 2e-3 and Path(reply["library"]).is_file()
    # It was built and judged in another process, and run in the one that times.
    assert workers._device is not None and workers._device.started == 1
    assert sum(worker.started for worker in workers._compilers) == 1
    refused = CONFIG.replace(piece=512).to_dict()
    died = workers.ship({"problem": PROBLEM.to_dict(), "config": refused}, None, LIMIT_S)
    assert isinstance(died, WorkerDied) and "failed to build" in died.message


def test_finalists_are_rendered_beside(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def call(payload: dict[str, Any], limit_s: float) -> dict[str, Any]:
        asked.append(payload)
        return {"samples": [[1.0], [2.0]], "failures": []}

    assert workers._device is not None
    monkeypatch.setattr(workers._device, "call", call)
    candidate = {"problem": PROBLEM.to_dict(), "config": CONFIG.to_dict()}
    assert workers.compare([candidate, candidate], LIMIT_S) == {"samples": [[1.0], [2.0]], "failures": []}
    assert all(Path(one["built"]["library"]).is_file() for one in asked[0]["compare"]) and len(asked[0]["compare"]) == 2
    refused = {"problem": PROBLEM.to_dict(), "config": CONFIG.replace(piece=512).to_dict()}
    assert isinstance(workers.compare([candidate, refused], LIMIT_S), WorkerDied) and len(asked) == 1


def test_nothing_is_evaluated_when_the_time_is_over(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = {"problem": PROBLEM.to_dict(), "config": CONFIG.to_dict()}
    assert workers.evaluate(candidate, LIMIT_S, time.monotonic()) is None
    assert all(worker.started == 0 for worker in workers._compilers)
    # A running process gets a little more time, then is killed.
    monkeypatch.setattr(module, "_GRACE_S", 0.0)
    assert workers.evaluate(candidate, LIMIT_S, time.monotonic() + 0.1) is None
    assert workers._device is not None and workers._device.started == 0


def test_the_processes_outlive_the_threads_of_a_batch(workers: Workers) -> None:
    refused = {"problem": PROBLEM.to_dict(), "config": CONFIG.replace(piece=512).to_dict()}
    for _ in range(2):
        with ThreadPoolExecutor(workers.count) as pool:
            list(pool.map(lambda _: workers.evaluate(refused, LIMIT_S), range(workers.count)))
        time.sleep(0.2)
    assert [worker.started for worker in workers._compilers] == [1, 1]


def test_triton_keeps_what_it_compiles_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = SearchRequest(target=TARGET, cases=(Case(PROBLEM, (32,)),), out=tmp_path, trials=1, measure=True)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    own = str((tmp_path / "search" / "triton").resolve())
    assert {worker._env["TRITON_CACHE_DIR"] for worker in at_work(request)._compilers} == {own}
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert {worker._env["TRITON_CACHE_DIR"] for worker in at_work(request)._compilers} == {"/elsewhere"}


@pytest.mark.parametrize(
    ("name", "cores", "target"),
    [
        ("NVIDIA H100 80GB HBM3", 132, "h100-sxm"),
        ("NVIDIA H100 PCIe", 114, "h100-pcie"),
        ("NVIDIA H200", 132, "h200"),
        ("NVIDIA A100-SXM4-80GB", 108, "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", 108, "a100-40g"),
        ("NVIDIA L40S", 142, "l40s"),
        ("NVIDIA L4", 58, "l4"),
        ("NVIDIA GeForce RTX 4090", 128, "rtx4090"),
        ("AMD Instinct MI300X", 304, "mi300x"),
        ("Tesla V100-SXM2-16GB", 80, "v100"),
        ("Tesla T4", 40, "t4"),
        ("NVIDIA B300", 160, None),
    ],
)
def test_a_gpu_is_known_by_its_name_and_its_multiprocessors(name: str, cores: int, target: str | None) -> None:
    found = here(Seen(name, cores))
    assert (found and found.name) == target


def test_without_a_gpu_there_is_none() -> None:
    assert here(None) is None
