"""For decoding: groups of pointers, jit helpers for writes and lists of the best, and logits. None has a flag."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOW = tl.constexpr(-3.0e38)
"""Less than any logit; unlike -inf its difference from itself is a number."""
BN = tl.constexpr(16)
"""Cached states whose logits are computed together."""
NONE = tl.constexpr(-(1 << 63))
"""In a list of logits: taken already."""


class Tokens(NamedTuple):
    """In one dtype: q, k, u ``[B, T, H, DK]``, v, y ``[B, T, H, DV]``; in a kernel, from a head's first row on."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    u: torch.Tensor
    y: torch.Tensor


class Writes(NamedTuple):
    """SWLA's gates, float32 ``[B, T, H]``; None for 0, 0 and 1."""

    g: torch.Tensor | None
    beta: torch.Tensor | None
    lam: torch.Tensor | None


class Blocks(NamedTuple):
    """NT: tokens; CP: logits; BK, BV: of a cached state; BO: columns of the online one; BS: of keys at a time."""

    NT: int
    CP: int
    BK: int
    BV: int
    BO: int
    BS: int


class Memory(NamedTuple):
    """A layer's: states ``[B, H, capacity, DK, DV]``; float32: descriptors ``[B, H, capacity, DK]``, online
    ``[B, H, DK, DV]``, key_sum and last_key ``[B, H, DK]``, last_value ``[B, H, DV]``.

    cached and filled: int32 ``[B]``, states and tokens of the segment under way; None where all sequences are alike.
    """

    states: torch.Tensor | None
    descriptors: torch.Tensor | None
    online: torch.Tensor | None
    key_sum: torch.Tensor | None
    last_key: torch.Tensor | None
    last_value: torch.Tensor | None
    cached: torch.Tensor | None
    filled: torch.Tensor | None


class Parts(NamedTuple):
    """A step's softmaxes over the online state and each split, float32: parts ``[B*H*n, SPLITS + 1, DV]``, weighted
    reads; stats ``[.., 2]``, largest logit and size; logits ``[B*H, n, CP]``, where computed before."""

    parts: torch.Tensor | None
    stats: torch.Tensor | None
    logits: torch.Tensor | None = None


@triton.jit
def load_place(memory, cached_all, filled_all, b, first, length):
    """States cached and tokens of the segment under way, of sequence b before token ``first`` of the call."""
    if memory.cached is not None:
        used = tl.load(memory.cached + b)
        begun = tl.load(memory.filled + b)
    else:
        used = cached_all
        begun = filled_all
    begun += first
    return used + begun // length, begun % length


@triton.jit
def load_row(x, width, D: tl.constexpr):
    """A row of ``width`` numbers as float32 [D], the rest 0."""
    d = tl.arange(0, D)
    return tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)


@triton.jit
def appended_scores(score, tokens, memory, i, used, begun, length, H, dims: tl.constexpr, CP: tl.constexpr):
    """[CP]: ``score`` with the logits of token i against the states that were appended since token 0."""
    state = tl.arange(0, CP)
    x = load_row(tokens.u + i * H * dims.DK, dims.DK, dims.PK)
    total = load_row(memory.key_sum, dims.DK, dims.PK)
    slot = used
    place = begun
    for j in range(0, i):
        total += load_row(tokens.k + j * H * dims.DK, dims.DK, dims.PK)
        place += 1
        if place == length:
            score = tl.where(state == slot, tl.sum(x * total, 0) / length, score)
            slot += 1
            place = 0
            total = tl.zeros_like(total)
    return score


@triton.jit
def scores(tokens, memory, logits, i, used, begun, length, H, dims: tl.constexpr, CP: tl.constexpr, BS: tl.constexpr):
    """[CP]: logits of token i against every state that it may read, those appended since token 0 included.

    ``used`` and ``begun`` are the place before token 0; ``logits``, where not None, has those of the ``used`` states.
    """
    DK: tl.constexpr = dims.DK
    PK: tl.constexpr = dims.PK
    state = tl.arange(0, CP)
    if logits is not None:
        score = tl.load(logits + i * CP + state, mask=state < used, other=0.0)
    else:
        score = tl.zeros([CP], tl.float32)
        for d0 in range(0, PK, BS):
            d = d0 + tl.arange(0, BS)
            x = tl.load(tokens.u + i * H * DK + d, mask=d < DK, other=0.0).to(tl.float32)
            inside = (state < used)[:, None] & (d < DK)[None, :]
            p = tl.load(memory.descriptors + state[:, None] * DK + d[None, :], mask=inside, other=0.0)
            score += tl.sum(p * x[None, :], 1)
    score = tl.where(state < used, score, LOW)
    if begun + i >= length:
        score = appended_scores(score, tokens, memory, i, used, begun, length, H, dims, CP)
    # One zero: what is compared by its bits must not tell +0 from -0.
    return tl.where(score == 0.0, 0.0, score)


@triton.jit
def ordered(x):
    """The bits of floats as int32 in the floats' order, and back again."""
    return tl.where(x < 0, x ^ 0x7FFFFFFF, x)


@triton.jit
def write_swla(M, key, value, kj, vj, writes, at):
    """The state after a token; key and value are those of the token before it."""
    if writes.g is not None:
        M *= tl.exp(tl.load(writes.g + at))
    if writes.beta is not None:
        M += (tl.load(writes.beta + at) * key)[:, None] * value[None, :]
    if writes.lam is not None:
        kj = tl.load(writes.lam + at) * kj
    return M + kj[:, None] * vj[None, :]


@triton.jit
def among_best(score, slot, top_k, CP: tl.constexpr):
    """Whether the logit of state ``slot`` is one of the best top_k of ``score``; of equal ones the older is better."""
    state = tl.arange(0, CP)
    own = tl.max(tl.where(state == slot, score, LOW), 0)
    better = (score > own) | ((score == own) & (state < slot))
    return tl.sum(better.to(tl.int32), 0) < top_k


@triton.jit
def append(memory, M, keys, slot, tile, x, capacity, length, dims: tl.constexpr):
    """A segment's end state and mean key. The host knows that there is room, unless the counts are on the device."""
    d = tl.arange(0, dims.PK)
    room = d < tl.where(slot < capacity, dims.DK, 0)
    ended = M.to(memory.states.dtype.element_ty)
    out = memory.states + slot.to(tl.int64) * dims.DK * dims.DV + tile
    tl.store(out, ended, mask=room[:, None] & (x < dims.DV)[None, :])
    tl.store(memory.descriptors + slot * dims.DK + d, keys / length, mask=room)


@triton.jit
def leave(out, place, high, size, reads, x, inside, dims: tl.constexpr):
    """A softmax's part of y, and what is known of it, at ``place`` of each token."""
    tl.store(out.parts + place[:, None] * dims.DV + x[None, :], reads, mask=inside[:, None] & (x < dims.DV)[None, :])
    tl.store(out.stats + place * 2, high, mask=inside)
    tl.store(out.stats + place * 2 + 1, size, mask=inside)


@triton.jit
def mean_scores(tokens, memory, group, slots, valid, n, H, dims: tl.constexpr, TT: tl.constexpr, BS: tl.constexpr):
    """[TT, BN]: logits of the tokens of a group against cached states."""
    DK: tl.constexpr = dims.DK
    PK: tl.constexpr = dims.PK
    score = tl.zeros([TT, BN], tl.float32)
    for d0 in range(0, PK, BS):
        d = d0 + tl.arange(0, BS)
        inside = (group < n)[:, None] & (d < DK)[None, :]
        w = tl.load(tokens.u + group[:, None] * H * DK + d[None, :], mask=inside, other=0.0).to(tl.float32)
        inside = valid[:, None] & (d < DK)[None, :]
        p = tl.load(memory.descriptors + slots[:, None] * DK + d[None, :], mask=inside, other=0.0)
        score += tl.sum(w[:, None, :] * p[None, :, :], 2)
    return score


@triton.jit
def take_best(order, slots, score, some, CP: tl.constexpr):
    """``order`` without its best ``some`` states, and those with their logits."""
    pick = tl.arange(0, BN)
    for i in range(0, some):
        best = tl.max(order, 0)
        order = tl.where(order == best, NONE, order)
        slots = tl.where(pick == i, CP - 1 - (best & 0xFFFFFFFF).to(tl.int32), slots)
        logit = ordered((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        score = tl.where((pick == i)[None, :], logit, score)
    return order, slots, score


@triton.jit(do_not_specialize=["cached_all", "filled_all", "first", "total", "H", "capacity", "length"])
def logits_kernel(
    u, memory, logits, cached_all, filled_all, first, n, total, H, capacity, length,
    CP: tl.constexpr, BS: tl.constexpr, dims: tl.constexpr,
):  # fmt: skip
    """logits [B * H, n, CP] of n tokens against the states cached before them; a program has BS states."""
    bh = tl.program_id(0).to(tl.int64)
    used, _ = load_place(memory, cached_all, filled_all, bh // H, first, length)
    u += ((bh // H * total + first) * H + bh % H) * dims.DK
    state = tl.program_id(1) * BS + tl.arange(0, BS)
    d = tl.arange(0, dims.PK)
    inside = (state < used)[:, None] & (d < dims.DK)[None, :]
    rows = memory.descriptors + (bh * capacity + state[:, None]) * dims.DK
    p = tl.load(rows + d[None, :], mask=inside, other=0.0)
    for i in range(0, n):
        x = load_row(u + i * H * dims.DK, dims.DK, dims.PK)
        tl.store(logits + (bh * n + i) * CP + state, tl.sum(p * x[None, :], 1), mask=state < used)


def logits_of(
    u: torch.Tensor,
    memory: Memory,
    cached_all: int,
    filled_all: int,
    first: int,
    n: int,
    length: int,
    CP: int,
    dims: NamedTuple,
) -> torch.Tensor:
    """logits ``[B*H, n, CP]`` of tokens first to first + n against the states cached before them."""
    B, total, H, _ = u.shape
    capacity = memory.descriptors.shape[2]
    logits = torch.empty(B * H, n, CP, dtype=torch.float32, device=u.device)
    memory = memory._replace(states=None, online=None, key_sum=None, last_key=None, last_value=None)
    logits_kernel[(B * H, triton.cdiv(capacity, 16))](
        u=u, memory=memory, logits=logits, cached_all=cached_all, filled_all=filled_all, first=first, n=n, total=total,
        H=H, capacity=capacity, length=length, CP=CP, BS=16, dims=dims, num_warps=4,
    )  # fmt: skip
    return logits
