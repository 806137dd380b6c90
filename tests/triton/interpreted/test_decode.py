"""The rendered decode step, interpreted, against the oracle: y, and the memory that it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from drawn import Drawn, draw

from mctune.core.problem import Problem
from mctune.search.verify import run_kernel, tolerance, verify_case


def cases(problem: Problem) -> Iterator[Problem]:
    """A first token; a block of tokens that ends several segments; more cached states than a tile holds."""
    yield problem.replace(B=1, T=1, H=1)
    yield problem.replace(B=2, T=11, H=1, segment_length=3)
    yield problem.replace(B=1, T=26, H=1, segment_length=2)


@pytest.mark.parametrize("one", draw("decode"), ids=str)
def test_agrees_with_the_oracle(one: Drawn, tmp_path: Path) -> None:
    kernel = one.kernel(tmp_path)
    for seed, problem in enumerate(cases(one.problem)):
        error = verify_case(partial(run_kernel, kernel), problem, seed)
        assert error <= tolerance(problem), f"{problem} with {one.config}"
