"""Hold a kernel to the float64 oracle: fresh random inputs, odd sizes, outputs and scratch poisoned with NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mctune.backends.protocol import Kernel
from mctune.core.outcome import Wrong
from mctune.core.problem import Problem
from mctune.reference import error_ratio, memory_caching, segment_states
from mctune.runtime.segments import make_segments
from mctune.search.inputs import Inputs, make_inputs, odd_problems

TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""Largest RMS(difference) / RMS(reference) of a right result, by dtype of the problem."""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN: what a kernel does not write, or reads too early, shows in the result."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (  # type: ignore[attr-defined]
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        True,
    )
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before)


def expected(problem: Problem, inputs: Inputs) -> torch.Tensor:
    """The oracle's y, float64 ``[B, T, H, Dv]``."""
    with torch.no_grad():
        y: torch.Tensor = memory_caching(**inputs.arguments(problem))
    return y


def judged_inputs(problem: Problem, seed: int) -> tuple[Inputs, torch.Tensor]:
    """Random inputs that float32 can be judged on, and the oracle's y for them; one thread, the oracle's work is small.

    ssc's choice is discontinuous: where two logits at its edge are closer than float32 rounding, a right kernel may
    read the other segment. Such inputs are drawn again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inputs = make_inputs(problem, seed)
        while problem.aggregation == "ssc" and _choice_gap(problem, inputs) < 1e-5:
            seed += 1
            inputs = make_inputs(problem, seed)
        return inputs, expected(problem, inputs)
    finally:
        torch.set_num_threads(threads)


def _choice_gap(problem: Problem, inputs: Inputs) -> float:
    """The smallest difference between the last logit that ssc chooses and the first that it leaves."""
    segments = make_segments(problem.T, problem.segmentation, problem.segment_length or 1, inputs.cu_seqlens)
    assert problem.top_k is not None
    with torch.no_grad():
        arguments = inputs.arguments(problem)
        absent = ("q", "u", "aggregation", "top_k")
        _, p = segment_states(**{name: value for name, value in arguments.items() if name not in absent})
        gap = float("inf")
        for number, (begin, end, first) in enumerate(segments.spans):
            if number - first > problem.top_k:
                u = inputs.u[:, begin:end].double()
                logits = torch.einsum("bthd,bnhd->bthn", u, p[:, first:number]).sort(dim=-1, descending=True).values
                gap = min(gap, float((logits[..., problem.top_k - 1] - logits[..., problem.top_k]).min()))
    return gap


def run_kernel(kernel: Kernel, problem: Problem, inputs: Inputs) -> torch.Tensor:
    """y of a compiled candidate."""
    segments = make_segments(problem.T, problem.segmentation, problem.segment_length or 1, inputs.cu_seqlens)
    return kernel(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.u,
        g=inputs.gates.get("g"),
        beta=inputs.gates.get("beta"),
        lam=inputs.gates.get("lam"),
        scale=problem.Dk**-0.5,
        top_k=problem.top_k or 1,
        segments=segments,
    )


Run = Callable[[Problem, Inputs], torch.Tensor]
"""What is held to the oracle: y ``[B, T, H, Dv]`` of a problem's inputs."""


def verify_case(run: Run, problem: Problem, seed: int) -> float:
    """The error of one run on fresh random inputs: RMS(difference) / RMS(reference), inf for NaN or a wrong shape."""
    inputs, reference = judged_inputs(problem, seed)
    with poisoned_memory():
        y = run(problem, inputs)
    return error_ratio(y, reference)


def verify(run: Run, problem: Problem, seed: int) -> float | Wrong:
    """The largest error over the odd relatives of ``problem``, or what was wrong with the first that failed."""
    worst = 0.0
    for number, case in enumerate(odd_problems(problem)):
        error = verify_case(run, case, seed + 1000 * number)
        if not error <= TOLERANCE[problem.dtype]:
            return Wrong(error, TOLERANCE[problem.dtype], str(case))
        worst = max(worst, error)
    return worst
