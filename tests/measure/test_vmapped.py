"""The torch.func form of deep memories computes what the eager path does: y and every gradient."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from mctune.core.errors import UsageError
from mctune.core.problem import AGGREGATIONS, RECURRENCES, STATE_INITS, Problem
from mctune.measure.vmapped import vmapped
from mctune.reference import error_ratio
from mctune.runtime.api.functional import memory_caching
from mctune.verify.inputs import make_inputs
from mctune.verify.passes import gradients

DEEP = [name for name, row in RECURRENCES.items() if row.deep]


def problem(**fields: Any) -> Problem:
    # Four segments in chunks of 4, 4 and 2 tokens, and one of 5; the last two have more cached states than ssc reads.
    shape = {"B": 2, "T": 45, "H": 2, "Dk": 8, "Dv": 8, "segment_length": 10, "inner_chunk": 4, "expansion": 2}
    return Problem(**{"recurrence": "dla", **shape, **fields})


@pytest.mark.parametrize(("recurrence", "aggregation", "state_init"), list(product(DEEP, AGGREGATIONS, STATE_INITS)))
def test_it_agrees_with_the_eager_path(recurrence: str, aggregation: str, state_init: str) -> None:
    case = problem(recurrence=recurrence, aggregation=aggregation, state_init=state_init)
    inputs = make_inputs(case, 0)
    eager = partial(memory_caching, backend="eager")
    with torch.no_grad():
        wanted = eager(**inputs.arguments(case))
        assert error_ratio(vmapped(**inputs.arguments(case)), wanted.double()) < 2e-6
    exact = gradients(eager, case, inputs, torch.float64)
    for name, found in gradients(vmapped, case, inputs, torch.float32).items():
        assert error_ratio(found, exact[name]) < 2e-5, name


@pytest.mark.parametrize("absent", [("g",), ("mu",), ("g", "mu"), ("g", "eta", "mu")])
@pytest.mark.parametrize("Dv", [8, 5])
def test_absent_gates_and_other_widths(absent: tuple[str, ...], Dv: int) -> None:
    case = problem(recurrence="titans", Dv=Dv)
    arguments = {n: x for n, x in make_inputs(case, 0).arguments(case).items() if n not in absent}
    with torch.no_grad():
        wanted = memory_caching(**arguments, backend="eager")
        assert error_ratio(vmapped(**arguments), wanted.double()) < 2e-6


def test_it_is_for_deep_memories_in_segments_of_one_length() -> None:
    for case in (problem(segmentation="packed", B=1), problem(segmentation="logarithmic", segment_length=None)):
        inputs = make_inputs(case, 0)
        with pytest.raises(UsageError, match=f"dla, {case.segmentation} segments"):
            vmapped(**{"segment_length": 10, **inputs.arguments(case)})
    inputs = make_inputs(problem(), 0)
    with pytest.raises(UsageError, match="linear"):
        vmapped(**{**inputs.arguments(problem()), "recurrence": "linear"})
