"""The rendered backward kernels, interpreted, against the oracle's autograd: odd sizes, poisoned memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from drawn import Drawn, draw, walk

from mctune.core.problem import Problem
from mctune.search.verify import run_kernel, tolerance, verify_case


def cases(problem: Problem) -> Iterator[Problem]:
    """Problems that one candidate serves, whatever segment length it was tuned at."""
    C = problem.segment_length
    assert C is not None
    yield problem.replace(B=1, T=2 * C + C // 2 + 1, H=1)
    yield problem.replace(B=2, T=38, H=1, segment_length=5)
    yield problem.replace(B=1, T=C + 9, H=1, segmentation="packed", segment_length=11)


@pytest.mark.parametrize("one", draw("backward"), ids=str)
def test_agrees_with_the_oracle(one: Drawn, tmp_path: Path) -> None:
    kernel = one.kernel(tmp_path)
    for seed, problem in enumerate(cases(one.problem)):
        error = verify_case(partial(run_kernel, kernel), problem, seed)
        assert error <= tolerance(problem), f"{problem} with {one.config}"


@pytest.mark.parametrize("formulation", ["per_segment", "grouped"])
@pytest.mark.parametrize(("recurrence", "dtype"), [("linear", "float16"), ("swla", "float32")])
def test_formulations_agree_with_the_oracle(recurrence: str, dtype: str, formulation: str, tmp_path: Path) -> None:
    problem = Problem(
        recurrence=recurrence, aggregation="ssc", state_init="checkpoint", pass_="backward", T=100, H=1, Dk=20, Dv=33,
        segment_length=40, dtype=dtype, top_k=3,
    )  # fmt: skip
    config = walk(random.Random(2), problem, formulation=formulation)
    kernel = Drawn(problem, config).kernel(tmp_path)
    for seed, case in enumerate((problem, problem.replace(B=2, T=78, segment_length=4))):
        error = verify_case(partial(run_kernel, kernel), case, seed)
        assert error <= tolerance(case), f"{case} with {config}"
