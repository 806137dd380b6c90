"""Identities that hold for every input: the oracle against itself, against closed forms, and against autograd."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import gelu

from mctune.reference import memory_caching, segment_states

Call = dict[str, Any]
Calls = Callable[..., st.SearchStrategy[Call]]
READS = ("q", "u", "scale", "aggregation", "top_k")
PER_TOKEN = ("q", "k", "v", "u", "g", "beta", "lam", "eta", "mu")
AGGREGATIONS = ("residual", "grm", "soup", "ssc", "mean")


def writes_of(call: Call) -> Call:
    """The arguments that segment_states takes."""
    return {name: value for name, value in call.items() if name not in READS}


def cut(call: Call, begin: int, end: int) -> Call:
    """The same call on tokens begin to end alone."""
    return {name: x[:, begin:end] if name in PER_TOKEN else x for name, x in call.items()}


def close(y: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)


def answer(states: tuple[torch.Tensor, ...], x: torch.Tensor, residual: bool) -> torch.Tensor:
    """M(x) for memories [..., H, ., .] and x [..., H, Dk], written without the oracle."""
    if len(states) == 1:
        return torch.einsum("...k,...kv->...v", x, states[0])
    hidden = gelu(torch.einsum("...k,...ke->...e", x, states[0]), approximate="tanh")
    y = torch.einsum("...e,...ev->...v", hidden, states[1])
    return y + x if residual else y


@pytest.mark.parametrize("recurrence", ["linear", "swla"])
@given(data=st.data())
def test_soup_is_grm_for_a_memory_that_is_a_matrix(recurrence: str, calls: Calls, data: st.DataObject) -> None:
    call = data.draw(calls(recurrence=recurrence))
    close(memory_caching(**call, aggregation="soup"), memory_caching(**call, aggregation="grm"))


def test_soup_is_not_grm_for_a_deep_memory(call: Callable[..., Call]) -> None:
    deep = call("titans")
    soup, grm = (memory_caching(**deep, aggregation=aggregation) for aggregation in ("soup", "grm"))
    close(soup[:, :3], grm[:, :3])
    assert float((soup - grm)[:, 3:].abs().max()) > 1e-3


@pytest.mark.parametrize("segmentation", ["constant", "logarithmic"])
@given(data=st.data())
def test_residual_of_independent_linear_memories_is_linear_attention(
    segmentation: str, calls: Calls, data: st.DataObject
) -> None:
    call = data.draw(calls(recurrence="linear", segmentation=segmentation, state_init="independent"))
    scores = torch.einsum("bthk,bjhk->bhtj", call["q"], call["k"]).tril() * call["q"].shape[3] ** -0.5
    wanted = torch.einsum("bhtj,bjhv->bthv", scores, call["v"])
    close(memory_caching(**call, aggregation="residual"), wanted)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(data=st.data())
def test_with_one_segment_every_aggregation_is_the_recurrence_itself(
    aggregation: str, calls: Calls, data: st.DataObject
) -> None:
    call = data.draw(calls(segmentation="constant", segment_length=9))
    T = call["k"].shape[1]
    base = []
    for t in range(T):
        states, _ = segment_states(**writes_of(cut(call, 0, t + 1)))
        memory = tuple(parameter[:, 0] for parameter in states)
        base.append(answer(memory, 0.7 * call["q"][:, t], call.get("memory_residual", False)))
    close(memory_caching(**call, aggregation=aggregation, scale=0.7), torch.stack(base, 1))


@given(data=st.data())
def test_ssc_that_chooses_every_cached_segment_is_grm(calls: Calls, data: st.DataObject) -> None:
    call = data.draw(calls())
    segments = segment_states(**writes_of(call)).descriptors.shape[1]
    grm = memory_caching(**call, aggregation="grm")
    close(memory_caching(**call, aggregation="ssc", top_k=max(1, segments - 1)), grm)
    close(memory_caching(**call, aggregation="ssc", top_k=segments + 5), grm)


@pytest.mark.parametrize("recurrence", ["linear", "swla", "dla", "titans"])
@given(data=st.data())
def test_mean_is_soup_with_a_connector_of_zero(recurrence: str, calls: Calls, data: st.DataObject) -> None:
    call = data.draw(calls(recurrence=recurrence))
    soup = memory_caching(**{**call, "u": torch.zeros_like(call["u"])}, aggregation="soup")
    close(memory_caching(**call, aggregation="mean"), soup)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(data=st.data())
def test_each_output_from_the_states_of_the_tokens_up_to_it(
    aggregation: str, calls: Calls, data: st.DataObject
) -> None:
    """After a cut at t, the last segment's end state and mean key are the online ones of token t."""
    call = data.draw(calls(segmentation="constant"))
    top_k, residual = 2, call.get("memory_residual", False)
    outputs = []
    for t in range(call["k"].shape[1]):
        states, p = segment_states(**writes_of(cut(call, 0, t + 1)))
        x = call["q"][:, t] * call["q"].shape[3] ** -0.5
        logits = torch.einsum("bhk,bnhk->bnh", call["u"][:, t], p)
        s = p.shape[1]
        if aggregation == "ssc" and s - 1 > top_k:
            bar = logits[:, :-1].topk(top_k, dim=1).values[:, -1:]
            kept = torch.cat((logits[:, :-1] >= bar, torch.ones_like(bar, dtype=torch.bool)), 1)
            logits = logits.where(kept, torch.tensor(-math.inf, dtype=torch.float64))
        gamma = {"residual": torch.ones_like(logits), "mean": torch.ones_like(logits) / s}.get(
            aggregation, logits.softmax(1)
        )
        if aggregation in ("soup", "mean"):
            mixed = tuple((gamma[..., None, None] * parameter).sum(1) for parameter in states)
            outputs.append(answer(mixed, x, residual))
        else:
            outputs.append((gamma[..., None] * answer(states, x[:, None], residual)).sum(1))
    close(memory_caching(**call, aggregation=aggregation, top_k=top_k), torch.stack(outputs, 1))


@pytest.mark.parametrize("state_init", ["independent", "checkpoint"])
@given(data=st.data())
def test_swla_unrolled(state_init: str, calls: Calls, data: st.DataObject) -> None:
    """Token j weighs (lam_j e^{g_{j+1}} + beta_{j+1}) e^{g_{j+2} + ... + g_t} in M_t for j < t, and lam_t for j = t."""
    call = data.draw(calls(recurrence="swla", segmentation="constant", state_init=state_init, B=1, H=1))
    g, beta, lam = (call[name].flatten().tolist() for name in ("g", "beta", "lam"))
    C, T = call["segment_length"], len(g)
    (states,), _ = segment_states(**writes_of(call))
    for n in range(states.shape[1]):
        first, t = 0 if state_init == "checkpoint" else n * C, min(n * C + C, T) - 1
        wanted = lam[t] * torch.outer(call["k"][0, t, 0], call["v"][0, t, 0])
        for j in range(first, t):
            weight = (lam[j] * math.exp(g[j + 1]) + beta[j + 1]) * math.exp(sum(g[j + 2 : t + 1]))
            wanted = wanted + weight * torch.outer(call["k"][0, j, 0], call["v"][0, j, 0])
        close(states[0, n, 0], wanted)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(data=st.data())
def test_packed_sequences_are_separate_runs(aggregation: str, calls: Calls, data: st.DataObject) -> None:
    call = data.draw(calls(segmentation="packed"))
    bounds = call["cu_seqlens"].tolist()
    alone = {**call, "segmentation": "constant", "cu_seqlens": None}
    runs = [cut(alone, a, b) for a, b in itertools.pairwise(bounds) if a < b]
    y = [memory_caching(**run, aggregation=aggregation) for run in runs]
    close(memory_caching(**call, aggregation=aggregation), torch.cat(y, 1))
    caches = [segment_states(**writes_of(run)) for run in runs]
    states, descriptors = segment_states(**writes_of(call))
    close(descriptors, torch.cat([cache.descriptors for cache in caches], 1))
    for i, state in enumerate(states):
        close(state, torch.cat([cache.states[i] for cache in caches], 1))


@pytest.mark.parametrize("state_init", ["independent", "checkpoint"])
@pytest.mark.parametrize("recurrence", ["dla", "titans"])
@given(data=st.data())
def test_deep_writes_follow_autograd(recurrence: str, state_init: str, calls: Calls, data: st.DataObject) -> None:
    """The paper's update with torch's own gradient of L; inner_chunk=1 is the exact per-token rule."""
    call = data.draw(
        calls(recurrence=recurrence, state_init=state_init, segmentation="constant", B=1, H=1, segment_length=4)
    )
    k, v = call["k"][0, :, 0], call["v"][0, :, 0]
    gates = {name: call.get(name, torch.zeros(1, len(k), 1))[0, :, 0] for name in ("g", "eta", "mu")}
    start = call["W_up"][0], call["W_down"][0]
    for inner_chunk in (1, 3):
        states, _ = segment_states(**{**writes_of(call), "inner_chunk": inner_chunk})
        ends = []
        for t in range(len(k)):
            if t == 0 or (t % 4 == 0 and state_init == "independent"):
                memory, momentum = start, [torch.zeros_like(W) for W in start]
            if t % 4 % inner_chunk == 0:
                anchor = [W.clone().requires_grad_() for W in memory]
            with torch.enable_grad():
                o = answer(tuple(anchor), k[t], call["memory_residual"])
                loss = -(o @ v[t]) if recurrence == "dla" else (o - v[t]).square().sum()
                slopes = torch.autograd.grad(loss, anchor)
            momentum = [gates["mu"][t] * S + gates["eta"][t] * d for S, d in zip(momentum, slopes, strict=True)]
            memory = [gates["g"][t].exp() * W - S for W, S in zip(memory, momentum, strict=True)]
            if t % 4 == 3 or t == len(k) - 1:
                ends.append(memory)
        for i in range(2):
            close(states[i][0, :, 0], torch.stack([end[i] for end in ends]))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(data=st.data())
def test_the_future_has_no_influence(aggregation: str, calls: Calls, data: st.DataObject) -> None:
    call = data.draw(calls())
    T = call["k"].shape[1]
    t = data.draw(st.integers(0, T - 1))
    changed = {name: x.clone() if name in PER_TOKEN else x for name, x in call.items()}
    for name in PER_TOKEN:
        if name in changed:
            changed[name][:, t + 1 :] *= 1.5
    y, other = (memory_caching(**c, aggregation=aggregation, top_k=1) for c in (call, changed))
    assert torch.equal(y[:, : t + 1], other[:, : t + 1])


@given(data=st.data())
def test_scale_multiplies_q_and_nothing_else(calls: Calls, data: st.DataObject) -> None:
    call = data.draw(calls())
    scaled = {**call, "q": 0.3 * call["q"], "u": call["q"]}
    close(memory_caching(**{**call, "u": None}, scale=0.3), memory_caching(**scaled, scale=1.0))


@given(data=st.data())
def test_absent_gates_have_their_defaults(calls: Calls, data: st.DataObject) -> None:
    call = data.draw(calls())
    neutral = {"g": 0.0, "beta": 0.0, "lam": 1.0, "eta": 1.0, "mu": 0.0}
    given_ = {name: torch.full_like(x, neutral[name]) if name in neutral else x for name, x in call.items()}
    absent = {name: x for name, x in call.items() if name not in neutral}
    y = memory_caching(**given_)
    torch.testing.assert_close(y, memory_caching(**absent), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_floating_point_input_is_computed_in_float64(dtype: torch.dtype, call: Callable[..., Call]) -> None:
    def to(target: torch.dtype, values: Call) -> Call:
        return {name: x.to(target) if torch.is_tensor(x) else x for name, x in values.items()}

    low = to(dtype, call("titans"))
    y = memory_caching(**low)
    assert y.dtype == torch.float64
    assert torch.equal(y, memory_caching(**to(torch.float64, low)))
