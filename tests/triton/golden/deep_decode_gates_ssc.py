"""Before a deep memory takes a token: its gates (Eq. 8-10, 16-17), and for titans the outputs that errors are made of.

r_i = <u, p_i>, r_s = <u, mean of the segment's keys, the token's included>        gamma = softmax of r
o = gelu(k U) W        at the state that entered the inner chunk: in parts over hidden units
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from .deep_decode_common import Memory, Parts, Shares, Tokens, Widths, load_place, load_row

DK = 64
PK = 64
DV = 64
PV = 64
DE = 256
EB = 32
num_warps = 4

LOW = tl.constexpr(-3.0e38)
"""Less than any logit; unlike -inf its difference from itself is a number."""


@triton.jit
def _gates(
    tokens, memory, shares, bh, used, begun, top_k, widths: tl.constexpr, CP: tl.constexpr, MOST: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """The gates of all states, or under ssc of the top_k best and their numbers; of equal logits the earlier is better.

    NaN counts as the largest, so that it is not lost.
    """
    state = tl.arange(0, CP)
    keys = load_row(memory.key_sum, widths.DK, widths.PK) + load_row(tokens.k, widths.DK, widths.PK)
    own = tl.sum(load_row(tokens.u, widths.DK, widths.PK) * keys, 0) / (begun + 1).to(tl.float32)
    score = tl.zeros([CP], tl.float32)
    for d0 in range(0, widths.PK, BS):
        d = d0 + tl.arange(0, BS)
        x = tl.load(tokens.u + d, mask=d < widths.DK, other=0.0).to(tl.float32)
        inside = (state < used)[:, None] & (d < widths.DK)[None, :]
        p = tl.load(memory.descriptors + state[:, None] * widths.DK + d[None, :], mask=inside, other=0.0)
        score += tl.sum(p * x[None, :], 1)
    score = tl.where(state < used, score, LOW)
    left = tl.where(score != score, float("inf"), score)
    top = own
    size = 1.0
    for r in range(0, top_k):
        best = tl.max(left, 0)
        which = tl.min(tl.where(left == best, state, CP), 0)
        logit = tl.sum(tl.where(state == which, score, 0.0), 0)
        taken = r < used
        tl.store(shares.chosen + bh * MOST + r, tl.where(taken, which, 0))
        tl.store(shares.gammas + bh * MOST + r, tl.where(taken, logit, LOW))
        new = tl.where(taken, tl.maximum(top, logit), top)
        size = size * tl.exp(top - new) + tl.where(taken, tl.exp(logit - new), 0.0)
        top = new
        left = tl.where(state == which, float("-inf"), left)
    # Other threads have written logits that are read now.
    tl.debug_barrier()
    r = tl.arange(0, MOST)
    logits = tl.load(shares.gammas + bh * MOST + r, mask=r < top_k, other=LOW)
    tl.debug_barrier()
    tl.store(shares.gammas + bh * MOST + r, tl.exp(logits - top) / size, mask=r < top_k)
    tl.store(shares.own + bh, tl.exp(own - top) / size)


@triton.jit(do_not_specialize=["cached_all", "filled_all", "first", "total", "H", "capacity", "length", "top_k"])
def deep_prepare_kernel(
    tokens, memory, shares, cached_all, filled_all, first, total, H, capacity, length, top_k, widths: tl.constexpr,
    CP: tl.constexpr, MOST: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Of a head: EB hidden units of the outputs a program, where there are outputs, and the gates one more."""
    bh = tl.program_id(0).to(tl.int64)
    pid = tl.program_id(1)
    BLOCKS: tl.constexpr = (widths.DE + widths.EB - 1) // widths.EB
    used, begun = load_place(memory, cached_all, filled_all, bh // H, first, length)
    row = (bh // H * total + first) * H + bh % H
    if pid == tl.num_programs(1) - 1:
        mine = Tokens(None, tokens.k + row * widths.DK, None, tokens.u + row * widths.DK, None)
        keys = Memory(
            None, None, None, None, None, None, None, None, None, None,
            memory.descriptors + bh * capacity * widths.DK, memory.key_sum + bh * widths.DK, None, None,
        )  # fmt: skip
        _gates(mine, keys, shares, bh, used, begun, top_k, widths, CP, MOST, BS)


def deep_decode_gates(
    tokens: Tokens, memory: Memory, cached_all: int, filled_all: int, first: int, length: int, top_k: int,
) -> tuple[Shares, Parts]:  # fmt: skip
    """Gates of token ``first`` and the outputs' parts; None where there are no such. Arguments: :mod:`deep_decode`."""
    (B, total, H, _), capacity = tokens.k.shape, memory.descriptors.shape[2]
    shares, parts, programs, like = Shares(), Parts(), 0, memory.key_sum
    CP = max(16, triton.next_power_of_2(capacity))
    most = CP
    programs += 1
    chosen = None
    most = triton.next_power_of_2(top_k)
    chosen = like.new_empty((B * H, most), dtype=torch.int32)
    shares = Shares(like.new_empty((B * H, most)), like.new_empty((B * H,)), chosen)
    if programs > 0:
        deep_prepare_kernel[(B * H, programs)](
            tokens=tokens, memory=memory, shares=shares, cached_all=cached_all, filled_all=filled_all, first=first,
            total=total, H=H, capacity=capacity, length=length, top_k=top_k, widths=Widths(DK, DV, DE, PK, PV, EB),
            CP=CP, MOST=most, BS=max(4, min(PK, 4096 // CP)), num_warps=num_warps,
        )  # fmt: skip
    return shares, parts
