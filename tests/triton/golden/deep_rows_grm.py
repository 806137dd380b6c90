"""End states and online reads of deep memories, of the rows that ``deep_write_rows`` leaves (Eq. 34-36).

    U_t = c_t U_0 + sum_{j <= t} c_tj k_j^T back_j        W_t = c_t W_0 + sum_{j <= t} c_tj z_j^T e_j

A read with U_t, and one with W_t, are causal linear attentions with weights: of all tokens of a tile at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .deep_common import (
    Dims,
    First,
    Rows,
    Spans,
    Tables,
    gelu_as,
    load_block,
    load_rows,
    load_tile,
    rows_of,
    store_rows,
)
from .deep_rows_common import (
    Left,
    Weights,
    add_rows,
    left_of,
    load_tile_weights,
    load_weights,
    read_second,
    read_up,
    tile_state,
    weights_of,
)
from .deep_write_common import Written, as_operands, leave, room_for

DK = 64
PK = 64
SK = 64
DV = 64
PV = 64
SV = 64
DE = 256
SE = 256
BJ = 32
BT = 128
EB = 256
num_stages = 2
num_warps = 8


@triton.jit(do_not_specialize=["T", "H", "N", "span"])
def row_states_kernel(
    rows, first, left, weights, spans, made, T, H, N, span, dims: tl.constexpr, BJ: tl.constexpr, EB: tl.constexpr,
):  # fmt: skip
    """One program: EB hidden units of the end state of a segment of a head."""
    PARTS: tl.constexpr = (dims.SE + EB - 1) // EB
    e = tl.program_id(0) % PARTS * EB
    segment = tl.program_id(0) // PARTS
    bh = tl.program_id(1).to(tl.int64)
    begin = tl.load(spans.seg_begin + segment)
    end = tl.load(spans.seg_end + segment)
    rows = rows_of(rows, bh, T, H, dims)
    left = left_of(left, bh, T, dims)
    last = weights_of(weights, bh, end - 1, T, span)
    state = tl.load(last.state)
    up = load_block(first.W_up + bh % H * (dims.DK * dims.DE), 0, e, dims.DK, dims.DE, dims.PK, EB)
    down = load_block(first.W_down + bh % H * (dims.DE * dims.DV), e, 0, dims.DE, dims.DV, EB, dims.PV)
    up = state * up.to(tl.float32)
    down = state * down.to(tl.float32)
    for j in range(begin, end, BJ):
        k_j = load_rows(rows.k, j, end, H * dims.DK, 0, dims.DK, BJ, dims.PK)
        z_j = load_rows(left.z, j, end, dims.SE, e, dims.SE, BJ, EB)
        back_j = load_rows(left.back, j, end, dims.SE, e, dims.SE, BJ, EB)
        error_j = load_rows(left.error, j, end, dims.SV, 0, dims.SV, BJ, dims.PV)
        given = tl.trans(load_weights(last.pairs, j - begin, end - begin, BJ))
        up = tl.dot(tl.trans((k_j * given).to(k_j.dtype)), back_j, up, input_precision="ieee")
        down = tl.dot(tl.trans(z_j), (error_j * given).to(k_j.dtype), down, input_precision="ieee")
    leave(made, up, down, bh * N + segment, e, dims, EB)


@triton.jit(do_not_specialize=["T", "H", "span"])
def row_read_kernel(
    rows, first, left, weights, spans, tiles, made, scale, T, H, span, dims: tl.constexpr, BT: tl.constexpr,
    BJ: tl.constexpr, BLOCKS: tl.constexpr, EB: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens of a head; where parameters are mixed, x U_t, else what the memory makes of x."""
    bh = tl.program_id(1).to(tl.int64)
    tile = load_tile(tiles + tl.program_id(0) * 2, spans, BT)
    begin = tl.load(spans.seg_begin + tile.segment)
    rows = rows_of(rows, bh, T, H, dims)
    left = left_of(left, bh, T, dims)
    q_t = load_rows(rows.q, tile.first, tile.stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
    state = tile_state(weights, bh, tile, T, BT)
    U = first.W_up + bh % H * (dims.DK * dims.DE)
    hidden = read_up(state, q_t, U, False, "ieee", dims, BLOCKS, EB)
    for j in range(begin, tile.stop, BJ):
        k_j = load_rows(rows.k, j, tile.stop, H * dims.DK, 0, dims.DK, BJ, dims.PK)
        given = load_tile_weights(weights, bh, tile.first, tile.stop, begin, j - begin, T, span, BT, BJ)
        pairs = (given * tl.dot(q_t, tl.trans(k_j), input_precision="ieee")).to(q_t.dtype)
        hidden = add_rows(hidden, pairs, left.back, j, tile.stop, "ieee", dims, BJ, BLOCKS, EB)
    x = ()
    for i in tl.static_range(BLOCKS):
        x = x + (gelu_as(hidden[i] * scale, q_t.dtype).to(q_t.dtype),)
    W = first.W_down + bh % H * (dims.DE * dims.DV)
    y = read_second(state, x, W, left, weights, bh, tile, begin, T, span, "ieee", dims, BT, BJ, BLOCKS, EB)
    partials = made.partials + (bh // H * T * H + bh % H) * dims.DV
    store_rows(partials, y, tile.first, tile.stop, H * dims.DV, 0, dims.DV, BT, dims.PV)


def deep_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor],
    left: Left,
    weights: Weights,
    tables: Tables,
    tiles: torch.Tensor,
    scale: float,
    exact: bool,
) -> Written:
    """End states, mean keys and the online reads of a row of tokens (:class:`Written`).

    Args:
        q, k [B, T, H, DK]: of one dtype.
        first: what every segment starts from, [H, DK, DE] and [H, DE, DV], of k's dtype.
        left, weights: of ``deep_write_rows``.
        tables: segments, each one piece.
        tiles: of BT tokens.
        scale: a memory is read with ``scale`` q.
        exact: whether end states and mean keys are wanted in float32.
    """
    B, T, H, _ = k.shape
    N, parts, span = tables.seg_begin.shape[0], triton.cdiv(SE, EB), weights.pairs.shape[2]
    dims, spans = Dims(DK, DV, DE, PK, PV, SK, SV, SE), Spans(tables.seg_begin, tables.seg_end, tables.seg_first)
    made = room_for(k, tables, dims, states=exact or False, operands=True, means=exact or True)
    row_states_kernel[(N * parts, B * H)](
        rows=Rows(k, k, k), first=First(*first), left=left, weights=weights, spans=spans, made=made, T=T, H=H, N=N,
        span=span, dims=dims, BJ=BJ, EB=EB, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    made = made._replace(partials=k.new_empty((1, B, T, H, DV), dtype=torch.float32))
    row_read_kernel[(tiles.shape[0], B * H)](
        rows=Rows(q, k, k), first=First(*first), left=left, weights=weights, spans=spans, tiles=tiles, made=made,
        scale=scale, T=T, H=H, span=span, dims=dims, BT=BT, BJ=BJ, BLOCKS=parts, EB=EB, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return as_operands(made)
