"""The eager path: Memory Caching (arXiv:2602.24281) in vectorised, differentiable torch, for every problem.

It serves what no kernel covers and is the baseline that kernels must beat. States, gates and accumulators are float32
(float64 for float64 inputs); autocast is off inside.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import gelu

from ..call import Call
from ..modes import without_autocast
from .deep import Chunk, DeepWalk
from .gates import Gate, make_gate
from .matrix import read_total, run_linear
from .plan import Layout, Plan, chunk_size, make_layout
from .read import Deep, Linear, read

Tensor = torch.Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lay_out(call: Call) -> Layout:
    """The layout of a call: a Python loop over segments, cached, and not traced by torch.compile.

    Raises:
        ArgumentError: if ``cu_seqlens`` does not cut up the row.
    """
    segments = call.segments
    size = min(call.inner_chunk, segments.longest) if call.deep else chunk_size(segments)
    return make_layout(segments, size, call.carried, call.q.device)


def run_eager(call: Call, layout: Layout) -> Tensor:
    """y [B, T, H, Dv] in the dtype of q, for arguments that :func:`check_call` has passed and their layout."""
    with without_autocast(call.q.device):
        q, k, v = (by_head(x, call.compute_dtype) for x in (call.q, call.k, call.v))
        u = q if call.u is None else by_head(call.u, call.compute_dtype)
        gate = make_gate(call.reads, call.top_k, u, k, layout)
        run = _run_deep if call.deep else _run_linear
        y = run(call, layout, q * call.scale, k, v, gate)
        if not gate.reads.routed and call.u is not None:
            y = y + _unread(u, call.reads.routed)
        B, T, H, _ = call.q.shape
        return y.view(B, H, T, -1).transpose(1, 2).to(call.q.dtype).contiguous()


def _unread(u: Tensor, gates: bool) -> Tensor:
    """Zeros to add to y, so that a connector without influence has a gradient, zero.

    ``gates``: in a single segment every gate is 1, but that of a logit that is NaN.
    """
    return (0 * u).sum(-1, keepdim=True) if gates else u[:, :0].sum()


def by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, H, ...] to contiguous [B * H, T, ...]."""
    return x.to(dtype).transpose(1, 2).flatten(0, 1).contiguous()


def gate_by_head(call: Call, name: str, absent: float) -> Tensor:
    """A gate as contiguous [B * H, T]; ``absent`` everywhere unless it was given."""
    gate: Tensor | None = getattr(call, name)
    if gate is not None:
        return by_head(gate, call.compute_dtype)
    B, T, H, _ = call.q.shape
    return torch.full((B * H, T), absent, dtype=call.compute_dtype, device=call.q.device)


def swla_gates(call: Call) -> tuple[Tensor, Tensor, Tensor] | None:
    """g, beta, lam of swla, [B * H, T] each; ``None`` for another recurrence."""
    if not call.writes.convolves:
        return None
    return gate_by_head(call, "g", 0.0), gate_by_head(call, "beta", 0.0), gate_by_head(call, "lam", 1.0)


def _run_linear(call: Call, layout: Layout, q: Tensor, k: Tensor, v: Tensor, gate: Gate) -> Tensor:
    online, states = run_linear(q, k, v, layout.states, swla_gates(call))
    if layout.count == 1:
        return online
    if not gate.reads.routed:
        total = online + read_total(q, states, layout)
        return total / layout.rank[:, None] if gate.reads.averages else total
    return read(q, online, Linear(states), gate, layout)


# Left out of compiled graphs: Inductor's vectorised scatter on the CPU (torch 2.13) corrupts the heap in the backward.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run_deep(call: Call, layout: Layout, q: Tensor, k: Tensor, v: Tensor, gate: Gate) -> Tensor:
    plan, walk = layout.states, deep_walk(call, layout, k, v)
    if gate.reads.mixes_parameters:
        return _read_soup(q, walk, gate, call, layout)
    rows = plan.take(q)
    online, ups, downs = [], [], []
    for chunk in walk:
        x = rows[:, chunk.start : chunk.stop]
        y = chunk.down.read(gelu(chunk.up.read(x, chunk.by), approximate="tanh"), chunk.by)
        online.append(y + x if call.memory_residual else y)
        ups.append(chunk.closed_up)
        downs.append(chunk.closed_down)
    memories = Deep(plan.gather(ups), plan.gather(downs), call.memory_residual)
    return read(q, in_tokens(plan, online), memories, gate, layout)


def deep_walk(call: Call, layout: Layout, k: Tensor, v: Tensor) -> DeepWalk:
    """The writes of a deep memory; k, v [G, T, ...] by head."""
    assert call.W_up is not None and call.W_down is not None
    eta = gate_by_head(call, "eta", 1.0)
    g, mu = (None if x is None else by_head(x, call.compute_dtype) for x in (call.g, call.mu))
    W_up, W_down = (W.to(call.compute_dtype).repeat(call.q.shape[0], 1, 1) for W in (call.W_up, call.W_down))
    momentum, residual = call.writes.momentum, call.memory_residual
    return DeepWalk(layout.states, k, v, eta, g, mu, W_up, W_down, momentum, residual)


def _read_soup(q: Tensor, walk: DeepWalk, gate: Gate, call: Call, layout: Layout) -> Tensor:
    """One memory whose every parameter is the weighted mean of the states' (Eq. 14-15): two gated reads in a row."""
    plan = walk.plan
    # A second pass computes the writes again, unless autograd keeps the first one's anyway.
    steps: Iterable[Chunk] = list(walk) if torch.is_grad_enabled() else walk
    z = gelu(mix_hidden(q, plan, steps, gate, layout)[1], approximate="tanh")
    rows = plan.take(z)
    online, downs = [], []
    for chunk in steps:
        online.append(chunk.down.read(rows[:, chunk.start : chunk.stop], chunk.by))
        downs.append(chunk.closed_down)
    y = read(z, in_tokens(plan, online), Linear(plan.gather(downs)), gate, layout)
    return y + q if call.memory_residual else y


def mix_hidden(q: Tensor, plan: Plan, steps: Iterable[Chunk], gate: Gate, layout: Layout) -> tuple[Tensor, Tensor]:
    """What q reads of the first layer of its own segment, and of all states by their weights: [G, T, E] each."""
    rows = plan.take(q)
    online, ups = [], []
    for chunk in steps:
        online.append(chunk.up.read(rows[:, chunk.start : chunk.stop], chunk.by))
        ups.append(chunk.closed_up)
    own = in_tokens(plan, online)
    return own, read(q, own, Linear(plan.gather(ups)), gate, layout)


def in_tokens(plan: Plan, steps: list[Tensor]) -> Tensor:
    """What each step computed, [G, A, b, D] each, as [G, T, D]."""
    return plan.put(torch.cat(steps, 1))
