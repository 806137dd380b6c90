"""The rendered forward kernels, interpreted, against the oracle: odd sizes of every segmentation, poisoned memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from drawn import Drawn, draw, walk

from mctune.core.problem import Problem
from mctune.search.verify import run_kernel, tolerance, verify_case

DRAWN = draw("forward")


def cases(problem: Problem) -> Iterator[Problem]:
    """Problems that one candidate serves, whatever segment length it was tuned at."""
    C = problem.segment_length
    assert C is not None
    yield problem.replace(B=1, T=1, H=1)
    yield problem.replace(B=2, T=C + C // 2 + 1, H=2)
    # More and shorter segments than a tile of logits has, and than ssc reads.
    yield problem.replace(B=1, T=74, H=1, segment_length=4)
    yield problem.replace(B=1, T=45, H=1, segmentation="logarithmic", segment_length=None)
    yield problem.replace(B=1, T=3 * C + 7, H=1, segmentation="packed")


@pytest.mark.parametrize("one", DRAWN, ids=str)
def test_agrees_with_the_oracle(one: Drawn, tmp_path: Path) -> None:
    kernel = one.kernel(tmp_path)
    for seed, problem in enumerate(cases(one.problem)):
        error = verify_case(partial(run_kernel, kernel), problem, seed)
        assert error <= tolerance(problem), f"{problem} with {one.config}"


@pytest.mark.parametrize(
    ("aggregation", "formulation", "gates"),
    [
        *product(("grm",), ("per_segment", "gated"), ("precomputed", "fused")),
        *product(("ssc",), ("per_segment", "gated", "grouped"), ("precomputed",)),
    ],
)
@pytest.mark.parametrize(("recurrence", "dtype"), [("linear", "float16"), ("swla", "float32")])
def test_formulations_agree_with_the_oracle(
    recurrence: str, dtype: str, aggregation: str, formulation: str, gates: str, tmp_path: Path
) -> None:
    problem = Problem(
        recurrence=recurrence, aggregation=aggregation, T=100, H=1, Dk=20, Dv=33, segment_length=40, dtype=dtype,
        top_k=3 if aggregation == "ssc" else None,
    )  # fmt: skip
    config = walk(random.Random(2), problem, formulation=formulation, gates=gates)
    kernel = Drawn(problem, config).kernel(tmp_path)
    for seed, case in enumerate((problem, problem.replace(T=80, segment_length=4))):
        error = verify_case(partial(run_kernel, kernel), case, seed)
        assert error <= tolerance(case), f"{case} with {config}"
