"""The decode step of deep memories, compiled, against the oracle: blocks of tokens over caches at odd places.

A few combinations are compiled in every run (half a minute the first time), the others in the slow one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from stepping import Case, case, extend, hold, moved, remembered, shifted

from mctune.core.problem import Problem
from mctune.reference import error_ratio, memory_caching
from mctune.runtime.errors import KernelError
from mctune.runtime.kernels.tvm.deep.decode import TvmDeepDecode
from mctune.runtime.memory import LayerMemory
from mctune.verify.inputs import Inputs
from mctune.verify.judge import decided_inputs, judge_all, poisoned_memory, tolerance, verify
from mctune.verify.passes import PASSES
from tests import draw_deep as drawn

Tensor = torch.Tensor
Build = Callable[..., TvmDeepDecode]


def cases(problem: Problem) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Uses of one kernel, and the gates that are left out: from nothing, inside segments and inner chunks and over
    their ends, a segment a token, the exact rule, with many states."""
    gates = problem.writes.gates
    yield case(problem, 16, (0,), (1,), 1, 1, 4), ()
    yield case(problem, 16, (0, 15, 16), (1, 2, 5, 20), 1, 1, 5), gates[-1:]
    yield case(problem, 5, (13, 4), (5, 1, 1, 9), 2, 3, 3), gates[:1]
    yield case(problem, 1, (0, 7), (2, 1, 6), 1, 2, 16), ()
    yield case(problem, 2, (31, 3), (1, 6), 2, 100, 1), gates
    yield case(problem, 1000, (3,), (2, 1, 5), 2, 2, 2000), ()


def inputs_of(of: Case, seed: int, absent: tuple[str, ...] = ()) -> Inputs:
    """Fresh ones; where eta is absent, keys and values with which steps of 1 do not diverge."""
    inputs = decided_inputs(of.problem, seed)
    if "eta" in absent:
        inputs = replace(inputs, k=0.2 * inputs.k, v=0.2 * inputs.v)
    return replace(inputs, gates={name: x for name, x in inputs.gates.items() if name not in absent})


def oracle(of: Case, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return memory_caching(**inputs.arguments(of.problem))


def step(kernel: TvmDeepDecode, of: Case, inputs: Inputs) -> Tensor:
    """y of all blocks; what they leave behind is held to the oracle."""
    memory, begin, outputs = remembered(of, inputs, 0, torch.float32), 0, []
    for n in of.blocks:
        with poisoned_memory():
            outputs.append(extend(kernel, of, inputs, memory, begin, n))
        begin += n
    hold(of, memory, remembered(of, inputs, of.added, torch.float64))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("one", drawn.parameters("decode"))
def test_kernels_agree_with_the_oracle(one: drawn.Wanted, build: Build, scratch: ctypes.CDLL) -> None:
    kernel = build(one.problem, one.config, one.target)
    for seed, (of, absent) in enumerate(cases(one.problem)):
        inputs = inputs_of(of, seed, absent)
        y = step(kernel, of, inputs)
        assert y.dtype == torch.float32 and y.is_contiguous()
        wanted, begin = shifted(of, oracle(of, inputs), 0, of.added), 0
        for n in of.blocks:
            error = error_ratio(y[:, begin : begin + n], wanted[:, begin : begin + n])
            assert error <= tolerance(of.problem), (of, absent, n, one.config)
            begin += n
    assert scratch.mctune_test_overruns() == 0
    assert scratch.mctune_test_callers() > 0, "the kernel did not use the tests' scratch memory"


@pytest.mark.parametrize("combination", (("titans", "ssc", "checkpoint"), ("dla", "soup", "independent")))
def test_what_a_search_verifies(combination: tuple[str, str, str], build: Build) -> None:
    one = drawn.wanted_for("decode", *combination)
    problem = one.problem.replace(T=40, segment_length=12)
    kernel = build(one.problem, one.config, one.target)
    cases = judge_all(problem, 0)
    assert verify(lambda problem, inputs: PASSES["decode"].run(kernel, problem, inputs), problem, cases) < 2e-5


def ssc_case(build: Build, top_k: int) -> tuple[TvmDeepDecode, Case, Inputs, LayerMemory]:
    """One token over ten states."""
    one = drawn.wanted_for("decode", "dla", "ssc", "independent")
    of = case(one.problem, 3, (30,), (1,), 2, top_k)
    inputs = inputs_of(of, 0)
    return build(one.problem, one.config, one.target), of, inputs, remembered(of, inputs, 0, torch.float32)


def test_ssc_reads_chosen_states_only(build: Build) -> None:
    kernel, of, inputs, memory = ssc_case(build, 3)
    logits = torch.einsum("bthd,bhnd->bhn", inputs.u[:, 30:], memory.descriptors)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.topk(3).indices, True)
    for store in memory.states:
        store[~chosen] = float("nan")
    assert error_ratio(extend(kernel, of, inputs, memory, 0, 1), oracle(of, inputs)[:, 30:]) <= 2e-5


def test_a_tie_goes_to_the_earlier_segments(build: Build) -> None:
    kernel, of, inputs, memory = ssc_case(build, 3)
    inputs = replace(inputs, u=torch.zeros_like(inputs.u))
    for store in memory.states:
        store[:, :, 3:] = float("nan")
    assert error_ratio(extend(kernel, of, inputs, memory, 0, 1), oracle(of, inputs)[:, 30:]) <= 2e-5


@pytest.mark.parametrize(("aggregation", "state_init"), (("grm", "independent"), ("ssc", "checkpoint")))
def test_strong_decays(aggregation: str, state_init: str, build: Build) -> None:
    """Memories that forget nearly all at every token, and all of it at some."""
    one = drawn.wanted_for("decode", "titans", aggregation, state_init)
    of = case(one.problem, 5, (8, 1), (1, 12), 1, 1, 3)
    inputs = inputs_of(of, 0)
    inputs.gates["g"].sub_(4.0)
    inputs.gates["g"][:, ::7] = -float("inf")
    y = step(build(one.problem, one.config, one.target), of, inputs)
    assert error_ratio(y, shifted(of, oracle(of, inputs), 0, 13)) <= 2e-5


def test_arrays_need_no_alignment(build: Build) -> None:
    one = drawn.wanted_for("decode", "titans", "soup", "checkpoint")
    of = case(one.problem, 5, (8, 1), (7,), 2, 1, 3)
    inputs = inputs_of(of, 0)
    results = []
    for offset in (0, 1, 3):
        kernel = build(one.problem, one.config, one.target, fenced=False)
        kernel.deep_decode = moved(kernel.deep_decode, offset)
        results.append(step(kernel, of, inputs))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_refusals(build: Build) -> None:
    one = drawn.wanted_for("decode", "titans", "grm", "independent")
    kernel = build(one.problem, one.config, one.target)
    of = case(one.problem, 5, (9,), (2,), 1, 1, 3)
    inputs = inputs_of(of, 0)
    memory = remembered(of, inputs, 0, torch.float32)
    with pytest.raises(KernelError, match=r"room for 3 states and the memory has room for 2.*reserve"):
        kernel(
            *(torch.zeros(1, 6, *x.shape[2:]) for x in (inputs.q, inputs.k, inputs.v, inputs.u)),
            g=None, eta=None, mu=None, **inputs.weights, memory_residual=False, inner_chunk=3, scale=1.0, top_k=1,
            segment_length=5, memory=memory,
        )  # fmt: skip
    narrow = replace(memory, states=tuple(x.half() for x in memory.states))
    with pytest.raises(
        KernelError, match=r"states of torch\.float16.*read torch\.float32; use MemoryCache\(state_dtype"
    ):
        extend(kernel, of, inputs, narrow, 0, 1)
    for layer in (0, 1):
        huge = memory.states[layer].new_zeros(1).expand(1, 1, 2**31, *memory.states[layer].shape[3:])
        states = tuple(huge if number == layer else x for number, x in enumerate(memory.states))
        with pytest.raises(KernelError, match=r"exceeds 2\^31 - 1"):
            extend(kernel, of, inputs, replace(memory, states=states), 0, 1)


def test_every_combination_is_compiled() -> None:
    drawn.hold_combinations("decode")


def test_configurations_are_spread_over_the_space() -> None:
    drawn.hold_spread("decode")
