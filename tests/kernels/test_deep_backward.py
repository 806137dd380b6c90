"""The backward pass of deep memories, compiled, against the oracle's autograd on odd sizes of all segmentations.

A kernel compiles for 6 to 13 s, so a few combinations are compiled in every run, the others in the slow one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from deep_cases import cases, judged

from mctune.core.problem import Problem
from mctune.reference import memory_caching
from mctune.runtime.kernels.kept import left_by
from mctune.runtime.kernels.tvm.deep.backward import TvmDeepBackward
from mctune.runtime.segments import make_segments
from mctune.verify.inputs import Inputs, make_inputs
from mctune.verify.judge import error_of, judge, poisoned_memory, run_kernel
from mctune.verify.passes import PASSES, Results, gradients, gradients_of, options
from tests import draw_deep as drawn

TOLERANCE = 5e-5
Build = Callable[..., TvmDeepBackward]


def hold(found: Results, wanted: Results, what: object) -> None:
    """Every gradient is right; u's may be the small difference of large numbers, in the eager path's float32 too."""
    assert set(found) == set(wanted)
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in found.values())
    error = error_of(found, wanted)
    assert error <= TOLERANCE, f"{error:.2g} off: {what}"


@pytest.mark.parametrize("one", drawn.parameters("backward"))
def test_kernels_agree_with_the_oracle(one: drawn.Wanted, build: Build, scratch: ctypes.CDLL) -> None:
    kernel = build(one.problem, one.config, one.target)
    for seed, case in enumerate(cases(one.problem)):
        inputs, wanted = judged(case, seed)
        with poisoned_memory():
            found = run_kernel(kernel, case.problem, inputs)
        hold(found, wanted, f"{case} with {one.config}")
    assert scratch.mctune_test_overruns() == 0
    assert scratch.mctune_test_callers() > 0, "the kernel did not use the tests' scratch memory"


def run(kernel: TvmDeepBackward, problem: Problem, inputs: Inputs, **changes: object) -> Results:
    """Gradients, with nothing kept and some options changed."""
    segments = make_segments(problem.T, "constant", problem.segment_length or 1)
    named = options(problem, inputs) | changes
    return gradients_of(kernel(inputs.dy, inputs.q, inputs.k, inputs.v, inputs.u, **named, segments=segments), inputs)


@pytest.mark.parametrize("residual", (False, True))
def test_the_residual_is_chosen_by_the_call(residual: bool, build: Build) -> None:
    one = drawn.wanted_for("backward", "titans", "grm", "independent")
    assert one.problem.Dk == one.problem.Dv
    problem = one.problem.replace(T=41, segment_length=12, inner_chunk=5)
    kernel, inputs = build(one.problem, one.config, one.target), make_inputs(problem, 3)

    def oracle(**arguments: object) -> torch.Tensor:
        return memory_caching(**arguments | {"memory_residual": residual})

    wanted = gradients(oracle, problem, inputs, torch.float64)
    hold(run(kernel, problem, inputs, memory_residual=residual), wanted, residual)


@pytest.mark.parametrize("strength", (4.0, float("inf")))
@pytest.mark.parametrize(("aggregation", "state_init"), (("grm", "independent"), ("ssc", "checkpoint")))
def test_strong_decays(aggregation: str, state_init: str, strength: float, build: Build) -> None:
    """Memories that forget nearly all at every token, or all of it at some."""
    one = drawn.wanted_for("backward", "titans", aggregation, state_init)
    problem = one.problem.replace(T=50, H=2, segment_length=20, inner_chunk=8)
    kernel, inputs = build(one.problem, one.config, one.target), make_inputs(problem, 0)
    if strength == float("inf"):
        inputs.gates["g"][:, ::7] = -strength
    else:
        inputs.gates["g"].sub_(strength)
    wanted = PASSES["backward"].expected(problem, inputs)
    # States come out alike, so gradients of the read's gates are differences of nearly equal numbers: they vanish.
    assert error_of(run_kernel(kernel, problem, inputs), wanted) <= TOLERANCE


@pytest.mark.parametrize(("recurrence", "aggregation"), (("titans", "grm"), ("dla", "soup")))
def test_what_is_kept_may_be_computed_again(recurrence: str, aggregation: str, build: Build) -> None:
    one = drawn.wanted_for("backward", recurrence, aggregation, "independent")
    problem = one.problem.replace(T=60, H=2, segment_length=22)
    kernel = build(one.problem, one.config, one.target)
    case = judge(problem, 0)
    for kernel.wants in ((left_by(problem.to_dict()),), (("up", "down", "means"),), ()):
        hold(run_kernel(kernel, problem, case.inputs), case.wanted, kernel.wants)


def test_the_number_of_threads_changes_nothing(build: Build) -> None:
    one, results = drawn.wanted_for("backward", "dla", "grm", "checkpoint"), []
    problem = one.problem.replace(B=2, H=3, T=50, segment_length=11)
    kernel, inputs = build(one.problem, one.config, one.target, fenced=False), make_inputs(problem, 4)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [run_kernel(kernel, problem, inputs) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], some[name]) for some in results for name in some)


def test_every_combination_is_compiled() -> None:
    drawn.hold_combinations("backward")
    few = drawn.ordinary("backward")
    assert {one.config["saved"] for one in few} == {"nothing", "states", "mixture"}
    assert len({one.config["groups"] for one in few}) > 2


def test_configurations_are_spread_over_the_space() -> None:
    drawn.hold_spread("backward")
