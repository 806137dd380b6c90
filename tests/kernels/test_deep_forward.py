"""The forward pass of deep memories, compiled, against the oracle on odd sizes of every segmentation.

A few combinations are compiled in every run (half a minute the first time), the others in the slow one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from deep_cases import cases, judged

from mctune.core.problem import AGGREGATIONS, Problem
from mctune.reference import error_ratio, memory_caching
from mctune.runtime.errors import KernelError
from mctune.runtime.kernels.tvm.deep.forward import TvmDeepForward
from mctune.runtime.segments import make_segments
from mctune.verify.inputs import make_inputs
from mctune.verify.judge import poisoned_memory, run_kernel
from mctune.verify.passes import options
from tests import draw_deep as drawn
from tests.draw import host

TOLERANCE = 2e-5

Build = Callable[..., TvmDeepForward]


@pytest.mark.parametrize("one", drawn.parameters("forward"))
def test_kernel_agrees_with_the_oracle(one: drawn.Wanted, build: Build, scratch: ctypes.CDLL) -> None:
    kernel = build(one.problem, one.config, one.target)
    for seed, case in enumerate(cases(one.problem)):
        inputs, right = judged(case, seed)
        with poisoned_memory():
            found = run_kernel(kernel, case.problem, inputs)
        assert found["y"].dtype == torch.float32 and found["y"].is_contiguous()
        # What is kept, too.
        assert set(found) == set(right) or case.problem.segmentation == "logarithmic"
        for name, x in found.items():
            assert x.shape == right[name].shape
            assert error_ratio(x, right[name]) <= TOLERANCE, f"{name} of {case} with {one.config}"
    assert scratch.mctune_test_overruns() == 0
    assert scratch.mctune_test_callers() > 0, "the kernel did not use the tests' scratch memory"


@pytest.mark.parametrize("residual", (False, True))
def test_the_residual_is_chosen_by_the_call(residual: bool, build: Build) -> None:
    one = drawn.wanted_for("forward", "titans", "soup", "independent")
    assert one.problem.Dk == one.problem.Dv
    problem = one.problem.replace(T=41, segment_length=12, inner_chunk=5)
    kernel, inputs = build(one.problem, one.config, one.target), make_inputs(problem, 3)
    named = options(problem, inputs) | {"memory_residual": residual}
    segments = make_segments(problem.T, "constant", 12)
    y = kernel(inputs.q, inputs.k, inputs.v, inputs.u, **named, segments=segments).y
    wanted = memory_caching(**inputs.arguments(problem) | {"memory_residual": residual})
    assert error_ratio(y, wanted) <= TOLERANCE


@pytest.mark.parametrize("strength", (4.0, float("inf")))
@pytest.mark.parametrize(("aggregation", "state_init"), (("grm", "independent"), ("residual", "checkpoint")))
def test_strong_decays(aggregation: str, state_init: str, strength: float, build: Build) -> None:
    """Memories that forget nearly all at every token, or all of it at some."""
    one = drawn.wanted_for("forward", "titans", aggregation, state_init)
    problem = one.problem.replace(T=50, H=2, segment_length=20, inner_chunk=8)
    kernel, inputs = build(one.problem, one.config, one.target), make_inputs(problem, 0)
    if strength == float("inf"):
        inputs.gates["g"][:, ::7] = -strength
    else:
        inputs.gates["g"].sub_(strength)
    y = run_kernel(kernel, problem, inputs)["y"]
    assert error_ratio(y, memory_caching(**inputs.arguments(problem))) <= TOLERANCE


def test_ties_go_to_the_earlier_segment(build: Build) -> None:
    """Every segment has the same keys, hence the same descriptor; their values differ."""
    one = drawn.wanted_for("forward", "titans", "ssc", "checkpoint")
    problem = one.problem.replace(T=50, segment_length=10, top_k=2)
    kernel, inputs = build(one.problem, one.config, one.target), make_inputs(problem, 7)
    inputs = replace(inputs, k=torch.cat([inputs.k[:, :10]] * 5, 1).contiguous())
    y = run_kernel(kernel, problem, inputs)["y"]
    assert error_ratio(y, memory_caching(**inputs.arguments(problem))) <= TOLERANCE


def test_the_number_of_threads_changes_nothing(build: Build) -> None:
    before = torch.get_num_threads()
    for combination in (("titans", "soup", "independent"), ("titans", "ssc", "checkpoint")):
        one, results = drawn.wanted_for("forward", *combination), []
        problem = one.problem.replace(B=2, H=3, T=70, segment_length=11)
        kernel, inputs = build(one.problem, one.config, one.target, fenced=False), make_inputs(problem, 4)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results += [run_kernel(kernel, problem, inputs)["y"] for _ in range(2)]
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(results[0], y) for y in results)


@pytest.mark.parametrize(("T", "C", "B", "H"), ((2**27, 2**27, 1, 1), (2**13, 1, 2, 2**8)), ids=("tokens", "states"))
def test_indices_beyond_32_bits_are_refused(T: int, C: int, B: int, H: int, build: Build) -> None:
    one = drawn.wanted_for("forward", "titans", "soup", "independent")
    p, kernel, nothing = one.problem, build(one.problem, one.config, one.target), torch.zeros(1, 1, 1, 1)
    keys = nothing.expand(B, T, H, p.Dk)
    layers = {"W_up": nothing[0].expand(H, p.Dk, p.E), "W_down": nothing[0].expand(H, p.E, p.Dv)}
    with pytest.raises(KernelError, match=r"elements exceeds 2\^31 - 1; split the batch"):
        kernel(
            keys, keys, keys, keys, g=None, eta=None, mu=None, **layers, memory_residual=True, inner_chunk=8,
            scale=1.0, top_k=1, segments=make_segments(T, "constant", C),
        )  # fmt: skip


def test_every_combination_is_compiled() -> None:
    drawn.hold_combinations("forward")


def test_configurations_are_spread_over_the_space() -> None:
    drawn.hold_spread("forward")


@pytest.mark.parametrize("pass_", drawn.SPACES)
def test_some_default_is_valid_everywhere(pass_: str) -> None:
    space = drawn.SPACES[pass_]
    for aggregation, width, segment_length in product(AGGREGATIONS, (7, 16, 48, 64, 128), (1, 24, 256)):
        problem = Problem(
            pass_=pass_, recurrence="titans", aggregation=aggregation, T=512, H=1, Dk=width, Dv=width,
            segment_length=segment_length, expansion=1 if width == 48 else 4,
        )  # fmt: skip
        for floats in (8, 16):
            target = replace(host(), vector_floats=floats)
            assert space.first_valid(lambda c, p=problem, t=target: space.valid(c, p, t)) is not None
