"""The writes of deep memories whose loss is ||M(k) - v||^2, as rows: no state is formed (Eq. 34-36).

Segments start afresh, from U_0 and W_0 and without momentum. With e = 2 (v - M(k)), which is the error's opposite,
z = gelu(k U) and back = (e W^T) gelu'(k U), token t of a segment reads

    x U_t = c_t x U_0 + sum_{j <= t} c_tj (x k_j) back_j        x W_t = c_t x W_0 + sum_{j <= t} c_tj (x z_j) e_j

The rows of an inner chunk are made of those of the chunks before it: a program has a segment. ``deep_rows`` makes end
states and online reads of them, of many tokens at a time.
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
    Strengths,
    Tables,
    coefficients,
    gelu_slope_as,
    load_rows,
    row_of,
    rows_of,
    store_rows,
    strengths_of,
)
from .deep_rows_common import (
    Left,
    Weights,
    add_rows,
    alike,
    left_of,
    load_down,
    load_weights,
    read_back,
    read_down,
    read_up,
    weights_of,
)

INNER = 16
DK = 64
PK = 64
SK = 64
DV = 64
PV = 64
SV = 64
DE = 256
SE = 256
BJ = 32
EB = 256
num_stages = 1
num_warps = 4


@triton.jit(do_not_specialize=["T", "H", "span"])
def weights_kernel(strengths, spans, weights, T, H, span, ROWS: tl.constexpr, BC: tl.constexpr):
    """One program: the coefficients of a segment of a head, at most BC tokens, ROWS at a time."""
    segment = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    strengths = strengths_of(strengths, bh, T, H)
    begin = tl.load(spans.seg_begin + segment)
    end = tl.load(spans.seg_end + segment)
    i = tl.arange(0, ROWS)
    j = tl.arange(0, BC)
    # What the rows of earlier tokens weigh in the state that the next tokens are written into, and in its momentum.
    entered = tl.zeros([BC], tl.float32)
    moving = tl.zeros([BC], tl.float32)
    state = tl.full([], 1.0, tl.float32)
    for t0 in range(begin, end, ROWS):
        stop = tl.minimum(t0 + ROWS, end)
        by = coefficients(strengths, t0, stop, H, ROWS)
        here = t0 + i < stop
        before = t0 - begin
        place = weights_of(weights, bh, t0, T, span).pairs + i[:, None] * span
        earlier = by.state[:, None] * entered[None, :] + by.momentum[:, None] * moving[None, :]
        tl.store(place + j[None, :], earlier.to(place.dtype.element_ty), mask=here[:, None] & (j[None, :] < before))
        tl.store(place + before + i[None, :], by.rows.to(place.dtype.element_ty), mask=here[:, None] & here[None, :])
        tl.store(weights.state + bh * T + t0 + i, state * by.state, mask=here)
        last = stop - t0 - 1
        own = j[None, :] == (before + i)[:, None]
        keep = row_of(by.state, last)
        written = tl.sum(tl.where(own, row_of(by.rows, last)[:, None], 0.0), 0)
        entered = keep * entered + row_of(by.momentum, last) * moving + written
        written = tl.sum(tl.where(own, row_of(by.since, last)[:, None], 0.0), 0)
        moving = row_of(by.upto, last) * moving + written
        state *= keep


@triton.jit(do_not_specialize=["T", "H", "span"])
def write_rows_kernel(
    rows, first, spans, weights, left, added, T, H, span, dims: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr,
    BJ: tl.constexpr, BLOCKS: tl.constexpr, EB: tl.constexpr,
):  # fmt: skip
    """One program: the rows of a segment of a head, of its chunks one after another; hidden units in BLOCKS of EB.

    HELD: the first layers that stay in shared memory, "both" or "down"; others are read again by every chunk.
    """
    segment = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    begin = tl.load(spans.seg_begin + segment)
    end = tl.load(spans.seg_end + segment)
    rows = rows_of(rows, bh, T, H, dims)
    U = first.W_up + bh % H * (dims.DK * dims.DE)
    W = first.W_down + bh % H * (dims.DE * dims.DV)
    W = load_down(W, dims, BLOCKS, EB)
    left = left_of(left, bh, T, dims)
    # One stage: no load of a row may go ahead of the store before it.
    for t0 in tl.range(begin, end, INNER, num_stages=1):
        stop = tl.minimum(t0 + INNER, end)
        k_t = load_rows(rows.k, t0, stop, H * dims.DK, 0, dims.DK, ROWS, dims.PK)
        v_t = load_rows(rows.v, t0, stop, H * dims.DV, 0, dims.DV, ROWS, dims.PV)
        # The state that enters the chunk is the one that the last token before it has left.
        before = weights_of(weights, bh, t0 - 1, T, span)
        state = tl.load(before.state, mask=t0 > begin, other=1.0)
        # The loops below load rows that other threads have stored.
        tl.debug_barrier()
        hidden = read_up(state, k_t, U, False, "ieee", dims, BLOCKS, EB)
        for j in range(begin, t0, BJ):
            k_j = load_rows(rows.k, j, t0, H * dims.DK, 0, dims.DK, BJ, dims.PK)
            given = load_weights(before.pairs, j - begin, t0 - begin, BJ)
            pairs = (given * tl.dot(k_t, tl.trans(k_j), input_precision="ieee")).to(k_t.dtype)
            hidden = add_rows(hidden, pairs, left.back, j, t0, "ieee", dims, BJ, BLOCKS, EB)
        z_t = ()
        slopes = ()
        for i in tl.static_range(BLOCKS):
            gelu, slope = gelu_slope_as(hidden[i], k_t.dtype)
            gelu = gelu.to(k_t.dtype)
            store_rows(left.z, gelu, t0, stop, dims.SE, i * EB, dims.SE, ROWS, EB)
            z_t = z_t + (gelu,)
            slopes = slopes + (slope.to(k_t.dtype),)
        made = state * read_down(z_t, W, True, "ieee", dims, BLOCKS, EB)
        for j in range(begin, t0, BJ):
            pairs = alike(z_t, left.z, j, t0, "ieee", dims, BJ, BLOCKS, EB)
            error_j = load_rows(left.error, j, t0, dims.SV, 0, dims.SV, BJ, dims.PV)
            pairs = (load_weights(before.pairs, j - begin, t0 - begin, BJ) * pairs).to(k_t.dtype)
            made = tl.dot(pairs, error_j, made, input_precision="ieee")
        if dims.DK == dims.DV:
            made += added * k_t.to(tl.float32)
        error_t = (2.0 * (v_t.to(tl.float32) - made)).to(k_t.dtype)
        store_rows(left.error, error_t, t0, stop, dims.SV, 0, dims.SV, ROWS, dims.PV)
        through = read_back(state, error_t, W, True, "ieee", dims, BLOCKS, EB)
        for j in range(begin, t0, BJ):
            error_j = load_rows(left.error, j, t0, dims.SV, 0, dims.SV, BJ, dims.PV)
            given = load_weights(before.pairs, j - begin, t0 - begin, BJ)
            pairs = (given * tl.dot(error_t, tl.trans(error_j), input_precision="ieee")).to(k_t.dtype)
            through = add_rows(through, pairs, left.z, j, t0, "ieee", dims, BJ, BLOCKS, EB)
        for i in tl.static_range(BLOCKS):
            back_t = through[i] * slopes[i].to(tl.float32)
            store_rows(left.back, back_t, t0, stop, dims.SE, i * EB, dims.SE, ROWS, EB)


def deep_write_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor],
    strengths: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    tables: Tables,
    span: int,
    memory_residual: bool,
) -> tuple[Left, Weights]:
    """The rows of a row of tokens, and what they weigh.

    Args:
        k [B, T, H, DK], v [B, T, H, DV]: of one dtype.
        first: what every segment starts from, [H, DK, DE] and [H, DE, DV], of k's dtype.
        strengths: g, eta, mu [B, T, H], float32, None where absent.
        tables: segments, each one piece.
        span: tokens of the longest segment.
        memory_residual: whether the memory adds its input.
    """
    B, T, H, _ = k.shape
    dims, spans = Dims(DK, DV, DE, PK, PV, SK, SV, SE), Spans(tables.seg_begin, tables.seg_end)
    grid, rows = (tables.seg_begin.shape[0], B * H), triton.next_power_of_2(max(INNER, 16))
    weights = Weights(k.new_empty((B * H, T, span)), k.new_empty((B * H, T), dtype=torch.float32))
    weights_kernel[grid](
        strengths=Strengths(*strengths), spans=spans, weights=weights, T=T, H=H, span=span, ROWS=16,
        BC=triton.next_power_of_2(span), num_warps=4,
    )  # fmt: skip
    left = Left(*(k.new_empty((B * H, T, width)) for width in (SE, SE, SV)))
    write_rows_kernel[grid](
        rows=Rows(k, k, v), first=First(*first), spans=spans, weights=weights, left=left, added=float(memory_residual),
        T=T, H=H, span=span, dims=dims, INNER=INNER, ROWS=rows, BJ=BJ, BLOCKS=triton.cdiv(SE, EB), EB=EB,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return left, weights
