"""Linear memories, chunkwise: ``linear`` and ``swla`` (arXiv:2602.24281, Eq. 2 and 26-27).

Arrays carry one leading axis G = B * H. Every exponent of SWLA's decays is a sum of g, so at most 0, and never a
difference of sums: g may be -inf.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from .masked import mix, pairs
from .plan import Layout, Plan

Tensor = torch.Tensor


def run_linear(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, gates: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Write every token, read the online memory, keep the state at every segment's end.

    Args:
        q: [G, T, Dk], scaled.
        k, v: [G, T, Dk], [G, T, Dv].
        plan: with a lane for each chain of states.
        gates: g, beta, lam of ``swla``, [G, T] each; ``None`` for ``linear``.

    Returns:
        q_t M_t, [G, T, Dv], and the cached states, [G, N, Dk, Dv].
    """
    rows = plan.take(q)
    if gates is None:
        keys, values = plan.take(k), plan.take(v)
        weights = plan.causal[:, 1:].to(q.dtype)[None, None]
        weights_last = plan.at_last(weights.expand(1, len(plan.last), -1, -1))
        decay, seen = None, plan.seen()
    else:
        keys, values = plan.take_previous(k), plan.take_previous(v)
        weights, decay = _swla_weights(plan, *gates)
        weights_last, seen = plan.at_last(weights), plan.seen(1)
    online = mix(pairs(rows, keys, seen) * weights, values, seen)
    writes = keys.mT @ (weights_last[..., None] * values)
    decay_last = None if decay is None else plan.at_last(decay)[..., None, None]
    state = torch.zeros_like(writes[:, : plan.steps[0].stop])
    entering, closed = [], []
    for step in plan.steps:
        state = state[:, : step.stop - step.start]
        entering.append(state)
        if decay_last is not None:
            state = decay_last[:, step.start : step.stop] * state
        state = state + writes[:, step.start : step.stop]
        closed.append(state.index_select(1, step.closing))
    if len(plan.steps) > 1:
        start = plan.steps[1].start
        carried = rows[:, start:] @ torch.cat(entering[1:], 1)
        if decay is not None:
            carried = decay[:, start:, :, None] * carried
        online = torch.cat([online[:, :start], online[:, start:] + carried], 1)
    return plan.put(online), plan.gather(closed)


def _swla_weights(plan: Plan, g: Tensor, beta: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    g, beta, lam = (plan.take_or_zero(gate) for gate in (g, beta, lam))
    # The first decay of a lane has nothing to scale; its NaN is seen all the same, as that of beta is.
    first = beta[..., :1] * plan.follows[:, None] + 0 * g[..., :1].exp()
    return swla_weights(g, torch.cat([first, beta[..., 1:]], -1), lam)


def swla_weights(g: Tensor, beta: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """From gates [..., b], the weight of the previous row and of each row of a chunk at each of its rows,
    [..., b, b + 1], and the decay of what enters the chunk, [..., b]."""
    span = decay_between(g)
    # The zeros of the span would not do: a gate that is not finite must not reach the rows before it.
    weights = torch.nn.functional.pad((lam[..., None, :] * span).tril(), (1, 0))
    weights = weights + torch.nn.functional.pad((beta[..., None, :] * span).tril(), (0, 1))
    return weights, g.cumsum(-1).exp()


def decay_between(g: Tensor) -> Tensor:
    """[..., b] to [..., b, b]: e^(g_{j+1} + ... + g_t) at row t, column j; 0 above the diagonal."""
    size = g.shape[-1]
    after = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    sums = torch.where(after, g[..., :, None], 0.0).cumsum(-2)
    return sums.exp().tril()


def read_total(q: Tensor, states: Tensor, layout: Layout) -> Tensor:
    """Sum of the reads of all cached states that a token sees, as one read of their sum (Eq. 6-7), [G, T, Dv].

    Args:
        q: [G, T, Dk], scaled.
        states: [G, N, Dk, Dv].
    """
    plan, sums = layout.states, []
    for first, stop in pairwise(layout.firsts):
        sums.append(torch.zeros_like(states[:, :1]))
        if stop - first > 1:
            sums.append(states[:, first : stop - 1].cumsum(1))
    return plan.put(plan.take(q) @ torch.cat(sums, 1).index_select(1, plan.segment))
