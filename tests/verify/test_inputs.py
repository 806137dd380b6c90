"""The inputs of verification."""

from __future__ import annotations

import pytest
import torch

from mctune.core.problem import RECURRENCES, Problem
from mctune.runtime.api.functional import memory_caching
from mctune.verify.inputs import make_inputs


@pytest.mark.parametrize("recurrence", [name for name, row in RECURRENCES.items() if row.deep])
@pytest.mark.parametrize("inner_chunk", [16, 64])
def test_deep_memories_do_not_diverge_at_full_size(recurrence: str, inner_chunk: int) -> None:
    """Where y grows without bound nothing can be compared: at first float32 and float64 part, then all is NaN."""
    problem = Problem(
        recurrence=recurrence, aggregation="residual", T=256, H=2, Dk=128, Dv=128, segment_length=256,
        inner_chunk=inner_chunk,
    )  # fmt: skip
    for seed in range(2):
        with torch.no_grad():
            y = memory_caching(**make_inputs(problem, seed).arguments(problem), backend="eager")
        assert y.norm(dim=-1).max() < 20
