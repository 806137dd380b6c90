"""The read of a deep Memory Caching layer that mixes parameters: soup and mean (Eq. 14-15, section 4.3).

    h_t = gamma_t^(s) x_t U_t + sum_{i < s} gamma_t^(i) x_t U^(i)        x = scale q
    y_t = gamma_t^(s) z_t W_t + sum_{i < s} gamma_t^(i) z_t W^(i) (+ x_t)        z = gelu(h)

Two gated reads of matrix memories in a row. ``deep_write`` has left x U_t; what W_t makes of z_t, which is not known
before all U have been read, takes the writes of the second layer once more, from their rows, or ``deep_row_output``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .deep_common import (
    Dims,
    Gates,
    Spans,
    Strengths,
    Tables,
    block_and_head,
    coefficients,
    gelu_as,
    load_block,
    load_rows,
    load_tile,
    row_of,
    store_rows,
    strengths_of,
)


@triton.jit
def _gate(gates, tile, i, bh, T, N, ROUTED: tl.constexpr, BT: tl.constexpr):
    """``[BT]``: the weights of segment i."""
    t = tile.first + tl.arange(0, BT)
    if ROUTED:
        valid = t < tile.stop
        lse = tl.load(gates.lse + bh * T + t, mask=valid, other=0.0)
        return tl.exp(tl.load(gates.logits + (bh * N + i) * T + t, mask=valid, other=0.0) - lse)
    else:
        return tl.full([BT], 1.0, tl.float32) / (tile.segment - tile.oldest + 1)


@triton.jit(do_not_specialize=["together", "T", "H", "N"])
def mix_hidden_kernel(
    q, up, gates, hidden, spans, tiles, scale, together, T, H, N,
    ROUTED: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, BT: tl.constexpr, EB: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens of a head, EB hidden units; x U_t in, gelu of what all states make of x out."""
    BLOCKS: tl.constexpr = (dims.SE + EB - 1) // EB
    block, bh = block_and_head(together)
    column = block % BLOCKS * EB
    tile = load_tile(tiles + block // BLOCKS * 2, spans, BT)
    head = bh // H * T * H + bh % H
    hidden += bh * T * dims.SE
    q_t = load_rows(q + head * dims.DK, tile.first, tile.stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
    own = load_rows(hidden, tile.first, tile.stop, dims.SE, column, dims.SE, BT, EB).to(tl.float32)
    acc = _gate(gates, tile, tile.segment, bh, T, N, ROUTED=ROUTED, BT=BT)[:, None] * own
    for i in range(tile.oldest, tile.segment):
        gate = _gate(gates, tile, i, bh, T, N, ROUTED=ROUTED, BT=BT) * scale
        state = load_block(up + (bh * N + i) * (dims.SK * dims.SE), 0, column, dims.SK, dims.SE, dims.PK, EB)
        acc += gate[:, None] * tl.dot(q_t, state, input_precision=PRECISION)
    store_rows(hidden, gelu_as(acc, q_t.dtype), tile.first, tile.stop, dims.SE, column, dims.SE, BT, EB)


@triton.jit(do_not_specialize=["T", "H"])
def replay_kernel(
    hidden, z, error, v, W_down, strengths, spans, partials, T, H,
    INDEPENDENT: tl.constexpr, SQUARED: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, EB: tl.constexpr,
):  # fmt: skip
    """One program: EB hidden units of a lane of a head, and what the second layer at hand makes of ``hidden``."""
    PARTS: tl.constexpr = (dims.SE + EB - 1) // EB
    part = tl.program_id(0) % PARTS
    column = part * EB
    lane = tl.program_id(0) // PARTS
    bh = tl.program_id(1).to(tl.int64)
    here = bh // H * T * H + bh % H
    strengths = strengths_of(strengths, bh, T, H)
    hidden += bh * T * dims.SE
    z += bh * T * dims.SE
    partials += (part * (tl.num_programs(1) * T).to(tl.int64) + here) * dims.DV
    down = load_block(W_down + bh % H * (dims.DE * dims.DV), column, 0, dims.DE, dims.DV, EB, dims.PV)
    PV: tl.constexpr = dims.PV
    surprise = tl.zeros([EB, PV], tl.float32)
    i = tl.arange(0, ROWS)
    seen = i[:, None] >= i[None, :]
    if INDEPENDENT:
        begins = lane
        ends = lane + 1
    else:
        begins = tl.load(spans.lane_begin + lane)
        ends = tl.load(spans.lane_end + lane)
    for segment in range(begins, ends):
        end = tl.load(spans.seg_end + segment)
        for t0 in range(tl.load(spans.seg_begin + segment), end, INNER):
            stop = tl.minimum(t0 + INNER, end)
            x = load_rows(hidden, t0, stop, dims.SE, column, dims.SE, ROWS, EB)
            z_t = load_rows(z, t0, stop, dims.SE, column, dims.SE, ROWS, EB)
            # No product reads these rows themselves: what is loaded ahead has one kind of reader.
            if SQUARED:
                error_t = load_rows(error + bh * T * dims.SV, t0, stop, dims.SV, 0, dims.SV, ROWS, dims.PV)
            else:
                error_t = load_rows(v + here * dims.DV, t0, stop, H * dims.DV, 0, dims.DV, ROWS, dims.PV)
            error_t = -error_t.to(tl.float32)
            by = coefficients(strengths, t0, stop, H, ROWS)
            last = stop - t0 - 1
            pairs = tl.dot(x, tl.trans(z_t), input_precision=PRECISION)
            pairs = tl.where(seen, by.rows * pairs, 0.0).to(x.dtype)
            y = by.state[:, None] * tl.dot(x, down.to(x.dtype), input_precision=PRECISION)
            y -= tl.dot(pairs, error_t.to(x.dtype), input_precision=PRECISION)
            left = (row_of(by.rows, last)[:, None] * error_t).to(x.dtype)
            down = row_of(by.state, last) * down - tl.dot(tl.trans(z_t), left, input_precision=PRECISION)
            if strengths.mu is not None:
                y -= by.momentum[:, None] * tl.dot(x, surprise.to(x.dtype), input_precision=PRECISION)
                down -= row_of(by.momentum, last) * surprise
                left = (row_of(by.since, last)[:, None] * error_t).to(x.dtype)
                carried = row_of(by.upto, last) * surprise
                surprise = tl.dot(tl.trans(z_t), left, carried, input_precision=PRECISION)
            store_rows(partials, y, t0, stop, H * dims.DV, 0, dims.DV, ROWS, dims.PV)


@triton.jit(do_not_specialize=["parts", "together", "T", "H", "N"])
def mix_output_kernel(
    q, down, gates, hidden, partials, spans, tiles, y, scale, added, parts, together, T, H, N,
    ROUTED: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, BT: tl.constexpr, EB: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens of a head."""
    block, bh = block_and_head(together)
    tile = load_tile(tiles + block * 2, spans, BT)
    head = bh // H * T * H + bh % H
    PV: tl.constexpr = dims.PV
    acc = tl.zeros([BT, PV], tl.float32)
    for part in range(0, parts):
        own = partials + (part * (tl.num_programs(1) * together * T).to(tl.int64) + head) * dims.DV
        acc += load_rows(own, tile.first, tile.stop, H * dims.DV, 0, dims.DV, BT, dims.PV)
    acc *= _gate(gates, tile, tile.segment, bh, T, N, ROUTED=ROUTED, BT=BT)[:, None]
    if dims.DK == dims.DV:
        q_t = load_rows(q + head * dims.DK, tile.first, tile.stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
        acc += (added * scale) * q_t.to(tl.float32)
    for e in range(0, dims.SE, EB):
        z = load_rows(hidden + bh * T * dims.SE, tile.first, tile.stop, dims.SE, e, dims.SE, BT, EB)
        for i in range(tile.oldest, tile.segment):
            gate = _gate(gates, tile, i, bh, T, N, ROUTED=ROUTED, BT=BT)
            state = load_block(down + (bh * N + i) * (dims.SE * dims.SV), e, 0, dims.SE, dims.SV, EB, dims.PV)
            acc += gate[:, None] * tl.dot(z, state, input_precision=PRECISION)
    store_rows(y + head * dims.DV, acc, tile.first, tile.stop, H * dims.DV, 0, dims.DV, BT, dims.PV)


def mix_replay(
    hidden: torch.Tensor,
    z: torch.Tensor,
    error: torch.Tensor | None,
    v: torch.Tensor,
    W_down: torch.Tensor,
    strengths: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    tables: Tables,
    SQUARED: bool,
    INDEPENDENT: bool,
    PRECISION: str, DK: int, DV: int, DE: int, PK: int, PV: int, SK: int, SV: int, SE: int, INNER: int, EB: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:  # fmt: skip
    """What the own segment's second layer makes of ``hidden``, in parts to be added, [parts, B, T, H, DV] in float32.

    Args:
        hidden: gelu(h).
        z, error: of ``deep_write``.
        v [B, T, H, DV]: of hidden's dtype.
        W_down [H, DE, DV]: the second layer that every lane starts from, float32.
        strengths: g, eta, mu [B, T, H], float32, None where absent.
    """
    (B, T, H, _), N, parts = v.shape, tables.seg_first.shape[0], triton.cdiv(SE, EB)
    partials = v.new_empty((parts, B, T, H, DV), dtype=torch.float32)
    lanes = Spans(tables.seg_begin, tables.seg_end)
    if not INDEPENDENT:
        lanes = lanes._replace(lane_begin=tables.seq_begin, lane_end=tables.seq_end)
    replay_kernel[((N if INDEPENDENT else tables.seq_begin.shape[0]) * parts, B * H)](
        hidden=hidden, z=z, error=error, v=v, W_down=W_down, strengths=Strengths(*strengths), spans=lanes,
        partials=partials, T=T, H=H, INDEPENDENT=INDEPENDENT, SQUARED=SQUARED, PRECISION=PRECISION,
        dims=Dims(DK, DV, DE, PK, PV, SK, SV, SE), INNER=INNER, ROWS=triton.next_power_of_2(max(INNER, 16)), EB=EB,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return partials


def deep_mix(
    q: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    gates: Gates | None,
    hidden: torch.Tensor,
    tables: Tables,
    tiles: torch.Tensor,
    online: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    memory_residual: bool,
    ROUTED: bool,
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
        hidden: of ``deep_write``; it is overwritten with gelu(h).
        tiles: of BT tokens.
        online: makes of gelu(h) what the own segment's second layer makes of it, like :func:`mix_replay`.
        memory_residual: whether the memory adds its input.
    """
    (B, T, H, _), N = q.shape, tables.seg_first.shape[0]
    heads, parts = B * H, triton.cdiv(SE, EB)
    together = math.gcd(heads, 8)
    dims = Dims(DK, DV, DE, PK, PV, SK, SV, SE)
    read = None if gates is None else Gates(gates.logits, gates.lse)
    spans = Spans(None, tables.seg_end, tables.seg_first)
    mix_hidden_kernel[(tiles.shape[0] * parts * together, heads // together)](
        q=q, up=states[0], gates=read, hidden=hidden, spans=spans, tiles=tiles, scale=scale, together=together, T=T,
        H=H, N=N, ROUTED=ROUTED, PRECISION=PRECISION, dims=dims, BT=BT, EB=EB, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    partials = online(hidden)
    y = q.new_empty((B, T, H, DV))
    mix_output_kernel[(tiles.shape[0] * together, heads // together)](
        q=q, down=states[1], gates=read, hidden=hidden, partials=partials, spans=spans, tiles=tiles, y=y, scale=scale,
        added=float(memory_residual), parts=partials.shape[0], together=together, T=T, H=H, N=N, ROUTED=ROUTED,
        PRECISION=PRECISION, dims=dims, BT=BT, EB=EB, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return y
