"""The read of a deep Memory Caching layer that mixes answers (Eq. 6-13, 16-17).

    y_t = gamma_t^(s) M_t(x_t) + sum_{i < s} gamma_t^(i) M^(i)(x_t)        x = scale q
    M^(i)(x) = gelu(x U^(i)) W^(i) (+ x)

An attention without a softmax: the columns of the U^(i) are its keys and the rows of the W^(i) its values, read EB
hidden units at a time; a gate scales the hidden units of its state. The input that memories add is added once: times
the sum of the gates, which is 1 where they are learned, and the number of states where they all are 1.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .deep_common import (
    Dims,
    Gates,
    Layers,
    Spans,
    Tables,
    block_and_head,
    gelu_as,
    load_block,
    load_rows,
    load_tile,
    store_rows,
)


@triton.jit
def _add_read(acc, q_t, gate, states, place, e, scale, PRECISION: tl.constexpr, dims: tl.constexpr, EB: tl.constexpr):
    """acc and the gated read of EB hidden units of the state at ``place``."""
    up = load_block(states.up + place * (dims.SK * dims.SE), 0, e, dims.SK, dims.SE, dims.PK, EB)
    down = load_block(states.down + place * (dims.SE * dims.SV), e, 0, dims.SE, dims.SV, EB, dims.PV)
    z = gelu_as(tl.dot(q_t, up, input_precision=PRECISION) * scale, q_t.dtype)
    if gate is not None:
        z *= gate[:, None]
    return tl.dot(z.to(q_t.dtype), down, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["parts", "together", "T", "H", "N"])
def deep_read_kernel(
    q, states, gates, partials, spans, tiles, y, scale, added, parts, together, T, H, N,
    ROUTED: tl.constexpr, SPARSE: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, BT: tl.constexpr,
    EB: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens of a head. Under ssc a logit may be -inf; it is NaN where unwritten."""
    BLOCKS: tl.constexpr = (dims.SE + EB - 1) // EB
    block, bh = block_and_head(together)
    tile = load_tile(tiles + block * 2, spans, BT)
    t = tile.first + tl.arange(0, BT)
    valid = t < tile.stop
    head = bh // H * T * H + bh % H
    q_t = load_rows(q + head * dims.DK, tile.first, tile.stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
    PV: tl.constexpr = dims.PV
    acc = tl.zeros([BT, PV], tl.float32)
    for part in range(0, parts):
        own = partials + (part * (tl.num_programs(1) * together * T).to(tl.int64) + head) * dims.DV
        acc += load_rows(own, tile.first, tile.stop, H * dims.DV, 0, dims.DV, BT, dims.PV)
    if ROUTED:
        lse = tl.load(gates.lse + bh * T + t, mask=valid, other=0.0)
        row = gates.logits + bh * N * T + t
        acc *= tl.exp(tl.load(row + tile.segment.to(tl.int64) * T, mask=valid, other=0.0) - lse)[:, None]
    if dims.DK == dims.DV:
        if ROUTED:
            acc += (added * scale) * q_t.to(tl.float32)
        else:
            acc += (added * scale * (tile.segment - tile.oldest + 1)) * q_t.to(tl.float32)
    if SPARSE:
        for i in range(tile.oldest, tile.segment):
            gate = tl.exp(tl.load(row + tl.cast(i, tl.int64) * T, mask=valid, other=float("-inf")) - lse)
            # A state that no token of the tile has chosen is not read; NaN counts as chosen.
            if tl.max((gate != 0.0).to(tl.int32), 0) != 0:
                for e in range(0, dims.SE, EB):
                    acc = _add_read(acc, q_t, gate, states, bh * N + i, e, scale, PRECISION=PRECISION, dims=dims, EB=EB)
    else:
        # One loop over all blocks of all states, so that loads go ahead from one state to the next.
        for n in range(tile.oldest * BLOCKS, tile.segment * BLOCKS):
            i = n // BLOCKS
            gate = None
            if ROUTED:
                gate = tl.exp(tl.load(row + tl.cast(i, tl.int64) * T, mask=valid, other=float("-inf")) - lse)
            acc = _add_read(
                acc, q_t, gate, states, bh * N + i, n % BLOCKS * EB, scale, PRECISION=PRECISION, dims=dims, EB=EB
            )
    store_rows(y + head * dims.DV, acc, tile.first, tile.stop, H * dims.DV, 0, dims.DV, BT, dims.PV)


def deep_read(
    q: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    gates: Gates | None,
    partials: torch.Tensor,
    tables: Tables,
    tiles: torch.Tensor,
    scale: float,
    memory_residual: bool,
    ROUTED: bool,
    SPARSE: bool,
    PRECISION: str,
    DK: int,
    DV: int,
    DE: int,
    PK: int,
    PV: int,
    SK: int,
    SV: int,
    SE: int,
    BT: int,
    EB: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    """y ``[B, T, H, DV]``, of q's dtype.

    Args:
        q [B, T, H, DK].
        states: end states of segments as operands, [B*H, N, SK, SE] and [B*H, N, SE, SV], in q's dtype.
        gates: of ``gates``, logits and lse; None where they are not learned.
        partials [parts, B, T, H, DV]: of ``deep_write``, float32.
        tiles: of BT tokens.
        memory_residual: whether the memory adds its input.
    """
    B, T, H, _ = q.shape
    together = math.gcd(B * H, 8)
    y = q.new_empty((B, T, H, DV))
    deep_read_kernel[(tiles.shape[0] * together, B * H // together)](
        q=q, states=Layers(*states), gates=None if gates is None else Gates(gates.logits, gates.lse), partials=partials,
        spans=Spans(None, tables.seg_end, tables.seg_first), tiles=tiles, y=y, scale=scale,
        added=float(memory_residual), parts=partials.shape[0], together=together, T=T, H=H,
        N=tables.seg_first.shape[0], ROUTED=ROUTED, SPARSE=SPARSE, PRECISION=PRECISION,
        dims=Dims(DK, DV, DE, PK, PV, SK, SV, SE), BT=BT, EB=EB, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return y
