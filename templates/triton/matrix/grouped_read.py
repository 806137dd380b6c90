"""The read of the cached states that ssc chose, grouped by state (Eq. 16-17): its cost grows with top_k, not with N.

A pair is a token and one of its chosen segments. Pairs in the order of their segments are rows of one product a
segment; every pair leaves gamma_t^(i) q_t M^(i), which :mod:`read_forward` adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import Dims, Gates, Pairs, States, Tables, last_piece, load_state


@triton.jit
def _find_pairs(starts, tile, N, ROWS: tl.constexpr):
    """Segment, first pair and one past the last of a head's tile of at most ROWS pairs of one segment.

    ``starts``: the head's, of :mod:`pair_order`. Segment N has the pairs without one. A tile may have none: then both
    ends meet.
    """
    low = 0
    high = N + 1
    # Tiles of the segments before i: its first pair over ROWS, rounded down, plus i. The last i not beyond the tile.
    while low < high - 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // ROWS + middle <= tile:
            low = middle
        else:
            high = middle
    first = tl.load(starts + low)
    begin = first + (tile - (first // ROWS + low)) * ROWS
    return low, begin, tl.maximum(begin, tl.minimum(begin + ROWS, tl.load(starts + low + 1)))


@triton.jit(do_not_specialize=["first_head", "block", "blocks", "top_k", "T", "H", "N", "P"])
def grouped_read_kernel(
    q, states, pairs, gates, seg_last, partial, first_head, block, blocks, top_k, T, H, N, P,
    PRECISION: tl.constexpr, dims: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """One program: at most ROUNDS times BT pairs of one segment of a block of tokens, BV value columns, one head."""
    BLOCKS: tl.constexpr = (dims.DV + BV - 1) // BV
    column = tl.program_id(0) % BLOCKS * BV
    tile = tl.program_id(0) // BLOCKS
    bh = tl.program_id(1).to(tl.int64) + first_head
    starts = pairs.starts + (bh * blocks + block) * (N + 2)
    i, first, stop = _find_pairs(starts, tile, N, ROWS=BT * ROUNDS)
    if (i < N) & (first < stop):
        order = pairs.order + bh * (T * top_k)
        if pairs.runs is not None:
            order += tl.load(pairs.runs + (bh * blocks + block) * (N + 1) + i) - tl.load(starts + i)
        picked = gates.picked + bh * (T * top_k)
        # The heads and the tokens of this launch.
        span = T // blocks
        partial += ((bh - first_head) * span - block * span) * top_k * dims.DV
        keys = tl.arange(0, dims.PK)
        cols = column + tl.arange(0, BV)
        states += (bh * P + last_piece(seg_last, i)) * (dims.SK * dims.SV)
        state = load_state(states, 0, column, dims.SK, dims.SV, dims.PK, BV)
        for p0 in range(first, stop, BT):
            pair = p0 + tl.arange(0, BT)
            valid = pair < stop
            place = tl.load(order + pair, mask=valid, other=0)
            t = place // top_k
            rows = q + ((bh // H * T + t) * H + bh % H)[:, None] * dims.DK + keys[None, :]
            q_t = tl.load(rows, mask=valid[:, None] & (keys < dims.DK)[None, :], other=0.0)
            total = tl.load(gates.lse + bh * T + t, mask=valid, other=0.0)
            gamma = tl.exp(tl.load(picked + place, mask=valid, other=0.0) - total)
            read = tl.dot(q_t, state, input_precision=PRECISION) * gamma[:, None]
            out = partial + place.to(tl.int64)[:, None] * dims.DV + cols[None, :]
            tl.store(out, read.to(partial.dtype.element_ty), mask=valid[:, None] & (cols < dims.DV)[None, :])


def grouped_read(
    q: torch.Tensor,
    states: States,
    order: torch.Tensor,
    starts: torch.Tensor,
    runs: torch.Tensor | None,
    gates: Gates,
    tables: Tables,
    first_head: int,
    heads: int,
    block: int,
    blocks: int,
    PRECISION: str,
    DK: int,
    DV: int,
    PK: int,
    PV: int,
    SK: int,
    SV: int,
    BT: int,
    BV: int,
    ROUNDS: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    """partial ``[heads, T / blocks, top_k, DV]``, of q's dtype: gates times reads, without ``scale``, of pairs with a
    segment.

    Args:
        q [B, T, H, DK], states [B*H, P, SK, SV]: of one dtype.
        order, starts, runs: of :mod:`pair_order`, the last two of blocks, if there are several; else runs is None.
        first_head, heads, block, blocks: which heads, and which of so many blocks of tokens.
    """
    _, T, H, _ = q.shape
    N, P = tables.seg_first.shape[0], tables.begin.shape[0]
    top_k = gates.picked.shape[-1]
    pairs = T // blocks * top_k
    partial = q.new_empty((heads, T // blocks, top_k, DV))
    bv = min(BV, PV)
    # No more tiles than this, however the pairs fall.
    tiles = triton.cdiv(pairs, BT * ROUNDS) + N + 1
    grouped_read_kernel[(triton.cdiv(DV, bv) * tiles, heads)](
        q=q, states=states.operand, pairs=Pairs(order, starts, runs), gates=Gates(None, gates.lse, picked=gates.picked),
        seg_last=tables.seg_last if P > N else None, partial=partial, first_head=first_head, block=block, blocks=blocks,
        top_k=top_k, T=T, H=H, N=N, P=P, PRECISION=PRECISION, dims=Dims(DK, DV, PK, PV, SK, SV), BT=BT, BV=bv,
        ROUNDS=ROUNDS, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return partial
