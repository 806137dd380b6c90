"""The writes of deep memories whose loss is -<M(k), v>, and the online read that goes along (Eq. 30-31).

    e = -v        z = gelu(k U)        back = (e W^T) gelu'(k U)
    U <- U - k^T (eta_j back)        W <- W - z^T (eta_j e)

The error is known beforehand, so that hidden units do not depend on each other: a program owns EB of them through a
whole lane, their states in registers, and leaves its part of the sum over hidden units. A token of the online segment
reads the states as they are after its own write:

    x U_t = x U - sum_{j <= t} eta_j (x k_j) back_j, then gelu, then the same with W, z_j and e_j
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .deep_common import (
    Dims,
    First,
    Rows,
    Strengths,
    Tables,
    gelu_as,
    gelu_slope_as,
    load_block,
    load_rows,
    rows_of,
    steps,
    store_rows,
    strengths_of,
)
from .deep_write_common import Written, as_operands, lanes_of, leave, room_for, segments_of

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


@triton.jit
def _read(x, z, down, error, before):
    """``[ROWS, PV]``: what the second layer makes of the hidden units ``x [EB, ROWS]`` of queries, theirs written.

    READ: the products' rows are those of the result, "tokens", few; or "columns" of values, whose state is transposed.
    """
    rows = tl.trans(x)
    pairs = tl.where(tl.trans(before), tl.dot(rows, z, input_precision="ieee"), 0.0).to(x.dtype)
    y = tl.dot(rows, down, input_precision="ieee")
    return tl.dot(pairs, error, y, input_precision="ieee")


@triton.jit(do_not_specialize=["T", "H", "N"])
def write_slices_kernel(
    rows, first, strengths, spans, made, scale, T, H, N, dims: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr,
    EB: tl.constexpr,
):  # fmt: skip
    """One program: EB hidden units of a lane of a head, their states in registers."""
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
    begins, ends = segments_of(spans, tl.program_id(0) // PARTS)
    for segment in range(begins, ends):
        end = tl.load(spans.seg_end + segment)
        for t0 in range(tl.load(spans.seg_begin + segment), end, INNER):
            stop = tl.minimum(t0 + INNER, end)
            k_t = load_rows(rows.k, t0, stop, H * dims.DK, 0, dims.DK, ROWS, dims.PK)
            v_t = load_rows(rows.v, t0, stop, H * dims.DV, 0, dims.DV, ROWS, dims.PV)
            step = steps(eta, t0, stop, H, ROWS)
            up_t = up.to(k_t.dtype)
            down_t = down.to(k_t.dtype)
            z, slope = gelu_slope_as(tl.dot(up_t, tl.trans(k_t), input_precision="ieee"), k_t.dtype)
            z = z.to(k_t.dtype)
            # Steps times errors, negative. No product reads v itself: what is loaded ahead has one kind of reader.
            error = (v_t.to(tl.float32) * step[:, None]).to(k_t.dtype)
            back = (tl.dot(down_t, tl.trans(error), input_precision="ieee") * slope).to(k_t.dtype)
            q_t = load_rows(rows.q, t0, stop, H * dims.DK, 0, dims.DK, ROWS, dims.PK)
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
        leave(made, tl.trans(up), down, bh * N + segment, column, dims, EB)


def deep_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor],
    strengths: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    tables: Tables,
    scale: float,
    memory_residual: bool,
    exact: bool,
) -> Written:
    """End states, mean keys and the online reads of a row of tokens (:class:`Written`).

    Args:
        q, k [B, T, H, DK], v [B, T, H, DV]: of one dtype.
        first: what every lane starts from, [H, DK, DE] and [H, DE, DV], float32.
        strengths: g, eta, mu [B, T, H], float32, None where absent.
        tables: segments, each one piece.
        scale: a memory is read with ``scale`` q.
        memory_residual: whether the memory adds its input.
        exact: whether end states and mean keys are wanted in float32.
    """
    B, T, H, _ = k.shape
    parts = triton.cdiv(SE, EB)
    dims = Dims(DK, DV, DE, PK, PV, SK, SV, SE)
    lanes, spans = lanes_of(tables, True)
    made = room_for(k, tables, dims, states=exact or False, operands=True, means=exact or True)
    made = made._replace(partials=k.new_empty((parts, B, T, H, DV), dtype=torch.float32))
    write_slices_kernel[(lanes * parts, B * H)](
        rows=Rows(q, k, v), first=First(*first), strengths=Strengths(None, strengths[1], None), spans=spans, made=made,
        scale=scale, T=T, H=H, N=tables.seg_begin.shape[0], dims=dims, INNER=INNER,
        ROWS=triton.next_power_of_2(max(INNER, 16)), EB=EB, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return as_operands(made)
