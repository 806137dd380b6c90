"""A deep memory as it is usually written in torch, to compare with: the gradients of a two-layer MLP by ``torch.func``.

A loop over segments and over their inner chunks. ``vmap(grad(loss))`` gives each token's gradient at the state that
enters its chunk (arXiv:2602.24281, Eq. 30-31 and 34-36), a scan over the chunk every token's own state, ``vmap`` of the
MLP its read; then all tokens of the segment read the states of the segments before (Eq. 6-17). It is right, it is
differentiable, and it forms the state of every token: the eager path and kernels never do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.func import grad, vmap
from torch.nn.functional import gelu

from mctune.core.errors import UsageError
from mctune.core.problem import AGGREGATIONS, RECURRENCES
from mctune.runtime.traits import Aggregation

Tensor = torch.Tensor
Weights = tuple[Tensor, Tensor]


def memory(weights: Weights, x: Tensor, residual: bool) -> Tensor:
    """M(x) = gelu(x W_up) W_down (+ x)."""
    up, down = weights
    y = gelu(x @ up, approximate="tanh") @ down
    return y + x if residual else y


def loss(weights: Weights, k: Tensor, v: Tensor, residual: bool, squared: bool) -> Tensor:
    """What a token's write descends: ||M(k) - v||^2 of titans, -<M(k), v> of dla."""
    o = memory(weights, k, residual)
    return (o - v).square().sum() if squared else -(o * v).sum()


def vmapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    *,
    recurrence: str,
    aggregation: str,
    W_up: Tensor,
    W_down: Tensor,
    segment_length: int,
    segmentation: str = "constant",
    state_init: str = "independent",
    inner_chunk: int = 16,
    top_k: int | None = None,
    memory_residual: bool = True,
    cu_seqlens: Tensor | None = None,
    g: Tensor | None = None,
    eta: Tensor | None = None,
    mu: Tensor | None = None,
) -> Tensor:
    """y [B, T, H, Dv]; arguments as of ``memory_caching``.

    Raises:
        UsageError: for a memory that is a matrix, or segments that are not of one length.
    """
    writes = RECURRENCES[recurrence]
    if not writes.deep or segmentation != "constant":
        raise UsageError(f"{recurrence}, {segmentation} segments: this form is for deep memories, constant segments")
    B, T, H, Dk = q.shape
    q, k, v, u = (x.transpose(1, 2).flatten(0, 1) for x in (q * Dk**-0.5, k, v, u))
    gates = [None if x is None else x.transpose(1, 2).flatten(0, 1) for x in (g, eta, mu)]
    first: Weights = (W_up.repeat(B, 1, 1), W_down.repeat(B, 1, 1))
    write = _Write(inner_chunk, writes.momentum, memory_residual)
    state, momentum = first, (torch.zeros_like(first[0]), torch.zeros_like(first[1]))
    read = _Read(AGGREGATIONS[aggregation], top_k or T, memory_residual)
    parts = []
    for begin in range(0, T, segment_length):
        at = slice(begin, min(begin + segment_length, T))
        if state_init == "independent":
            state, momentum = first, (torch.zeros_like(first[0]), torch.zeros_like(first[1]))
        own = [None if x is None else x[:, at] for x in gates]
        entered = read.enter(q[:, at], k[:, at], u[:, at])
        for place, states, left in write.chunks(state, momentum, k[:, at], v[:, at], *own):
            entered.chunk(states, place)
            state, momentum = (states[0][:, -1], states[1][:, -1]), left
        parts.append(entered.leave())
        read.cache(state, k[:, at])
    return torch.cat(parts, 1).view(B, H, T, -1).transpose(1, 2)


@dataclass(frozen=True)
class _Write:
    """The writes of one segment; arrays [G, t, ...] with G = B * H."""

    size: int
    squared: bool
    residual: bool

    def chunks(
        self, state: Weights, momentum: Weights, k: Tensor, v: Tensor, g: Tensor | None, eta: Tensor | None,
        mu: Tensor | None,
    ) -> Iterator[tuple[int, Weights, Weights]]:  # fmt: skip
        """Of each inner chunk: where it begins; the states of all its tokens, [G, t, D, D'] a layer; S after it."""
        surprise = vmap(vmap(grad(partial(loss, residual=self.residual, squared=self.squared)), (None, 0, 0)))
        for begin in range(0, k.shape[1], self.size):
            at = slice(begin, begin + self.size)
            steps = surprise(state, k[:, at], v[:, at])
            if eta is not None:
                steps = tuple(eta[:, at, None, None] * step for step in steps)
            forget, keep = (None if x is None else x[:, at, None, None] for x in (g, mu))
            found = [
                _scan(*layer, None if forget is None else forget.exp(), keep)
                for layer in zip(state, momentum, steps, strict=True)
            ]
            states, momentum = ((found[0][n], found[1][n]) for n in range(2))
            state = states[0][:, -1], states[1][:, -1]
            yield begin, states, momentum


def _scan(
    state: Tensor, momentum: Tensor, steps: Tensor, forget: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S_t = mu_t S_{t-1} + step_t and M_t = e^g_t M_{t-1} - S_t: every M_t, and the last S."""
    if forget is None and keep is None:
        return state[:, None] - steps.cumsum(1), steps[:, -1]
    states = []
    for t in range(steps.shape[1]):
        momentum = steps[:, t] if keep is None else keep[:, t] * momentum + steps[:, t]
        state = (state if forget is None else forget[:, t] * state) - momentum
        states.append(state)
    return torch.stack(states, 1), momentum


class _Read:
    """The cached states, and the tokens of a segment that read them."""

    def __init__(self, reads: Aggregation, top_k: int, residual: bool) -> None:
        self.reads, self.top_k, self.residual = reads, top_k, residual
        self.states: list[Weights] = []
        self.means: list[Tensor] = []

    def cache(self, state: Weights, k: Tensor) -> None:
        """Keep what a segment has left."""
        self.states.append(state)
        self.means.append(k.mean(1))

    def enter(self, q: Tensor, k: Tensor, u: Tensor) -> _Segment:
        """The segment under way."""
        return _Segment(self, q, *self.weigh(k, u))

    def weigh(self, k: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the cached states, [G, t, n], and of the own one, [G, t, 1] (Eq. 8-10, 16-17)."""
        G, t, _ = k.shape
        if not self.reads.routed:
            share = 1 / (len(self.states) + 1) if self.reads.averages else 1.0
            return k.new_full((G, t, len(self.states)), share), k.new_full((G, t, 1), share)
        running = k.cumsum(1) / torch.arange(1, t + 1, device=k.device)[:, None]
        logits = (u * running).sum(-1, keepdim=True)
        if self.means:
            past = u @ torch.stack(self.means, 2)
            if self.reads.sparse and self.top_k < len(self.means):
                least = past.topk(self.top_k).values[..., -1:]
                past = past.masked_fill(past < least, float("-inf"))
            logits = torch.cat([past, logits], -1)
        gamma = logits.softmax(-1)
        return gamma[..., :-1], gamma[..., -1:]


class _Segment:
    """y of one segment: its own memory chunk by chunk, then the cached ones."""

    def __init__(self, read: _Read, q: Tensor, past: Tensor, own: Tensor) -> None:
        self.read, self.q, self.past, self.own = read, q, past, own
        self.mixes, self.residual = read.reads.mixes_parameters, read.residual
        self.layers = [torch.stack(layer, 1) for layer in zip(*read.states, strict=True)]
        self.hidden = self._mixed(q, 0) if self.mixes and self.layers else None
        self.online: list[Tensor] = []
        self.z: list[Tensor] = []

    def chunk(self, states: Weights, place: int) -> None:
        """Tokens from ``place`` on read their own states."""
        at = slice(place, place + states[0].shape[1])
        q, own = self.q[:, at], self.own[:, at]
        if not self.mixes:
            self.online.append(own * vmap(vmap(partial(memory, residual=self.residual)))(states, q))
            return
        # The mean of parameters (Eq. 14-15) is linear in each layer.
        each = vmap(vmap(torch.matmul))
        hidden = own * each(q, states[0])
        if self.hidden is not None:
            hidden = hidden + self.hidden[:, at]
        self.z.append(gelu(hidden, approximate="tanh"))
        self.online.append(own * each(self.z[-1], states[1]))

    def leave(self) -> Tensor:
        """y of all its tokens, [G, t, Dv]."""
        y = torch.cat(self.online, 1)
        if self.mixes:
            y = y + self._mixed(torch.cat(self.z, 1), 1) if self.layers else y
            return y + self.q if self.residual else y
        if not self.layers:
            return y
        return self._chosen(y) if self.read.reads.sparse else self._all(y)

    def _mixed(self, x: Tensor, layer: int) -> Tensor:
        """sum_i gamma_i x W_i."""
        each = vmap(vmap(torch.matmul, (None, 0)))(x, self.layers[layer])
        return torch.einsum("gtn,gntd->gtd", self.past, each)

    def _all(self, y: Tensor) -> Tensor:
        """Every token reads every state."""
        every = vmap(vmap(partial(memory, residual=self.residual), (0, None)))
        return y + torch.einsum("gtn,gntd->gtd", self.past, every((self.layers[0], self.layers[1]), self.q))

    def _chosen(self, y: Tensor) -> Tensor:
        """Every state reads the tokens that chose it."""
        rows = list(y.unbind(0))
        for lane in range(len(rows)):
            for number, (up, down) in enumerate(zip(self.layers[0][lane], self.layers[1][lane], strict=True)):
                share = self.past[lane, :, number]
                tokens = share.nonzero()[:, 0]
                if len(tokens):
                    found = memory((up, down), self.q[lane, tokens], self.residual)
                    rows[lane] = rows[lane].index_add(0, tokens, share[tokens, None] * found)
        return torch.stack(rows)
