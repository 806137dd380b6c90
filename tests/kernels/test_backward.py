"""Every combination of the backward pass, compiled, against the oracle's autograd on odd sizes of all segmentations."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from mctune.core.problem import AGGREGATIONS, STATE_INITS, Problem
from mctune.reference import error_ratio
from mctune.runtime.kernels.tvm.matrix.backward import TvmBackward
from mctune.verify.decided import choice_gap
from mctune.verify.inputs import Inputs, make_inputs
from mctune.verify.judge import judge, poisoned_memory, run_kernel
from mctune.verify.passes import PASSES, Results
from tests.draw import DISTINCT, RECURRENCES, SPACES, Wanted, formulations, host, wanted, wanted_for

SPACE, DRAWN = SPACES["backward"], wanted("backward")
TOLERANCE = 5e-5
VANISHED = 1e-9
"""Gradients whose exact values are this small are zero: u's of one segment, the first token's beta and g."""

Build = Callable[..., TvmBackward]


def cases(problem: Problem) -> Iterator[tuple[Problem, list[int] | None]]:
    """Problems that one kernel serves, each with the bounds of its packed sequences."""
    C = problem.segment_length
    assert C is not None

    def sized(B: int, T: int, H: int, **changes: object) -> Problem:
        return problem.replace(B=B, T=T, H=H, **changes)

    def ssc(top_k: int) -> dict[str, int]:
        return {"top_k": top_k} if problem.aggregation == "ssc" else {}

    yield sized(1, 1, 1), None
    yield sized(1, C - 1, 1), None
    yield (sized(2, 2 * C + C // 2 + 1, 2, **ssc(1)) if C < 60 else sized(1, C + C // 2 + 1, 2)), None
    # Segments shorter than a chunk, more of them than ssc reads or than a panel or a score tile holds.
    yield sized(1, 120, 2, segment_length=13, **ssc(3)), None
    yield sized(1, 20, 1, segment_length=1, **ssc(100)), None
    yield sized(1, 1, 1, segmentation="logarithmic", segment_length=None), None
    yield sized(2, 55, 1, segmentation="logarithmic", segment_length=None, **ssc(2)), None
    packed = {"segmentation": "packed"}
    yield sized(1, C + 29, 1, **packed, **ssc(1)), [0, 0, 5, 5, C + 28, C + 29, C + 29]
    yield sized(1, 70, 3, **packed | {"segment_length": 7}, **ssc(4)), [0, 1, 1, 52, 58, 70]


def judged(problem: Problem, bounds: list[int] | None, seed: int) -> tuple[Inputs, Results]:
    """Inputs, and the oracle's gradients for them."""
    if bounds is None:
        case = judge(problem, seed)
        return case.inputs, case.wanted
    while True:
        inputs = replace(make_inputs(problem, seed), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        if problem.aggregation != "ssc" or choice_gap(problem, inputs) > 1e-5:
            return inputs, PASSES["backward"].expected(problem, inputs)
        seed += 1


def hold(found: Results, wanted: Results, what: object) -> None:
    """Every gradient is right."""
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert found[name].dtype == torch.float32 and found[name].is_contiguous()
        if bool((gradient.abs() < VANISHED).all()):
            assert found[name].shape == gradient.shape and bool((found[name].abs() < 1e-5).all()), (name, what)
        else:
            assert error_ratio(found[name], gradient) <= TOLERANCE, (name, what)


@pytest.mark.parametrize("one", DRAWN)
def test_kernels_agree_with_the_oracle(one: Wanted, build: Build, scratch: ctypes.CDLL) -> None:
    kernel = build(one.problem, one.config, one.target)
    for seed, (problem, bounds) in enumerate(cases(one.problem)):
        inputs, wanted = judged(problem, bounds, seed)
        with poisoned_memory():
            found = run_kernel(kernel, problem, inputs)
        hold(found, wanted, f"{problem} {bounds} with {one.config}")
    assert scratch.mctune_test_overruns() == 0
    assert scratch.mctune_test_callers() > 0, "the kernel did not use the tests' scratch memory"


@pytest.mark.parametrize("state_init", STATE_INITS)
@pytest.mark.parametrize("strength", (4.0, float("inf")))
def test_strong_decays(state_init: str, strength: float, build: Build) -> None:
    """Memories that forget nearly all at every token, or all of it at some."""
    one = wanted_for("backward", "swla", "grm", state_init)
    problem = one.problem.replace(T=75, H=2, segment_length=30)
    kernel = build(one.problem, one.config, one.target)
    inputs = make_inputs(problem, 0)
    g = inputs.gates["g"]
    if strength == float("inf"):
        g[:, ::7] = -strength
    else:
        g -= strength
    hold(run_kernel(kernel, problem, inputs), PASSES["backward"].expected(problem, inputs), (state_init, strength))


def test_states_may_be_kept_or_computed_again(build: Build) -> None:
    one = wanted_for("backward", "linear", "grm", "checkpoint")
    problem = one.problem.replace(T=100, H=2, segment_length=32)
    kernel = build(one.problem, one.config, one.target)
    case = judge(problem, 0)
    for kernel.wants in ((("states", "means"),), ()):
        hold(run_kernel(kernel, problem, case.inputs), case.wanted, kernel.wants)


def test_every_combination_and_formulation_is_compiled() -> None:
    for aggregation in DISTINCT:
        some = [d for d in DRAWN if d.problem.aggregation == aggregation]
        used = {(d.problem.recurrence, d.problem.state_init, d.config["formulation"]) for d in some}
        assert used == set(product(RECURRENCES, STATE_INITS, formulations("backward", aggregation)))
    assert set(SPACE.param("formulation").values) == {d.config["formulation"] for d in DRAWN}


def test_configurations_are_spread_over_the_space() -> None:
    for param in SPACE.params:
        used = {d.config[param.name] for d in DRAWN}
        for value in set(param.values) - used:
            # Only what no drawn problem allows is missing.
            changed = [(d, d.config.replace(**{param.name: value})) for d in DRAWN]
            assert not any(SPACE.valid(config, d.problem, d.target) for d, config in changed), (param.name, value)
    assert all(SPACE.valid(d.config, d.problem, d.target) for d in DRAWN)


def test_some_default_is_valid_everywhere() -> None:
    for aggregation, width, segment_length in product(AGGREGATIONS, (7, 16, 48, 64, 128), (1, 24, 256)):
        problem = Problem(
            pass_="backward", aggregation=aggregation, T=512, H=1, Dk=width, Dv=width, segment_length=segment_length
        )
        for floats in (8, 16):
            target = replace(host(), vector_floats=floats)
            assert SPACE.first_valid(lambda c, p=problem, t=target: SPACE.valid(c, p, t)) is not None
