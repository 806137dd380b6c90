"""The references of FlashInfer-Trace, run as they are written, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from mctune.core.errors import UsageError
from mctune.core.problem import Problem
from mctune.report.trace.definition import cached_and_filled, inputs_of, outputs_of
from mctune.report.trace.reference import reference
from mctune.runtime.traits import AGGREGATIONS, PASSES, RECURRENCES
from mctune.verify.inputs import Inputs
from mctune.verify.judge import decided_inputs
from mctune.verify.passes import PASSES as ORACLES
from mctune.verify.passes import memory_of

Tensor = torch.Tensor
MATRIX = [name for name, row in RECURRENCES.items() if not row.deep]
PROBLEMS = [
    Problem(
        recurrence=recurrence, aggregation=aggregation, segmentation=segmentation, state_init=state_init, pass_=pass_,
        B=2, T=23, H=2, Dk=4, Dv=6, segment_length=5 if segmentation == "constant" else None,
    )
    for recurrence, aggregation, state_init, pass_ in product(
        MATRIX, AGGREGATIONS, ("independent", "checkpoint"), PASSES
    )
    for segmentation in ("constant", *(("logarithmic",) if pass_ == "forward" else ()))
]  # fmt: skip


def run_of(problem: Problem) -> Callable[..., Any]:
    found: dict[str, Any] = {}
    exec(compile(reference(problem), "reference.py", "exec"), found)
    run: Callable[..., Any] = found["run"]
    return run


def given(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> list[Any]:
    """The inputs of a Definition, in its order."""
    named: dict[str, Any] = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "u": inputs.u, "dy": inputs.dy}
    named |= inputs.gates
    if problem.pass_ == "decode":
        memory, cached = memory_of(problem, inputs, problem.T - 1, torch.float64), cached_and_filled(problem)[0]
        named = {name: x[:, -1] for name, x in named.items()}
        named |= {name: getattr(memory, name) for name in ("key_sum", "last_key", "last_value")}
        named |= {"states": memory.states[0][:, :, :cached], "descriptors": memory.descriptors[:, :, :cached]}
        named |= {"online": memory.online[0], "filled": int(memory.filled[0])}
    return [named[name].to(dtype) if isinstance(named[name], Tensor) else named[name] for name in inputs_of(problem)]


def wanted(problem: Problem, inputs: Inputs) -> list[Tensor]:
    """The oracle's outputs, in the order of a Definition's; of a decode step y alone."""
    found = ORACLES["forward" if problem.pass_ == "decode" else problem.pass_].expected(problem, inputs)
    if problem.pass_ == "decode":
        return [found["y"][:, -1]]
    return [found[name] for name in outputs_of(problem)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_it_computes_what_the_oracle_does(problem: Problem) -> None:
    inputs = decided_inputs(problem, 0)
    found = run_of(problem)(*given(problem, inputs, torch.float64))
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == len(outputs_of(problem))
    for one, other in zip(found, wanted(problem, inputs), strict=False):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("filled", (0, 4))
@pytest.mark.parametrize("state_init", ("independent", "checkpoint"))
@pytest.mark.parametrize("recurrence", MATRIX)
def test_a_step_at_the_edge_of_a_segment(recurrence: str, state_init: str, filled: int) -> None:
    """The first token of a segment, whose memory is what the state's start says; and the last one, at its end."""
    problem = Problem(recurrence=recurrence, state_init=state_init, pass_="decode", T=16 + filled, H=2, Dk=4, Dv=6,
                      segment_length=5)  # fmt: skip
    inputs = decided_inputs(problem, 1)
    arguments = dict(zip(inputs_of(problem), given(problem, inputs, torch.float64), strict=True))
    assert arguments["filled"] == filled and arguments["states"].shape[2] == 3
    y, online = run_of(problem)(**arguments)
    torch.testing.assert_close(y, wanted(problem, inputs)[0], atol=1e-9, rtol=1e-9)
    after = memory_of(problem, inputs, problem.T, torch.float64)
    left = after.online[0] if filled + 1 < 5 else after.states[0][:, :, 3]
    torch.testing.assert_close(online, left, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_outputs_have_the_dtype_of_the_inputs(pass_: str, dtype: str) -> None:
    problem = Problem(pass_=pass_, T=12, H=2, Dk=4, Dv=4, segment_length=5, dtype=dtype)
    inputs = decided_inputs(problem, 0)
    kind = getattr(torch, dtype)
    found = run_of(problem)(*given(problem, inputs, kind))
    found = found if isinstance(found, tuple) else (found,)
    assert found[0].dtype == kind
    close = 1e-5 if dtype == "float32" else 2e-2
    for one, other in zip(found, wanted(problem, inputs), strict=False):
        torch.testing.assert_close(one.double(), other, atol=close * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recurrence": "dla", "Dv": 4}, "no reference is written for deep memories"),
        ({"segmentation": "packed", "B": 1}, "no reference is written for segmentation='packed'"),
    ],
)
def test_what_none_is_written_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reference(PROBLEMS[0].replace(**changes))
