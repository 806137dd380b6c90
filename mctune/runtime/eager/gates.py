"""How much of each cached segment a token reads (arXiv:2602.24281, Eq. 8-10 and 16-17).

Arrays carry one leading axis G = B * H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..traits import AGGREGATIONS, Aggregation
from .masked import mix, pairs
from .plan import Block, Layout

Tensor = torch.Tensor
_FEW = 8
"""Up to this many maxima are found one by one, which is faster than a stable sort."""


def descriptors(u: Tensor, k: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean key of every segment, and the logit of every token against the running mean of its own.

    Args:
        u, k: [G, T, Dk].

    Returns:
        p [G, N, Dk], the mean of k over each segment, and r [G, T], the inner product of u_t with the mean of k over
        the tokens of t's segment up to and including t.
    """
    plan = layout.keys
    rows = plan.take(k)
    running = mix(plan.causal[:, 1:].to(k.dtype), rows, plan.seen())
    if len(plan.steps) > 1:
        totals = plan.at_last(running)
        carried, before = torch.zeros_like(totals[:, : plan.steps[0].stop]), []
        for step in plan.steps:
            carried = carried[:, : step.stop - step.start]
            before.append(carried)
            carried = carried + totals[:, step.start : step.stop]
        running = running + torch.cat(before, 1)[:, :, None]
    mean = plan.put(running) / layout.place[:, None]
    return mean.index_select(1, layout.closing), (u * mean).sum(-1)


@dataclass(frozen=True, eq=False)
class Gate:
    """The weights of the read, a block of tokens at a time.

    Attributes:
        reads: what the aggregation is.
        u, p, r: [G, T, Dk], [G, N, Dk], [G, T] of :func:`descriptors`; ``None`` unless it is routed.
    """

    reads: Aggregation
    top_k: int
    like: Tensor
    u: Tensor | None = None
    p: Tensor | None = None
    r: Tensor | None = None

    def logits(self, block: Block) -> tuple[Tensor, Tensor]:
        """Logits of the cached segments, [G, t, n], -inf where unreadable, and of the online one, [G, t, 1]."""
        assert self.u is not None and self.p is not None and self.r is not None
        past = pairs(self.u[:, block.begin : block.end], self.p[:, block.lo : block.hi], block.visible)
        if block.visible is not None:
            past = past.masked_fill(~block.visible, float("-inf"))
        return past, self.r[:, block.begin : block.end, None]

    def weights(self, block: Block) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weights of the cached segments, [G or 1, t, n], and of the online one, [G or 1, t, 1].

        Then which cached ones are read at all, bool [G or 1, t, n]: the others' weights are 0. ``None``: all of them.
        """
        if self.reads.routed:
            past, online = self.logits(block)
            seen = chosen(self.reads, past, self.top_k, None if block.visible is None else block.visible[None])
            share, own = gamma(past, online, seen)
            return (share if seen is None else share.masked_fill(~seen, 0)), own, seen
        past = self.like.new_ones(1, block.end - block.begin, block.hi - block.lo)
        seen = None if block.visible is None else block.visible[None]
        if seen is not None:
            past = past * seen
        return *even(self.reads, past, block.rank[None, :, None].to(past.dtype)), seen


def make_gate(reads: Aggregation, top_k: int, u: Tensor, k: Tensor, layout: Layout) -> Gate:
    """The gate of an aggregation; u and k [G, T, Dk]. In a single segment every aggregation reads the same."""
    if layout.count == 1:
        reads = AGGREGATIONS["residual"]
    return Gate(reads, top_k, k, u, *descriptors(u, k, layout)) if reads.routed else Gate(reads, top_k, k)


def chosen(reads: Aggregation, past: Tensor, top_k: int, visible: Tensor | None) -> Tensor | None:
    """Which of the visible cached segments are read, from their logits [..., n] (Eq. 16-17); ``None``: all of them."""
    if not reads.sparse or top_k >= past.shape[-1]:
        return visible
    read = torch.zeros_like(past, dtype=torch.bool).scatter_(-1, best(past, top_k)[0], True)
    return read if visible is None else read & visible


def gamma(past: Tensor, online: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights of a routed aggregation: a softmax over the states that may be read (Eq. 8-10, 16-17).

    Args:
        past, online: logits of the cached segments [..., n], and of the online one [..., 1].
        seen: which cached ones are read; ``None``: all of them.

    Returns:
        Weights in the shapes of the logits.
    """
    if seen is not None:
        past = past.masked_fill(~seen, float("-inf"))
    every = torch.cat([past, online], -1).softmax(-1)
    return every[..., :-1], every[..., -1:]


def even(reads: Aggregation, visible: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of an aggregation that is not routed: 1 (Eq. 6-7), or 1 / s where it averages (section 4.3).

    Args:
        visible: 1 where a token reads a cached state, else 0, [..., n].
        count: s, the states that a token reads with the online one, [..., 1].
    """
    share = 1.0 / count if reads.averages else torch.ones_like(count)
    return (visible * share if reads.averages else visible), share


def best(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Indices [..., top_k] of the largest logits, among equals the earlier one, and whether each is not -inf.

    NaN counts as the largest, so that it is not lost. The choice carries no gradient. Where fewer than ``top_k`` are
    finite, the rest of the indices mean nothing.
    """
    left = logits.detach()
    if not 1 <= top_k <= _FEW:
        value, index = left.sort(dim=-1, descending=True, stable=True)
        return index[..., :top_k], value[..., :top_k] != float("-inf")
    left, values, indices = left.clone(), [], []
    for _ in range(top_k):
        value, index = left.max(-1, keepdim=True)
        left.scatter_(-1, index, float("-inf"))
        values.append(value)
        indices.append(index)
    return torch.cat(indices, -1), torch.cat(values, -1) != float("-inf")
