"""The read whose sum is in units of the latest gate, interpreted, where gates differ by more than float32 holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from holding import TARGET
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mctune.backends import get_backend
from mctune.backends.protocol import Kernel
from mctune.core.problem import Problem
from mctune.reference import memory_caching
from mctune.verify.inputs import Inputs, make_inputs
from mctune.verify.judge import poisoned_memory, tolerance
from mctune.verify.passes import PASSES

C = SEGMENTS = 16
ORDERS = 4
GRM = Problem(T=C * SEGMENTS - 1, H=1, Dk=16, Dv=16, segment_length=C, aggregation="grm", dtype="float32")
SSC = GRM.replace(recurrence="swla", aggregation="ssc", top_k=3, state_init="checkpoint", dtype="float16")
UP = list(range(SEGMENTS))
ZIGZAG = [i // 2 if i % 2 else SEGMENTS - 1 - i // 2 for i in UP]


@pytest.fixture(scope="module", params=[GRM, SSC], ids=["grm", "ssc"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, Kernel]:
    problem, backend = request.param, get_backend("triton")
    space = backend.space(problem)
    valid = (config for one in (space.default, *space.fallbacks) if (config := one.replace(formulation="scaled")))
    config = next(config for config in valid if space.valid(config, problem, TARGET))
    made = backend.build(problem, config, TARGET, tmp_path_factory.mktemp("scaled"))
    return problem, backend.load(problem, config, made)


def leveled(problem: Problem, orders: list[list[int]], gaps: list[float], sizes: list[float]) -> Inputs:
    """Inputs whose logits are the segments' ranks in an order, times a gap; each token of a segment has its own two.

    Values of a segment are of a size; q does not see what makes the logits.
    """
    inputs = make_inputs(problem, seed=1)
    number, place = torch.arange(problem.T) // C, torch.arange(problem.T) % C
    k, q, u = inputs.k.clone(), inputs.q.clone(), torch.zeros_like(inputs.u)
    k[0, :, 0, :ORDERS] = torch.tensor(orders, dtype=k.dtype).T[number]
    q[..., :ORDERS] = 0.0
    u[0, torch.arange(problem.T), 0, place % ORDERS] = torch.tensor(gaps, dtype=u.dtype)[place // ORDERS]
    v = inputs.v * torch.tensor(sizes, dtype=k.dtype)[number][None, :, None, None]
    return replace(inputs, q=q, k=k, u=u, v=v)


def run(kernel: Kernel, problem: Problem, inputs: Inputs) -> torch.Tensor:
    with poisoned_memory():
        return PASSES["forward"].run(kernel, problem, inputs)["y"]


@given(
    orders=st.lists(st.permutations(UP), min_size=ORDERS, max_size=ORDERS),
    gaps=st.permutations([-300.0, -5.0, 0.25, 60.0]),
    sizes=st.lists(st.sampled_from([1.0, 32.0]), min_size=SEGMENTS, max_size=SEGMENTS),
)
@example(
    orders=[UP, ZIGZAG, ZIGZAG[::-1], [0, SEGMENTS - 1, *range(1, SEGMENTS - 1)]],
    gaps=[-300.0, 300.0, 40.0, 6.0],
    sizes=[1.0] * SEGMENTS,
)
@settings(max_examples=3)
def test_gates_of_any_ratio(
    built: tuple[Problem, Kernel], orders: list[list[int]], gaps: list[float], sizes: list[float]
) -> None:
    """Every token by itself, so that no large one hides a small one."""
    problem, kernel = built
    inputs = leveled(problem, orders, gaps, sizes)
    wanted = memory_caching(**inputs.arguments(problem))
    error = (run(kernel, problem, inputs).double() - wanted).square().mean(-1).sqrt()
    # Logits are rounded to float32: gates are as far off as the greatest.
    rounding = SEGMENTS * max(map(abs, gaps)) * 2.0**-22
    assert float((error / wanted.square().mean(-1).sqrt()).max()) <= 3 * tolerance(problem) + rounding


def test_a_logit_that_is_no_number_shows(built: tuple[Problem, Kernel]) -> None:
    problem, kernel = built
    inputs = leveled(problem, [UP] * ORDERS, [1.0] * ORDERS, [1.0] * SEGMENTS)
    inputs.u[:, [5, 2 * C + 7]] = float("nan")
    y = run(kernel, problem, inputs)
    assert y.isnan().all(-1).nonzero()[:, 1].tolist() == y.isnan().any(-1).nonzero()[:, 1].tolist() == [5, 2 * C + 7]
