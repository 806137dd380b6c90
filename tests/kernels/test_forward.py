"""Every combination of the forward pass, compiled, against the oracle on odd sizes of every segmentation."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from fences import judged as judged_whole
from fences import y_of

from mctune.core.problem import STATE_INITS, Problem
from mctune.reference import error_ratio
from mctune.runtime.kernels.tvm.matrix.forward import TvmForward
from mctune.verify.decided import choice_gap
from mctune.verify.inputs import Inputs, make_inputs
from mctune.verify.judge import poisoned_memory
from mctune.verify.passes import PASSES
from tests.draw import DISTINCT, RECURRENCES, SPACES, Wanted, formulations, wanted

DRAWN = wanted("forward")
TOLERANCE = 2e-5


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
    yield sized(2, (2 if C <= 100 else 1) * C + C // 2 + 1, 3, **ssc(1)), None
    # Segments shorter than a chunk, more of them than ssc reads or than a panel or a score tile holds.
    yield sized(2, 150, 2, segment_length=13, **ssc(3)), None
    yield sized(1, 40, 1, segment_length=1, **ssc(100)), None
    for B, T, H in ((1, 1, 1), (2, 37, 3), (1, 127, 1)):
        yield sized(B, T, H, segmentation="logarithmic", segment_length=None, **ssc(2)), None
    packed = {"segmentation": "packed"}
    yield sized(1, 1, 1, **packed), [0, 1]
    yield sized(1, C + 29, 1, **packed, **ssc(1)), [0, 0, 5, 5, C + 28, C + 29, C + 29]
    yield sized(1, 90, 3, **packed | {"segment_length": 7}, **ssc(4)), [0, 1, 1, 60, 66, 90]


def judged(problem: Problem, bounds: list[int] | None, seed: int) -> tuple[Inputs, torch.Tensor]:
    """Inputs, and the oracle's y for them."""
    if bounds is None:
        return judged_whole(problem, seed)
    while True:
        inputs = replace(make_inputs(problem, seed), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        if problem.aggregation != "ssc" or choice_gap(problem, inputs) > 1e-5:
            return inputs, PASSES["forward"].expected(problem, inputs)["y"]
        seed += 1


@pytest.mark.parametrize("one", DRAWN)
def test_kernel_agrees_with_the_oracle(one: Wanted, build: Callable[..., TvmForward], scratch: ctypes.CDLL) -> None:
    kernel = build(one.problem, one.config, one.target)
    for seed, (problem, bounds) in enumerate(cases(one.problem)):
        inputs, reference = judged(problem, bounds, seed)
        with poisoned_memory():
            y = y_of(kernel, problem, inputs)
        assert y.shape == reference.shape and y.dtype == torch.float32 and y.is_contiguous()
        assert error_ratio(y, reference) <= TOLERANCE, f"{problem} {bounds} with {one.config}"
    assert scratch.mctune_test_overruns() == 0
    assert scratch.mctune_test_callers() > 0, "the kernel did not use the tests' scratch memory"


def test_every_combination_and_formulation_is_compiled() -> None:
    drawn = {d.combination for d in DRAWN if d.problem.aggregation != "soup"}
    assert drawn == set(product(RECURRENCES, DISTINCT, STATE_INITS))
    used = {(d.problem.aggregation, d.config["formulation"]) for d in DRAWN}
    for aggregation in DISTINCT:
        some = formulations("forward", aggregation)
        assert len(some) >= 2 and {(aggregation, formulation) for formulation in some} <= used


def test_configurations_are_spread_over_the_space() -> None:
    space = SPACES["forward"]
    for param in space.params:
        used = {d.config[param.name] for d in DRAWN}
        for value in set(param.values) - used:
            # Only what no drawn problem allows is missing (64 columns, where registers are short).
            changed = [(d, d.config.replace(**{param.name: value})) for d in DRAWN]
            assert not any(space.valid(config, d.problem, d.target) for d, config in changed), (param.name, value)
    assert all(space.valid(d.config, d.problem, d.target) for d in DRAWN)
    assert any(d.config["formulation"] == "gated" and d.config.integer("panel") > 1 for d in DRAWN)
