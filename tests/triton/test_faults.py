"""Kernels that are wrong, touch what is not theirs, or never end, timed: on a GPU if there is one, else interpreted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mctune.backends.presence import here, seen
from mctune.core.outcome import Crashed, Outcome, Timed, TimedOut, Wrong
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.measure.clocks import read_clocks
from mctune.study.confirm import outcome_of
from mctune.verify.spread import walk
from mctune.workers.worker import Worker

PLANTED = Path(__file__).parent.parent / "planted"
GPU = here(seen())
TARGET = GPU or resolve("h200")[0]
LIMIT_S = 240.0
PROBLEM = Problem(aggregation="mean", T=64, H=1, Dk=16, Dv=16, segment_length=32, dtype="float16")
CONFIG = walk(random.Random(0), PROBLEM, TARGET)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLANTED))
        folder = tmp_path_factory.mktemp("candidates")
        setup = {
            "backend": "faulty_triton:FaultyBackend", "target": TARGET.name, "folder": str(folder), "seed": 0,
            "threads": 1,
        }  # fmt: skip
        env = {"TRITON_CACHE_DIR": str(folder / "triton"), **({} if GPU else {"TRITON_INTERPRET": "1"})}
        with Worker("mctune.workers.evaluate:start", setup, env=env) as running:
            yield running


def evaluate(worker: Worker, fault: str, limit_s: float = LIMIT_S) -> Outcome:
    candidate: dict[str, Any] = {"problem": PROBLEM.to_dict(), "config": CONFIG.replace(fault=fault).to_dict()}
    return outcome_of(worker.call({"evaluate": candidate}, limit_s))


def assert_the_device_is_usable(worker: Worker) -> None:
    outcome = evaluate(worker, "none")
    assert isinstance(outcome, Timed) and outcome.ms > 0 and 0 < outcome.error < 2e-3, outcome
    if GPU and read_clocks() is not None:
        assert outcome.sm_mhz and outcome.celsius


@pytest.mark.parametrize("fault", ["wrong", "unwritten"])
def test_a_wrong_kernel(worker: Worker, fault: str) -> None:
    outcome = evaluate(worker, fault)
    assert isinstance(outcome, Wrong) and not outcome.error <= outcome.tolerance
    assert_the_device_is_usable(worker)


def test_an_illegal_access(worker: Worker) -> None:
    started = worker.started
    outcome = evaluate(worker, "illegal")
    assert isinstance(outcome, Crashed) and "(verify)" in outcome.message
    assert ("illegal memory access" if GPU else "SIGSEGV") in outcome.message
    assert_the_device_is_usable(worker)
    assert worker.started > started


def test_an_endless_loop(worker: Worker) -> None:
    # Time for what comes before: imports, and on a GPU the compilation of every kernel.
    assert_the_device_is_usable(worker)
    assert evaluate(worker, "endless", 12.0) == TimedOut(12.0, "verify")
    assert_the_device_is_usable(worker)
