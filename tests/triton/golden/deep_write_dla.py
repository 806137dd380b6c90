"""The writes of deep memories, a chunk after another, and the online read that goes along (Eq. 30-31, 34-36).

    dla: L = -<M(k), v>, e = -v        titans: L = ||M(k) - v||^2, e = 2 (M(k) - v)
    z = gelu(k U)        back = (e W^T) gelu'(k U)        U <- c U - d S - k^T (c_j back), W <- c W - d S - z^T (c_j e)

A lane is what must go in sequence: a segment where states start afresh, a sequence where they are carried over. dla's
error is known beforehand, so that hidden units do not depend on each other: a program owns EB of them through a whole
lane, their states in registers, and leaves its part of the sum over hidden units. titans' takes z W over all of them
first: a program owns a lane, whose states stand in memory, and goes twice through the blocks of EB hidden units.

A token of the online segment reads the states as they are after its own write:

    x U_t = c_t x U - d_t x S - sum_{j <= t} c_tj (x k_j) back_j, then gelu, then the same with W, z_j and e_j
"""

from __future__ import annotations

from typing import NamedTuple

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
    gelu_as,
    gelu_slope_as,
    load_block,
    load_rows,
    rows_of,
    steps,
    store_block,
    store_rows,
    strengths_of,
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
EB = 64
num_stages = 1
num_warps = 4


class Written(NamedTuple):
    """What :func:`deep_write` leaves, N segments and PARTS of the hidden units; None what is not wanted.

    Attributes:
        up, down [B*H, N, SK, SE], [B*H, N, SE, SV]: end states, float32.
        up_operand, down_operand: the same in k's dtype, as operands of products.
        means [B*H, N, SK]: mean keys, float32.
        partials [PARTS, B, T, H, DV]: parts of the online reads, float32, without the input that a memory adds.
        hidden [B*H, T, SE]: where parameters are mixed, x U_t of the online memory in k's dtype.
        z [B*H, T, SE], error [B*H, T, SV]: where parameters are mixed, rows of the second layer's writes in k's dtype;
            no error where it is -v.
    """

    up: torch.Tensor | None
    down: torch.Tensor | None
    up_operand: torch.Tensor | None
    down_operand: torch.Tensor | None
    means: torch.Tensor | None
    partials: torch.Tensor | None
    hidden: torch.Tensor | None = None
    z: torch.Tensor | None = None
    error: torch.Tensor | None = None


@triton.jit(do_not_specialize=["T", "H", "N"])
def key_means_kernel(k, seg_begin, seg_end, means, T, H, N, dims: tl.constexpr, BT: tl.constexpr):
    """One program: the mean key of a segment of a head."""
    segment = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    begin = tl.load(seg_begin + segment)
    end = tl.load(seg_end + segment)
    k += (bh // H * T * H + bh % H) * dims.DK
    PK: tl.constexpr = dims.PK
    total = tl.zeros([PK], tl.float32)
    for t0 in range(begin, end, BT):
        total += tl.sum(load_rows(k, t0, end, H * dims.DK, 0, dims.DK, BT, dims.PK).to(tl.float32), 0)
    cols = tl.arange(0, PK)
    tl.store(means + (bh * N + segment) * dims.SK + cols, total / (end - begin), mask=cols < dims.SK)


@triton.jit
def _lane(lane):
    """The first segment of a lane, and one past its last."""
    return lane, lane + 1


@triton.jit
def _leave(made, up, down, place, column, dims: tl.constexpr, EB: tl.constexpr):
    """Store a block of EB hidden units of the end state of the segment at ``place``."""
    SIZE_UP: tl.constexpr = dims.SK * dims.SE
    SIZE_DOWN: tl.constexpr = dims.SE * dims.SV
    if made.up is not None:
        store_block(made.up + place * SIZE_UP, up, 0, column, dims.SK, dims.SE, dims.PK, EB)
        store_block(made.down + place * SIZE_DOWN, down, column, 0, dims.SE, dims.SV, EB, dims.PV)
    if made.up_operand is not None:
        store_block(made.up_operand + place * SIZE_UP, up, 0, column, dims.SK, dims.SE, dims.PK, EB)
        store_block(made.down_operand + place * SIZE_DOWN, down, column, 0, dims.SE, dims.SV, EB, dims.PV)


@triton.jit
def _read(x, z, down, error, before):
    """``[ROWS, PV]``: what the second layer makes of the hidden units ``x [EB, ROWS]`` of queries, theirs written.

    READ: the products' rows are those of the result, "tokens", few; or "columns" of values, whose state is transposed.
    """
    pairs = tl.where(before, tl.dot(tl.trans(z), x, input_precision="ieee"), 0.0).to(x.dtype)
    y = tl.dot(tl.trans(down), x, input_precision="ieee")
    return tl.trans(tl.dot(tl.trans(error), pairs, y, input_precision="ieee"))


@triton.jit(do_not_specialize=["T", "H", "N"])
def write_slices_kernel(
    rows, first, strengths, spans, made, scale, T, H, N, dims: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr,
    EB: tl.constexpr,
):  # fmt: skip
    """One program: EB hidden units of a lane of a head, their states in registers. Where the error is -v."""
    PARTS: tl.constexpr = (dims.SE + EB - 1) // EB
    part = tl.program_id(0) % PARTS
    column = part * EB
    bh = tl.program_id(1).to(tl.int64)
    rows = rows_of(rows, bh, T, H, dims)
    eta = strengths_of(strengths, bh, T, H).eta
    # Hidden units are rows, in the states and in the chunk's products alike: what a warp adds up, it reads itself.
    up = tl.trans(load_block(first.W_up + bh % H * (dims.DK * dims.DE), 0, column, dims.DK, dims.DE, dims.PK, EB))
    down = load_block(first.W_down + bh % H * (dims.DE * dims.DV), column, 0, dims.DE, dims.DV, EB, dims.PV)
    i = tl.arange(0, ROWS)
    before = i[:, None] <= i[None, :]
    here = bh // H * T * H + bh % H
    begins, ends = _lane(tl.program_id(0) // PARTS)
    for segment in range(begins, ends):
        end = tl.load(spans.seg_end + segment)
        for t0 in range(tl.load(spans.seg_begin + segment), end, INNER):
            stop = tl.minimum(t0 + INNER, end)
            k_t = load_rows(rows.k, t0, stop, H * dims.DK, 0, dims.DK, ROWS, dims.PK)
            v_t = load_rows(rows.v, t0, stop, H * dims.DV, 0, dims.DV, ROWS, dims.PV)
            q_t = load_rows(rows.q, t0, stop, H * dims.DK, 0, dims.DK, ROWS, dims.PK)
            step = steps(eta, t0, stop, H, ROWS)
            up_t = up.to(k_t.dtype)
            down_t = down.to(k_t.dtype)
            z, slope = gelu_slope_as(tl.dot(up_t, tl.trans(k_t), input_precision="ieee"), k_t.dtype)
            z = z.to(k_t.dtype)
            # Steps times errors, negative: [EB, ROWS] and [ROWS, PV].
            back = tl.dot(down_t, tl.trans(v_t), input_precision="ieee") * slope
            back = (back * step[None, :]).to(k_t.dtype)
            error = (v_t.to(tl.float32) * step[:, None]).to(k_t.dtype)
            scores = tl.where(before, tl.dot(k_t, tl.trans(q_t), input_precision="ieee"), 0.0).to(k_t.dtype)
            hidden = tl.dot(up_t, tl.trans(q_t), input_precision="ieee")
            hidden = tl.dot(back, scores, hidden, input_precision="ieee") * scale
            own = made.partials + (part * (tl.num_programs(1) * T).to(tl.int64) + here) * dims.DV
            y = _read(
                gelu_as(hidden, k_t.dtype).to(k_t.dtype), z, down_t, error, before
            )
            store_rows(own, y, t0, stop, H * dims.DV, 0, dims.DV, ROWS, dims.PV)
            up = tl.dot(back, k_t, up, input_precision="ieee")
            down = tl.dot(z, error, down, input_precision="ieee")
        _leave(made, tl.trans(up), down, bh * N + segment, column, dims, EB)


def _made(
    k: torch.Tensor, tables: Tables, exact: bool, parts: int, SK: int, SV: int, SE: int, DV: int,
) -> Written:  # fmt: skip
    """Room for what is left; states in float32 where products take them, too, or a lane's stand there."""
    (B, T, H, _), N = k.shape, tables.seg_begin.shape[0]
    heads, float32 = B * H, torch.float32
    up = down = up_operand = down_operand = means = partials = hidden = z = error = None
    if exact:
        up = k.new_empty((heads, N, SK, SE), dtype=float32)
        down = k.new_empty((heads, N, SE, SV), dtype=float32)
    up_operand, down_operand = k.new_empty((heads, N, SK, SE)), k.new_empty((heads, N, SE, SV))
    means = k.new_empty((heads, N, SK), dtype=float32)
    partials = k.new_empty((parts, B, T, H, DV), dtype=float32)
    return Written(up, down, up_operand, down_operand, means, partials, hidden, z, error)


def deep_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor],
    strengths: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    tables: Tables,
    scale: float,
    residual: bool,
    exact: bool,
) -> Written:
    """End states, mean keys and the online reads of a row of tokens (:class:`Written`).

    Args:
        q, k [B, T, H, DK], v [B, T, H, DV]: of one dtype.
        first: what every lane starts from, [H, DK, DE] and [H, DE, DV], float32.
        strengths: g, eta, mu [B, T, H], float32, None where absent.
        tables: segments, each one piece.
        scale: a memory is read with ``scale`` q.
        residual: whether the memory adds its input.
        exact: whether end states and mean keys are wanted in float32.

    Returns:
        The operands are the end states themselves where k is float32.
    """
    (B, T, H, _), N = k.shape, tables.seg_begin.shape[0]
    parts = triton.cdiv(SE, EB)
    lanes = N
    made = _made(k, tables, exact, parts, SK, SV, SE, DV)
    dims = Dims(DK, DV, DE, PK, PV, SK, SV, SE)
    spans = Spans(tables.seg_begin, tables.seg_end)
    rows = triton.next_power_of_2(max(INNER, 16))
    if made.means is not None:
        key_means_kernel[(N, B * H)](
            k=k, seg_begin=tables.seg_begin, seg_end=tables.seg_end, means=made.means, T=T, H=H, N=N, dims=dims,
            BT=min(128, 8192 // PK), num_warps=4,
        )  # fmt: skip
    write_slices_kernel[(lanes * parts, B * H)](
        rows=Rows(q, k, v), first=First(*first), strengths=Strengths(None, strengths[1], None), spans=spans, made=made,
        scale=scale, T=T, H=H, N=N, dims=dims, INNER=INNER, ROWS=rows, EB=EB, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return made
