"""The rendered decode step, interpreted, against the oracle: y, and the memory that it leaves."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from holding import TARGET, drawn, every, hold

from mctune.backends import get_backend
from mctune.reference import memory_caching
from mctune.verify.judge import TOLERANCE, decided_inputs, error_of, poisoned_memory
from mctune.verify.passes import memory_of
from mctune.verify.spread import Drawn

ROUTED = [one for one in every("decode") if one.problem.aggregation in ("grm", "ssc") and not one.problem.deep]
"""The others' code is part of theirs."""


@pytest.mark.parametrize("one", drawn("decode"), ids=str)
def test_agrees_with_the_oracle(one: Drawn, tmp_path: Path) -> None:
    hold(one, tmp_path)


@pytest.mark.parametrize("one", ROUTED, ids=str)
def test_states_in_16_bits(one: Drawn, tmp_path: Path) -> None:
    """In float16, which numpy has: what float32 states give that are rounded after each launch, bit for bit."""
    backend = get_backend("triton")
    kernel = backend.load(one.problem, one.config, backend.build(one.problem, one.config, TARGET, tmp_path))
    problem = one.problem.replace(B=1, T=9, H=1, segment_length=3)
    inputs = decided_inputs(problem, 0)
    rounded, exact = memory_of(problem, inputs, 4), memory_of(problem, inputs, 4)
    rounded.states = (rounded.states[0].half(),)
    outputs = []
    # A token, one that ends a segment, and those of the next segment in blocks of what a launch takes.
    for begin, end in pairwise((4, 5, *range(6, 9, kernel.tokens), 9)):
        exact.states[0].copy_(exact.states[0].half())
        q, k, v, u = (x[:, begin:end].contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.u))
        gates = {name: inputs.gates.get(name) for name in ("g", "beta", "lam")}
        options = {
            **{name: None if gate is None else gate[:, begin:end].contiguous() for name, gate in gates.items()},
            "scale": problem.Dk**-0.5, "top_k": problem.top_k or 1, "segment_length": 3,
        }  # fmt: skip
        with poisoned_memory():
            y, wanted = (kernel(q, k, v, u, memory=memory, **options) for memory in (rounded, exact))
        assert torch.equal(y, wanted)
        outputs.append(y)
        for memory in (rounded, exact):
            memory.advance(end - begin, 3)
    for (name, store), (_, other) in zip(rounded.stores(), exact.stores(), strict=True):
        assert store.dtype == (torch.float16 if name == "states.0" else other.dtype)
        # What no call has written is NaN in both.
        assert torch.equal(store.nan_to_num(7.0), other.to(store.dtype).nan_to_num(7.0)), name
    with torch.no_grad():
        oracle = memory_caching(**inputs.arguments(problem))[:, 4:]
    error = error_of({"y": torch.cat(outputs, 1)}, {"y": oracle})
    assert (1e-5 if problem.dtype == "float32" else 0.0) < error <= TOLERANCE["float16"]
