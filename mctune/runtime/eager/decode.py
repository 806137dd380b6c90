"""The next tokens of every sequence, eagerly: write, read, and at a segment's end cache (arXiv:2602.24281).

Tokens are taken in pieces inside which no sequence ends a segment or an inner chunk; a piece is vectorised. Arrays
carry one leading axis G = B * H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch.nn.functional import gelu

from ..call import Call
from ..memory import LayerMemory
from ..modes import without_autocast
from .deep import Coefficients, Layer, coefficients, error_rows, gelu_slope, next_momentum
from .gates import best, chosen, even, gamma
from .masked import mix, pairs
from .matrix import swla_weights
from .plan import CHUNK
from .read import weigh

Tensor = torch.Tensor


@torch.no_grad()
def decode(call: Call, memory: LayerMemory, read: bool = True) -> Tensor | None:
    """y [B, n, H, Dv] in the dtype of q; ``None`` unless ``read``.

    The tensors of ``memory``, which has room for what is cached, change in place; its counts are left to the caller.
    """
    with without_autocast(call.q.device):
        tokens = _tokens(call, memory.descriptors.dtype)
        cached, filled = memory.cached.tolist(), memory.filled.tolist()
        outputs = []
        for begin, end in _pieces(call, filled):
            piece = tokens.part(begin, end)
            online = (_write_deep if call.deep else _write_matrix)(call, memory, piece, filled)
            if read:
                x = piece.q * call.scale
                outputs.append(_read(call, memory, piece, x, online, cached, filled))
            memory.key_sum += piece.k.sum(1).view_as(memory.key_sum)
            filled = [place + end - begin for place in filled]
            ended = [row for row, place in enumerate(filled) if place == call.segment_length]
            if ended:
                _close(call, memory, ended, [cached[row] for row in ended])
                for row in ended:
                    cached[row], filled[row] = cached[row] + 1, 0
        if not read:
            return None
        B, n, H, _ = call.q.shape
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return y.view(B, H, n, -1).transpose(1, 2).to(call.q.dtype).contiguous()


def _pieces(call: Call, filled: list[int]) -> Iterator[tuple[int, int]]:
    """Spans of the n tokens that no sequence's segment or inner chunk ends inside."""
    n, C = call.q.shape[1], call.segment_length
    begin = 0
    while begin < n:
        room = CHUNK
        for place in filled:
            at = (place + begin) % C
            room = min(room, C - at)
            if call.deep:
                room = min(room, call.inner_chunk - at % call.inner_chunk)
        end = min(n, begin + room)
        yield begin, end
        begin = end


@dataclass(frozen=True, eq=False)
class _Tokens:
    """New tokens: q, k, u [G, m, Dk], v [G, m, Dv], and the gates that were given, [G, m]."""

    q: Tensor
    k: Tensor
    v: Tensor
    u: Tensor
    gates: dict[str, Tensor]

    def part(self, begin: int, end: int) -> _Tokens:
        """Tokens ``begin`` to ``end``."""
        q, k, v, u = (x[:, begin:end] for x in (self.q, self.k, self.v, self.u))
        return _Tokens(q, k, v, u, {name: gate[:, begin:end] for name, gate in self.gates.items()})

    def gate(self, name: str, absent: float) -> Tensor:
        """[G, m], ``absent`` where it was not given."""
        return self.gates[name] if name in self.gates else self.k.new_full(self.k.shape[:2], absent)


def _tokens(call: Call, dtype: torch.dtype) -> _Tokens:
    def by_head(x: Tensor) -> Tensor:
        return x.detach().to(dtype).transpose(1, 2).flatten(0, 1)

    q, k, v = (by_head(x) for x in (call.q, call.k, call.v))
    given = {"g": call.g, "beta": call.beta, "lam": call.lam, "eta": call.eta, "mu": call.mu}
    gates = {name: by_head(x) for name, x in given.items() if x is not None}
    return _Tokens(q, k, v, q if call.u is None else by_head(call.u), gates)


class _Online(Protocol):
    """The memory of the segment under way, at each token of the piece."""

    def read(self, layer: int, x: Tensor) -> Tensor:
        """x_t W_t for parameter ``layer`` of M_t: x [G, m, D] -> [G, m, D']."""


@dataclass(frozen=True, eq=False)
class _Matrix:
    state: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor
    decay: Tensor | None

    @property
    def seen(self) -> Tensor:
        """bool [m, m], or [m, m + 1] after the row before."""
        m, n = self.weights.shape[-2:]
        return torch.ones(m, n, dtype=torch.bool, device=self.keys.device).tril(n - m)

    def read(self, layer: int, x: Tensor) -> Tensor:
        carried = x @ self.state
        if self.decay is not None:
            carried = self.decay[..., None] * carried
        seen = None if x.shape[1] == 1 else self.seen
        return mix(pairs(x, self.keys, seen) * self.weights, self.values, seen) + carried


def _write_matrix(call: Call, memory: LayerMemory, piece: _Tokens, filled: list[int]) -> _Online:
    keys, values, decay = piece.k, piece.v, None
    state, m = memory.online[0].flatten(0, 1), piece.k.shape[1]
    weights = torch.ones(m, m, dtype=keys.dtype, device=keys.device).tril()[None]
    if call.writes.convolves:
        # The row before the piece; zeros where there is none, so that its weight has no effect.
        keys = torch.cat([memory.last_key.flatten(0, 1)[:, None], keys], 1)
        values = torch.cat([memory.last_value.flatten(0, 1)[:, None], values], 1)
        weights, decay = swla_weights(piece.gate("g", 0.0), piece.gate("beta", 0.0), piece.gate("lam", 1.0))
        memory.last_key.copy_(keys[:, -1].view_as(memory.last_key))
        memory.last_value.copy_(values[:, -1].view_as(memory.last_value))
    before = state.clone()
    if decay is not None:
        state *= decay[:, -1, None, None]
    state += keys.mT @ (weights[:, -1, :, None] * values)
    return _Matrix(before, keys, values, weights, decay)


@dataclass(frozen=True, eq=False)
class _Deep:
    layers: tuple[Layer, Layer]
    by: Coefficients

    def read(self, layer: int, x: Tensor) -> Tensor:
        return self.layers[layer].read(x[:, None], self.by)[:, 0]


def _write_deep(call: Call, memory: LayerMemory, piece: _Tokens, filled: list[int]) -> _Online:
    opening = [row for row, place in enumerate(filled) if place % call.inner_chunk == 0]
    if opening:
        for start, online in zip(memory.start, memory.online, strict=True):
            start[opening] = online[opening]
    start_up, start_down = (W.flatten(0, 1) for W in memory.start)
    k, v = piece.k, piece.v
    hidden = k @ start_up
    z = gelu(hidden, approximate="tanh")
    error = error_rows(z @ start_down, k, v, call.writes.momentum, call.memory_residual)
    back = (error @ start_down.mT) * gelu_slope(hidden)
    # An absent mu is 0 for titans: S must stay right in case the next call passes one.
    mu = piece.gate("mu", 0.0)[:, None] if call.writes.momentum else None
    g = piece.gates.get("g")
    by, decay, products = coefficients(piece.gate("eta", 1.0)[:, None], None if g is None else g[:, None], mu)
    layers, last = [], by.last()
    for number, (inputs, errors) in enumerate(((k, back), (z, error))):
        state, momentum = (x[number].flatten(0, 1) for x in (memory.online, memory.momentum))
        layer = Layer(state.clone()[:, None], momentum.clone()[:, None], inputs[:, None], errors[:, None])
        state.copy_(layer.leave(*last)[:, 0])
        if decay is not None and products is not None:
            momentum.copy_(next_momentum(layer, decay[..., -1], products[..., -1, :])[:, 0])
        layers.append(layer)
    return _Deep((layers[0], layers[1]), by)


def _close(call: Call, memory: LayerMemory, ended: list[int], slots: list[int]) -> None:
    """Cache the end states of the rows ``ended`` in ``slots``, and make their next segment start."""
    rows, places = (torch.tensor(x, device=memory.key_sum.device) for x in (ended, slots))
    for store, online in zip(memory.states, memory.online, strict=True):
        store[rows, :, places] = online[rows].to(store.dtype)
    memory.descriptors[rows, :, places] = memory.key_sum[rows] / call.segment_length
    memory.key_sum[rows] = 0
    if not call.carried:
        for number, online in enumerate(memory.online):
            online[rows] = memory.initial[number] if memory.initial else 0
        for x in (*memory.momentum, memory.last_key, memory.last_value):
            x[rows] = 0


def _read(
    call: Call, memory: LayerMemory, piece: _Tokens, x: Tensor, online: _Online, cached: list[int], filled: list[int]
) -> Tensor:
    """y [G, m, Dv] of the piece, whose queries are x [G, m, Dk]."""
    count = max(cached)
    past, own, seen = _shares(call, memory, piece, cached, filled)
    states = [store.flatten(0, 1)[:, :count] for store in memory.states]
    sparse = call.reads.sparse and x.shape[1] * call.top_k < count
    gated = partial(_few if sparse else _gated, seen=seen, call=call)
    if not call.deep:
        return own * online.read(0, x) + gated(x, past, states)
    added = x if call.memory_residual else torch.zeros_like(x[..., :1])
    if call.reads.mixes_parameters:
        # One memory whose every parameter is the weighted mean of the states' (Eq. 14-15): two gated reads in a row.
        z = gelu(own * online.read(0, x) + gated(x, past, states[:1]), approximate="tanh")
        return own * online.read(1, z) + gated(z, past, states[1:]) + added
    y = own * (online.read(1, gelu(online.read(0, x), approximate="tanh")) + added)
    return y + gated(x, past, states) + past.sum(-1, keepdim=True) * added


def _gated(x: Tensor, past: Tensor, states: list[Tensor], seen: Tensor | None, call: Call) -> Tensor:
    """sum_i past_i M_i(x), without what a memory adds of its input, as one long-K product over all states."""
    if len(states) == 1:
        rows = x[:, :, None]
    else:
        # Lane by lane: one product over all lanes would copy the states, whose storage has unused room between lanes.
        lanes = zip(x, states[0], strict=True)
        hidden = torch.stack([torch.bmm(row.expand(len(store), -1, -1), store.to(x.dtype)) for row, store in lanes])
        rows = gelu(hidden, approximate="tanh").transpose(1, 2)
    return weigh(past, rows, seen, states[-1].to(x.dtype))


def _few(x: Tensor, past: Tensor, states: list[Tensor], seen: Tensor | None, call: Call) -> Tensor:
    """The same for what is sparse, from the few states that each token chose."""
    index = best(past, call.top_k)[0]
    lane = torch.arange(len(past), device=past.device)[:, None, None]
    rows = x[:, :, None, None] @ states[0][lane, index].to(x.dtype)
    if len(states) > 1:
        rows = gelu(rows, approximate="tanh") @ states[1][lane, index].to(x.dtype)
    return (past.gather(-1, index)[:, :, None] @ rows[:, :, :, 0])[:, :, 0]


def _shares(
    call: Call, memory: LayerMemory, piece: _Tokens, cached: list[int], filled: list[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights of the cached states, [G, m, n], and of the online one, [G, m, 1] (Eq. 8-10, 16-17).

    Then which of the cached ones are read, where that is a choice, bool [G, m, n]; what lies past them is finite.
    """
    k, H, count = piece.k, call.q.shape[2], max(cached)
    G, m, _ = k.shape

    def by_row(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=k.dtype, device=k.device).repeat_interleave(H)[:, None, None]

    visible = None
    if min(cached) < count:
        visible = torch.arange(count, device=k.device) < by_row(cached)
    if not call.reads.routed:
        past = k.new_ones(G, m, count) if visible is None else visible.to(k.dtype).expand(G, m, count)
        return *even(call.reads, past, (by_row(cached) + 1).expand(G, m, 1)), None
    place = by_row(filled) + torch.arange(1, m + 1, dtype=k.dtype, device=k.device)[:, None]
    mean = (memory.key_sum.flatten(0, 1)[:, None] + k.cumsum(1)) / place
    own = (piece.u * mean).sum(-1, keepdim=True)
    past = piece.u @ memory.descriptors.flatten(0, 1)[:, :count].mT
    if visible is not None:
        past = past.masked_fill(~visible, float("-inf"))
    choice = chosen(call.reads, past, call.top_k, None)
    return *gamma(past, own, choice), choice
