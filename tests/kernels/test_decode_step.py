"""Every combination of the decode step, compiled, against the oracle: blocks of tokens over caches at odd places."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from stepping import Case, case, extend, hold, moved, remembered, shifted

from mctune.core.problem import AGGREGATIONS, STATE_INITS, Problem
from mctune.reference import error_ratio, memory_caching
from mctune.runtime.errors import KernelError
from mctune.runtime.kernels.tvm.matrix.decode import TvmDecode
from mctune.runtime.memory import LayerMemory
from mctune.verify.inputs import Inputs
from mctune.verify.judge import decided_inputs, judge_all, poisoned_memory, tolerance, verify
from mctune.verify.passes import PASSES
from tests.draw import RECURRENCES, SPACES, Wanted, host, wanted, wanted_for

SPACE, DRAWN = SPACES["decode"], wanted("decode")

Tensor = torch.Tensor
Build = Callable[..., TvmDecode]


def cases(problem: Problem) -> Iterator[Case]:
    """Uses of one kernel: from nothing, inside segments, over their ends, a segment a token, with many states."""
    yield case(problem, 16, (0,), (1,), 1, 1)
    yield case(problem, 16, (0, 15, 16), (1, 2, 5, 37), 1, 1)
    yield case(problem, 5, (13, 4), (5, 1, 1, 37), 2, 3)
    yield case(problem, 1, (0, 7), (2, 1, 11), 1, 2)
    yield case(problem, 2, (41, 3), (1, 6), 2, 100)
    yield case(problem, 1000, (3,), (2, 1, 5), 2, 2)


@pytest.mark.parametrize("one", DRAWN)
def test_kernels_agree_with_the_oracle(one: Wanted, build: Build, scratch: ctypes.CDLL) -> None:
    kernel = build(one.problem, one.config, one.target)
    for seed, of in enumerate(cases(one.problem)):
        inputs = decided_inputs(of.problem, seed)
        with torch.no_grad():
            wanted = memory_caching(**inputs.arguments(of.problem))
        memory = remembered(of, inputs, 0, torch.float32)
        begin = 0
        for n in of.blocks:
            with poisoned_memory():
                y = extend(kernel, of, inputs, memory, begin, n)
            assert y.dtype == torch.float32 and y.is_contiguous()
            assert error_ratio(y, shifted(of, wanted, begin, n)) <= tolerance(of.problem), (of, n, one.config)
            begin += n
        hold(of, memory, remembered(of, inputs, of.added, torch.float64))
    assert scratch.mctune_test_overruns() == 0
    assert scratch.mctune_test_callers() > 0, "the kernel did not use the tests' scratch memory"


@pytest.mark.parametrize("aggregation", ("grm", "ssc"))
def test_what_a_search_verifies(aggregation: str, build: Build) -> None:
    one = wanted_for("decode", "swla", aggregation, "checkpoint")
    kernel = build(one.problem, one.config, one.target)
    cases = judge_all(one.problem, 0)
    assert verify(lambda problem, inputs: PASSES["decode"].run(kernel, problem, inputs), one.problem, cases) < 2e-5


def ssc_case(build: Build, top_k: int) -> tuple[TvmDecode, Case, Inputs, LayerMemory]:
    """One token over ten states."""
    one = wanted_for("decode", "linear", "ssc", "independent")
    of = case(one.problem, 3, (30,), (1,), 2, top_k)
    inputs = decided_inputs(of.problem, 0)
    return build(one.problem, one.config, one.target), of, inputs, remembered(of, inputs, 0, torch.float32)


def test_ssc_reads_chosen_states_only(build: Build) -> None:
    kernel, of, inputs, memory = ssc_case(build, 3)
    logits = torch.einsum("bthd,bhnd->bhn", inputs.u[:, 30:], memory.descriptors)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.topk(3).indices, True)
    memory.states[0][~chosen] = float("nan")
    with torch.no_grad():
        wanted = memory_caching(**inputs.arguments(of.problem))[:, 30:]
    assert error_ratio(extend(kernel, of, inputs, memory, 0, 1), wanted) <= 2e-5


def test_a_tie_goes_to_the_earlier_segments(build: Build) -> None:
    kernel, of, inputs, memory = ssc_case(build, 3)
    inputs = replace(inputs, u=torch.zeros_like(inputs.u))
    memory.states[0][:, :, 3:] = float("nan")
    with torch.no_grad():
        wanted = memory_caching(**inputs.arguments(of.problem))[:, 30:]
    assert error_ratio(extend(kernel, of, inputs, memory, 0, 1), wanted) <= 2e-5


@pytest.mark.parametrize("state_init", STATE_INITS)
def test_strong_decays(state_init: str, build: Build) -> None:
    """Memories that forget nearly all at every token, and all of it at some."""
    one = wanted_for("decode", "swla", "grm", state_init)
    of = case(one.problem, 5, (8, 1), (1, 12), 1, 1)
    inputs = decided_inputs(of.problem, 0)
    inputs.gates["g"] -= 4.0
    inputs.gates["g"][:, ::7] = -float("inf")
    kernel, memory = build(one.problem, one.config, one.target), remembered(of, inputs, 0, torch.float32)
    with torch.no_grad():
        wanted = memory_caching(**inputs.arguments(of.problem))
    y = torch.cat([extend(kernel, of, inputs, memory, 0, 1), extend(kernel, of, inputs, memory, 1, 12)], 1)
    assert error_ratio(y, shifted(of, wanted, 0, 13)) <= 2e-5
    hold(of, memory, remembered(of, inputs, 13, torch.float64))


def test_arrays_need_no_alignment(build: Build) -> None:
    one = wanted_for("decode", "swla", "grm", "independent")
    of = case(one.problem, 5, (8, 1), (7,), 2, 1)
    inputs = decided_inputs(of.problem, 0)
    results = []
    for offset in (0, 1, 3):
        kernel = build(one.problem, one.config, one.target, fenced=False)
        kernel.decode_step = moved(kernel.decode_step, offset)
        memory = remembered(of, inputs, 0, torch.float32)
        results.append(extend(kernel, of, inputs, memory, 0, 7))
        hold(of, memory, remembered(of, inputs, 7, torch.float64))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_refusals(build: Build) -> None:
    one = wanted_for("decode", "linear", "grm", "independent")
    kernel = build(one.problem, one.config, one.target)
    of = case(one.problem, 5, (9,), (2,), 1, 1)
    inputs = decided_inputs(of.problem, 0)
    memory = remembered(of, inputs, 0, torch.float32)
    with pytest.raises(KernelError, match=r"room for 3 states and the memory has room for 2.*reserve"):
        kernel(
            *(torch.zeros(1, 6, *x.shape[2:]) for x in (inputs.q, inputs.k, inputs.v, inputs.u)),
            g=None, beta=None, lam=None, scale=1.0, top_k=1, segment_length=5, memory=memory,
        )  # fmt: skip
    narrow = replace(memory, states=(memory.states[0].half(),))
    with pytest.raises(
        KernelError, match=r"states of torch\.float16.*read torch\.float32; use MemoryCache\(state_dtype"
    ):
        extend(kernel, of, inputs, narrow, 0, 1)
    memory.states = (memory.states[0].new_zeros(1).expand(1, 1, 2**31, one.problem.Dk, one.problem.Dv),)
    with pytest.raises(KernelError, match=r"exceeds 2\^31 - 1"):
        extend(kernel, of, inputs, memory, 0, 1)


def test_every_code_is_compiled() -> None:
    def used(*aggregations: str) -> set[tuple[str, str]]:
        some = (d.problem for d in DRAWN if d.problem.aggregation in aggregations)
        return {(p.recurrence, p.state_init) for p in some}

    for alike in (("residual", "mean"), ("grm",), ("ssc",)):
        assert used(*alike) == set(product(RECURRENCES, STATE_INITS))
    assert {d.problem.aggregation for d in DRAWN} == set(AGGREGATIONS)


def test_configurations_are_spread_over_the_space() -> None:
    for param in SPACE.params:
        used = {d.config[param.name] for d in DRAWN}
        for value in set(param.values) - used:
            # Only what no drawn problem allows is missing.
            changed = [(d, d.config.replace(**{param.name: value})) for d in DRAWN]
            assert not any(SPACE.valid(config, d.problem, d.target) for d, config in changed), (param.name, value)
    assert all(SPACE.valid(d.config, d.problem, d.target) for d in DRAWN)


def test_some_default_is_valid_everywhere() -> None:
    for aggregation, Dk, Dv in product(AGGREGATIONS, (1, 7, 64), (1, 16, 33, 48, 64, 128)):
        problem = Problem(pass_="decode", aggregation=aggregation, T=512, H=1, Dk=Dk, Dv=Dv, segment_length=1)
        for floats in (8, 16):
            target = replace(host(), vector_floats=floats)
            assert SPACE.first_valid(lambda c, p=problem, t=target: SPACE.valid(c, p, t)) is not None
