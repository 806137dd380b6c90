"""Candidates that fail in every way there is, as compiled kernels in a worker process; and timing and judging."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mctune.backends import get_backend
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Crashed, FailedBuild, Outcome, Predicted, Timed, Wrong, from_json
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.measure import timing
from mctune.measure.timing import summary, time_rotated
from mctune.reference import error_ratio
from mctune.verify import judge as verify
from mctune.verify.decided import choice_gap
from mctune.verify.inputs import Inputs, make_inputs, odd_problems
from mctune.verify.judge import judge, poisoned_memory
from mctune.workers.payload import first_line
from mctune.workers.worker import Worker, WorkerDied, WorkerTimedOut

PLANTED = Path(__file__).parent.parent / "planted"
PROBLEM = Problem(aggregation="residual", T=1024, H=1, Dk=16, Dv=16, segment_length=32)
SSC = Problem(aggregation="ssc", T=150, H=2, Dk=8, Dv=8, segment_length=20, top_k=2)
LIMIT_S = 300.0


@pytest.fixture(scope="module")
def folder(kernel_folder: Path) -> Iterator[Path]:
    """Where candidates are compiled; the planted backend can be imported, by the workers too."""
    planted = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(PLANTED.glob("*.py")))).hexdigest()[:16]
    folder = kernel_folder / f"planted-{planted}"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLANTED))
        yield folder


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[Worker]:
    setup = {
        "backend": "faulty_backend:FaultyBackend", "target": "cpu", "folder": str(folder), "seed": 0,
        "threads": min(2, os.cpu_count() or 1),
    }  # fmt: skip
    with Worker("mctune.workers.evaluate:start", setup) as running:
        yield running


def candidate(fault: str) -> dict[str, Any]:
    return {"problem": PROBLEM.to_dict(), "config": {"fault": fault}}


def evaluate(worker: Worker, fault: str, limit_s: float = LIMIT_S) -> Outcome | WorkerDied | WorkerTimedOut:
    reply = worker.call({"evaluate": candidate(fault)}, limit_s)
    return from_json(reply["outcome"]) if isinstance(reply, dict) else reply


def build_here(fault: str, folder: Path) -> None:
    """Compile a candidate, so that a worker's short limit is spent on running it."""
    backend = get_backend("faulty_backend:FaultyBackend")
    backend.build(PROBLEM, Config.of({"fault": fault}), resolve("cpu")[0], folder)


def assert_the_search_goes_on(worker: Worker) -> None:
    outcome = evaluate(worker, "none")
    assert isinstance(outcome, Timed), outcome
    assert 0 < outcome.low <= outcome.ms <= outcome.high and outcome.repeats >= 3
    assert 0 < outcome.error < 1e-6


def test_a_build_that_fails(worker: Worker) -> None:
    outcome = evaluate(worker, "build")
    assert isinstance(outcome, FailedBuild)
    assert "Failed to vectorize loop with extent tokens" in outcome.message and "\n" not in outcome.message
    assert evaluate(worker, "build_raises") == FailedBuild("ValueError: refuses this")
    assert_the_search_goes_on(worker)


@pytest.mark.parametrize(
    ("fault", "error", "case"),
    [
        # Off by 1e-4 everywhere; each segment forgets the ones before it; the last token is never written, so NaN.
        ("off", 1e-4, "B1 T1 H1"),
        ("forgets", 0.9, "B2 T177 H3"),
        ("unwritten", float("inf"), "B1 T31 H1"),
    ],
)
def test_a_result_that_is_wrong(fault: str, error: float, case: str, worker: Worker) -> None:
    outcome = evaluate(worker, fault)
    assert isinstance(outcome, Wrong)
    assert outcome.error == pytest.approx(error, rel=0.05) and outcome.tolerance == 2e-5
    assert case in outcome.case
    assert_the_search_goes_on(worker)


def test_a_kernel_that_refuses(worker: Worker) -> None:
    assert evaluate(worker, "raise") == Crashed("RuntimeError: planted: refused by the kernel")
    assert_the_search_goes_on(worker)


@pytest.mark.parametrize(
    ("fault", "signal", "stage"),
    [("abort", "SIGABRT", "verify"), ("wild", "SIGSEGV", "verify"), ("build_aborts", "SIGABRT", "build")],
)
def test_a_crash_takes_only_the_worker_along(fault: str, signal: str, stage: str, worker: Worker) -> None:
    evaluate(worker, "none")
    started = worker.started
    died = evaluate(worker, fault)
    assert isinstance(died, WorkerDied), died
    assert signal in died.message and died.stage == stage
    assert_the_search_goes_on(worker)
    # It was in a process of its own.
    assert worker.started == started


@pytest.mark.alone
@pytest.mark.parametrize(
    ("fault", "limit_s", "stage"), [("hang", 6.0, "verify"), ("hang_late", 12.0, "time"), ("build_hangs", 2.0, "build")]
)
def test_a_hang_is_ended(fault: str, limit_s: float, stage: str, worker: Worker, folder: Path) -> None:
    """Slow by the limits: a candidate must get as far as it hangs, verifying after imports, timing after verifying."""
    if fault != "build_hangs":
        build_here(fault, folder)
    began = time.monotonic()
    assert_the_search_goes_on(worker)
    lead = time.monotonic() - began
    assert evaluate(worker, fault, limit_s) == WorkerTimedOut(limit_s, stage)
    assert time.monotonic() - began - lead < limit_s + 5
    assert_the_search_goes_on(worker)


@pytest.mark.alone
def test_finalists_are_timed_side_by_side(worker: Worker) -> None:
    ratios = []
    # The same loop twice. A machine with much else to do can hold up every sample of one of them, but not every time.
    while not any(0.2 < ratio < 5 for ratio in ratios):
        reply = worker.call({"compare": [candidate("none"), candidate("off"), candidate("none")]}, LIMIT_S)
        assert isinstance(reply, dict)
        one, wrong, other = reply["samples"]
        assert len(one) == len(other) >= 3 and min(one + other) > 0
        # One that is wrong has no time.
        assert wrong == [] and "wrong: error 1.00e-04" in reply["failures"][0]
        ratios.append(min(one) / min(other))
        assert len(ratios) < 10, ratios


def test_what_is_timed_beside_another_says_at_what_pace_the_machine_was(worker: Worker) -> None:
    """Of what took a millionth of its time at first: no machine is that busy."""
    beside = {"config": {"fault": "none"}, "ms": 1e-9}
    reply = worker.call({"evaluate": candidate("none") | {"beside": beside}}, LIMIT_S)
    assert isinstance(reply, dict)
    outcome = from_json(reply["outcome"])
    assert isinstance(outcome, Timed) and outcome.repeats >= 3
    assert outcome.pace > 1e4 and outcome.ms > 1e-4
    alone = evaluate(worker, "none")
    assert isinstance(alone, Timed) and alone.pace == 1.0


def test_what_ships_is_verified_again(worker: Worker) -> None:
    reply = worker.call({"ship": candidate("none"), "portable_arch": "x86-64-v3"}, LIMIT_S)
    assert isinstance(reply, dict)
    assert Path(reply["library"]).is_file() and Path(reply["source"]).is_file()
    assert Path(reply["portable"]).is_file() and "x86-64-v3" in reply["portable"]
    assert len(reply["errors"]) == 2 and max(reply["errors"]) < 1e-6
    assert any("T177" in case for case in reply["cases"])
    died = worker.call({"ship": candidate("forgets"), "portable_arch": "x86-64-v3"}, LIMIT_S)
    assert isinstance(died, WorkerDied) and died.stage == "verify"
    assert "wrong: error" in died.message and "fault=forgets" in died.message


def test_what_was_held_to_everything_ships_as_it_is(worker: Worker) -> None:
    """Just those files: a verdict on others, here of the same name, is none on these."""
    checked = worker.call({"check": candidate("none")}, LIMIT_S)
    assert isinstance(checked, dict) and isinstance(from_json(checked["outcome"]), Predicted)
    ((digest, error),) = checked["held"].items()
    known = {digest: error + 1.0}
    reply = worker.call({"ship": candidate("none"), "portable_arch": None, "held": known}, LIMIT_S)
    assert isinstance(reply, dict) and reply["errors"] == [error + 1.0]
    other = digest[::-1]
    reply = worker.call({"ship": candidate("none"), "portable_arch": None, "held": {other: 1.0}}, LIMIT_S)
    assert isinstance(reply, dict) and reply["errors"] == [error]
    wrong = worker.call({"check": candidate("forgets")}, LIMIT_S)
    assert isinstance(wrong, dict) and isinstance(from_json(wrong["outcome"]), Wrong) and "held" not in wrong


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("at 3:4:\n  x = y\nno such thing\n", "no such thing"),
        (
            "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported late\n"
            "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n",
            "CUDA error: an illegal memory access was encountered",
        ),
        (
            "PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas info    : (C7514) slow\n"
            "ptxas fatal   : (C7602) no room\nptxas fatal   : Ptx assembly aborted\n\nRepro command: ptxas -v x.ptx\n",
            "ptxas fatal   : (C7602) no room",
        ),
        (
            "Triton Error [CUDA]: an illegal memory access was encountered",
            "Triton Error [CUDA]: an illegal memory access",
        ),
        ("", ""),
    ],
)
def test_the_line_that_tells_most(text: str, line: str) -> None:
    assert first_line(RuntimeError(text)).startswith(f"RuntimeError: {line}" if line else "RuntimeError")


def test_a_backend_is_named_by_module_and_attribute(folder: Path) -> None:
    assert get_backend("faulty_backend:FaultyBackend").name == "faulty"
    assert get_backend("tvm").name == "tvm"
    with pytest.raises(UsageError, match=r"unknown backend 'cuda'; there are tvm, tvm.gpu, triton, or give"):
        get_backend("cuda")


def test_rounds_are_rotated_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 1 << 10)
    monkeypatch.setattr(timing, "_flush", lambda scratch: calls.append("flush"))
    functions = [lambda name=name: calls.append(name) for name in "abc"]
    samples = time_rotated(functions, rounds=4, warmup=2)
    assert [len(one) for one in samples] == [4, 4, 4]
    assert "".join(calls[:6]) == "aabbcc"
    assert calls[6::2] == ["flush"] * 12
    assert "".join(calls[7::2]) == "abc" + "bca" + "cab" + "abc"


@pytest.mark.alone
def test_timing_stops_after_whole_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 1 << 10)
    samples = time_rotated([lambda: None, lambda: None], rounds=100, limit_s=0.0)
    assert [len(one) for one in samples] == [3, 3]
    (slept,) = time_rotated([lambda: time.sleep(0.02)], rounds=3)
    assert 20 <= min(slept) and statistics.median(slept) < 200


def test_the_cache_is_flushed_in_place() -> None:
    scratch = torch.zeros(8)
    timing._flush(scratch)
    assert scratch.tolist() == [1.0] * 8
    sums = torch.zeros(2)
    timing._flush_by_reading(scratch.view(2, 4), sums)
    assert scratch.tolist() == [1.0] * 8 and sums.tolist() == [4.0] * 2
    # Larger than any last-level cache that a laptop or a slice of a server has.
    assert timing._FLUSH_BYTES >= 64 << 20


def test_summary() -> None:
    assert summary([5.0]) == (5.0, 5.0, 5.0)
    assert summary([4.0, 1.0, 100.0, 3.0, 2.0, 5.0]) == (3.5, 2.0, 5.0)


def test_near_ties_of_ssc_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def tied(problem: Problem, seed: int) -> Inputs:
        """Two segments with the same descriptor up to rounding, on the first two seeds."""
        drawn.append(seed)
        inputs = make_inputs(problem, seed)
        if seed < 9:
            k = inputs.k.clone()
            k[:, 20:40] = k[:, :20] * (1 + 1e-7)
            # Every other segment has a smaller weight than these two.
            k[:, 40:] = -100 * k[:, :20].mean(1, keepdim=True) if seed == 7 else k[:, :20].repeat(1, 6, 1, 1)[:, :110]
            return replace(inputs, k=k)
        return inputs

    monkeypatch.setattr(verify, "make_inputs", tied)
    inputs = judge(SSC.replace(top_k=1), 7).inputs
    assert drawn == [7, 8, *range(9, drawn[-1] + 1)] and drawn[-1] >= 9
    assert torch.equal(inputs.k, make_inputs(SSC, drawn[-1]).k)
    drawn.clear()
    judge(PROBLEM.replace(T=50), 7)
    assert drawn == [7]


def test_the_choice_gap_is_that_of_the_nearest_decision() -> None:
    inputs = make_inputs(SSC, 3)
    gaps = []
    for t in range(60, 150):
        past = t // 20
        p = inputs.k.double()[:, : past * 20].view(1, past, 20, 2, 8).mean(2)
        for head in range(2):
            logits = sorted((p[0, :, head] @ inputs.u[0, t, head].double()).tolist(), reverse=True)
            gaps.append(logits[1] - logits[2])
    assert choice_gap(SSC, inputs) == pytest.approx(min(gaps), rel=1e-6)
    # Where every segment is read there is nothing to decide.
    assert choice_gap(SSC.replace(top_k=7), inputs) == float("inf")


def test_judging_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        case = judge(SSC, 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    reference = case.wanted["y"]
    assert reference.dtype == torch.float64 and reference.shape == case.inputs.v.shape
    assert error_ratio(reference.float(), reference) < 1e-7


def test_memory_is_poisoned_inside_only() -> None:
    with poisoned_memory():
        assert bool(torch.empty(100).isnan().all()) and bool(torch.ones(1).new_empty(5, 3).isnan().all())
        assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), poisoned_memory():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("segmentation", ("constant", "logarithmic", "packed"))
def test_odd_problems_cover_the_edges(segmentation: str) -> None:
    C = None if segmentation == "logarithmic" else 128
    problem = Problem(
        aggregation="ssc", top_k=4, segmentation=segmentation, T=4096, H=8, Dk=16, Dv=48, segment_length=C
    )
    one, short, many = odd_problems(problem)
    assert many.B * many.H > 4
    assert (one.B, one.T, one.H) == (1, 1, 1)
    assert short.T == (C or 32) - 1 and short.segment_length == C
    whole = odd_problems(problem.replace(segment_length=C and 4096))[1]
    assert whole.T == (1023 if C else 31)
    assert C is None or many.T % 64 != 0
    assert C is None or many.T // 64 > problem.top_k + 1  # type: ignore[operator]
    assert {(case.Dk, case.Dv, case.top_k, case.segmentation) for case in (one, short, many)} == {
        (16, 48, 4, segmentation)
    }


def test_inputs_are_fresh_and_repeatable() -> None:
    packed = Problem(recurrence="swla", segmentation="packed", T=50, H=2, Dk=4, Dv=6, segment_length=8, dtype="float16")
    a, again, b = make_inputs(packed, 1), make_inputs(packed, 1), make_inputs(packed, 2)
    for name in "qkvu":
        assert torch.equal(getattr(a, name), getattr(again, name)) and getattr(a, name).dtype == torch.float16
        assert not torch.equal(getattr(a, name), getattr(b, name))
    assert set(a.gates) == {"g", "beta", "lam"} and float(a.gates["g"].max()) <= 0
    assert all(gate.dtype == torch.float32 for gate in a.gates.values())
    assert a.cu_seqlens is not None and a.cu_seqlens[0] == 0 and a.cu_seqlens[-1] == 50
    assert bool((a.cu_seqlens.diff() >= 0).all()) and a.cu_seqlens.dtype == torch.int32
