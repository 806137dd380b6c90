"""The writes of deep memories whose loss is ||M(k) - v||^2, and the online read that goes along (Eq. 34-36).

    e = 2 (M(k) - v)        z = gelu(k U)        back = (e W^T) gelu'(k U)
    U <- c U - d S - k^T (c_j back), W <- c W - d S - z^T (c_j e)        S <- m S + k^T (m_j back), m S + z^T (m_j e)

The error takes z W over all hidden units first: a program owns a lane, whose states stand in memory, and goes twice
through the blocks of EB hidden units, a chunk after another. A token of the online segment reads the states as they are
after its own write:

    x U_t = c_t x U - d_t x S - sum_{j <= t} c_tj (x k_j) back_j, then gelu, then the same with W, z_j and e_j
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .deep_common import (
    Dims,
    First,
    Layers,
    Rows,
    Strengths,
    Tables,
    coefficients,
    gelu_as,
    gelu_slope_as,
    load_block,
    load_rows,
    row_of,
    rows_of,
    store_block,
    store_rows,
    strengths_of,
)
from .deep_write_common import Written, as_operands, lanes_of, room_for, segments_of


@triton.jit
def _start(first, state, momentum, place, bh, H, dims: tl.constexpr, EB: tl.constexpr):
    """Copy the first state of a lane to ``place``; its momentum is 0."""
    first_up = first.W_up + bh % H * (dims.DK * dims.DE)
    first_down = first.W_down + bh % H * (dims.DE * dims.DV)
    for e in range(0, dims.SE, EB):
        up = load_block(first_up, 0, e, dims.DK, dims.DE, dims.PK, EB)
        down = load_block(first_down, e, 0, dims.DE, dims.DV, EB, dims.PV)
        store_block(state.up, up, 0, e, dims.SK, dims.SE, dims.PK, EB)
        store_block(state.down, down, e, 0, dims.SE, dims.SV, EB, dims.PV)
        if momentum is not None:
            store_block(momentum.up, tl.zeros_like(up), 0, e, dims.SK, dims.SE, dims.PK, EB)
            store_block(momentum.down, tl.zeros_like(down), e, 0, dims.SE, dims.SV, EB, dims.PV)


@triton.jit
def _memory(layers, place, dims: tl.constexpr):
    """The layers of the memory at ``place``."""
    if layers is not None:
        return Layers(layers.up + place * (dims.SK * dims.SE), layers.down + place * (dims.SE * dims.SV))
    else:
        return layers


@triton.jit
def _load(layers, e, dims: tl.constexpr, EB: tl.constexpr):
    """EB hidden units of a memory."""
    up = load_block(layers.up, 0, e, dims.SK, dims.SE, dims.PK, EB)
    return up, load_block(layers.down, e, 0, dims.SE, dims.SV, EB, dims.PV)


@triton.jit
def _store(layers, up, down, e, dims: tl.constexpr, EB: tl.constexpr):
    store_block(layers.up, up, 0, e, dims.SK, dims.SE, dims.PK, EB)
    store_block(layers.down, down, e, 0, dims.SE, dims.SV, EB, dims.PV)


@triton.jit
def _error(k_t, v_t, state, added, PRECISION: tl.constexpr, dims: tl.constexpr, ROWS: tl.constexpr, EB: tl.constexpr):
    """2 (M(k) - v) of the rows of a chunk; ``added``: 1 where the memory adds its input, which needs DK = DV, or 0."""
    PV: tl.constexpr = dims.PV
    o = tl.zeros([ROWS, PV], tl.float32)
    for e in range(0, dims.SE, EB):
        up, down = _load(state, e, dims, EB)
        z = gelu_as(tl.dot(k_t, up.to(k_t.dtype), input_precision=PRECISION), k_t.dtype).to(k_t.dtype)
        o = tl.dot(z, down.to(k_t.dtype), o, input_precision=PRECISION)
    if dims.DK == dims.DV:
        o += added * k_t.to(tl.float32)
    return 2.0 * (o - v_t.to(tl.float32))


@triton.jit(do_not_specialize=["T", "H", "N", "lanes"])
def write_lanes_kernel(
    rows, first, strengths, spans, made, momentum, scale, added, T, H, N, lanes,
    MIXES: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr,
    EB: tl.constexpr,
):  # fmt: skip
    """One program: a lane of a head; the state at hand stands where its segment's end state will, ``made.up`` and down.

    ``momentum``: of layers ``[B*H, lanes, ..]``, float32, scratch; None where S does not cross chunks.
    """
    PV: tl.constexpr = dims.PV
    lane = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    rows = rows_of(rows, bh, T, H, dims)
    strengths = strengths_of(strengths, bh, T, H)
    here = bh // H * T * H + bh % H
    begins, ends = segments_of(spans, lane)
    states = Layers(made.up, made.down)
    surprise = _memory(momentum, bh * lanes + lane, dims)
    place = bh * N + begins
    _start(first, _memory(states, place, dims), surprise, place, bh, H, dims, EB)
    i = tl.arange(0, ROWS)
    seen = i[:, None] >= i[None, :]
    for segment in range(begins, ends):
        begin = tl.load(spans.seg_begin + segment)
        end = tl.load(spans.seg_end + segment)
        # One stage: no load of a state may go ahead of the store before it.
        for t0 in tl.range(begin, end, INNER, num_stages=1):
            # What other threads have stored is loaded.
            tl.debug_barrier()
            stop = tl.minimum(t0 + INNER, end)
            entered = bh * N + tl.where((t0 == begin) & (segment > begins), segment - 1, segment)
            state = _memory(states, entered, dims)
            left = _memory(states, bh * N + segment, dims)
            k_t = load_rows(rows.k, t0, stop, H * dims.DK, 0, dims.DK, ROWS, dims.PK)
            v_t = load_rows(rows.v, t0, stop, H * dims.DV, 0, dims.DV, ROWS, dims.PV)
            q_t = load_rows(rows.q, t0, stop, H * dims.DK, 0, dims.DK, ROWS, dims.PK)
            error = _error(k_t, v_t, state, added, PRECISION=PRECISION, dims=dims, ROWS=ROWS, EB=EB).to(k_t.dtype)
            by = coefficients(strengths, t0, stop, H, ROWS)
            last = stop - t0 - 1
            leaving, c, d = row_of(by.rows, last), row_of(by.state, last), row_of(by.momentum, last)
            since, upto = row_of(by.since, last), row_of(by.upto, last)
            scores = tl.where(seen, tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION), 0.0)
            scores = (by.rows * scores).to(k_t.dtype)
            y = tl.zeros([ROWS, PV], tl.float32)
            pairs = tl.zeros([ROWS, ROWS], tl.float32)
            for e in range(0, dims.SE, EB):
                up, down = _load(state, e, dims, EB)
                up_t, down_t = up.to(k_t.dtype), down.to(k_t.dtype)
                z, slope = gelu_slope_as(tl.dot(k_t, up_t, input_precision=PRECISION), k_t.dtype)
                z_t = z.to(k_t.dtype)
                back = tl.dot(error, tl.trans(down_t), input_precision=PRECISION) * slope
                hidden = by.state[:, None] * tl.dot(q_t, up_t, input_precision=PRECISION)
                hidden -= tl.dot(scores, back.to(k_t.dtype), input_precision=PRECISION)
                if surprise is not None:
                    s_up, s_down = _load(surprise, e, dims, EB)
                    hidden -= by.momentum[:, None] * tl.dot(q_t, s_up.to(k_t.dtype), input_precision=PRECISION)
                hidden *= scale
                if MIXES:
                    store_rows(made.hidden + bh * T * dims.SE, hidden, t0, stop, dims.SE, e, dims.SE, ROWS, EB)
                    store_rows(made.z + bh * T * dims.SE, z, t0, stop, dims.SE, e, dims.SE, ROWS, EB)
                else:
                    x = gelu_as(hidden, k_t.dtype).to(k_t.dtype)
                    pairs = tl.dot(x, tl.trans(z_t), pairs, input_precision=PRECISION)
                    y += by.state[:, None] * tl.dot(x, down_t, input_precision=PRECISION)
                    if surprise is not None:
                        y -= by.momentum[:, None] * tl.dot(x, s_down.to(k_t.dtype), input_precision=PRECISION)
                down *= c
                up *= c
                if surprise is not None:
                    up -= d * s_up
                    down -= d * s_down
                    gone = (since[:, None] * back).to(k_t.dtype)
                    s_up = tl.dot(tl.trans(k_t), gone, upto * s_up, input_precision=PRECISION)
                    gone = (since[:, None] * z).to(k_t.dtype)
                    s_down = tl.dot(tl.trans(gone), error, upto * s_down, input_precision=PRECISION)
                    _store(surprise, s_up, s_down, e, dims, EB)
                gone = (leaving[:, None] * back).to(k_t.dtype)
                up -= tl.dot(tl.trans(k_t), gone, input_precision=PRECISION)
                gone = (leaving[:, None] * z).to(k_t.dtype)
                down -= tl.dot(tl.trans(gone), error, input_precision=PRECISION)
                _store(left, up, down, e, dims, EB)
            if MIXES:
                store_rows(made.error + bh * T * dims.SV, -error, t0, stop, dims.SV, 0, dims.SV, ROWS, dims.PV)
            else:
                pairs = tl.where(seen, by.rows * pairs, 0.0).to(k_t.dtype)
                y -= tl.dot(pairs, error, input_precision=PRECISION)
                store_rows(made.partials + here * dims.DV, y, t0, stop, H * dims.DV, 0, dims.DV, ROWS, dims.PV)
        if made.up_operand is not None:
            tl.debug_barrier()
            left = _memory(states, bh * N + segment, dims)
            operand = _memory(Layers(made.up_operand, made.down_operand), bh * N + segment, dims)
            for e in range(0, dims.SE, EB):
                up, down = _load(left, e, dims, EB)
                _store(operand, up, down, e, dims, EB)


def deep_write_lanes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor],
    strengths: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    tables: Tables,
    scale: float,
    memory_residual: bool,
    exact: bool,
    MIXES: bool,
    ROUTED: bool,
    INDEPENDENT: bool,
    HALF: bool,
    PRECISION: str,
    DK: int,
    DV: int,
    DE: int,
    PK: int,
    PV: int,
    SK: int,
    SV: int,
    SE: int,
    INNER: int,
    EB: int,
    num_warps: int,
    num_stages: int,
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
    dims, float32 = Dims(DK, DV, DE, PK, PV, SK, SV, SE), torch.float32
    lanes, spans = lanes_of(tables, INDEPENDENT)
    made = room_for(k, tables, dims, states=True, operands=HALF, means=exact or ROUTED)
    if MIXES:
        rows = {"hidden": SE, "z": SE, "error": SV}
        made = made._replace(**{name: k.new_empty((B * H, T, width)) for name, width in rows.items()})
    else:
        made = made._replace(partials=k.new_empty((1, B, T, H, DV), dtype=float32))
    momentum = None
    if strengths[2] is not None:
        layers = ((B * H, lanes, SK, SE), (B * H, lanes, SE, SV))
        momentum = Layers(*(k.new_empty(layer, dtype=float32) for layer in layers))
    write_lanes_kernel[(lanes, B * H)](
        rows=Rows(q, k, v), first=First(*first), strengths=Strengths(*strengths), spans=spans, made=made,
        momentum=momentum, scale=scale, added=float(memory_residual), T=T, H=H, N=tables.seg_begin.shape[0],
        lanes=lanes, MIXES=MIXES, PRECISION=PRECISION, dims=dims, INNER=INNER,
        ROWS=triton.next_power_of_2(max(INNER, 16)), EB=EB, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return as_operands(made)
