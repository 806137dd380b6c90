"""The read of a linear or SWLA Memory Caching layer (Eq. 6-17).

    y_t = scale [ gamma_t^(s) q_t M_t + sum_{i < s} gamma_t^(i) q_t M^(i) ]

The online memory at t is what the tokens of t's piece up to t write, after the state that enters the piece. Cached ones
are read by one product each, which a tile of tokens shares (FORMULATION "per_segment": gates times products;
"gated": products of gates times q, so that the sum stays where products are added up; "scaled": the sum stays there
too, in units of the latest gate, and the product is added to it as it is); residual and mean, whose gates are equal,
read the sum of the states instead; under ssc with "grouped" another kernel has read them.

GATES: "precomputed" by :mod:`gates`, or "fused": a softmax that goes along with the cached states, BN at a time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .common import (
    Decays,
    Dims,
    Gates,
    Rows,
    Spans,
    States,
    Tables,
    block_and_head,
    last_piece,
    load_rows,
    load_state,
    load_tile,
)

DK = 128
PK = 128
SK = 128
DV = 128
PV = 128
SV = 128
BJ = 32
BT = 256
BV = 128
num_stages = 2
num_warps = 16

FLOOR = tl.constexpr(-40.0)
"""At most e^40 between two gates, whatever came in between: the sum in units of one stays finite where reads are below
1e21, and no gate is off by more than 4e-18."""


@triton.jit
def _rows_of(rows, bh, T, H, dims: tl.constexpr):
    """The rows of one head, which are H rows apart."""
    head = bh // H * T * H + bh % H
    return Rows(rows.q + head * dims.DK, rows.k + head * dims.DK, rows.v + head * dims.DV)


@triton.jit
def _state(states, place, column, dims: tl.constexpr, BV: tl.constexpr):
    """BV value columns of the state at ``place``."""
    return load_state(states + place * (dims.SK * dims.SV), 0, column, dims.SK, dims.SV, dims.PK, BV)


@triton.jit
def _online(
    q_t, rows, states, tile, enters, bh, column, H, P, dims: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """The read of the online memory by a tile of tokens: of what its piece has written up to each, and what entered it.

    With fused gates also ``total``, to which <u_t, k_j> of the same tokens j is added.
    """
    t = tile.first + tl.arange(0, BT)
    acc = tl.zeros([BT, BV], tl.float32)
    for j0 in range(tile.start, tile.stop, BJ):
        j = j0 + tl.arange(0, BJ)
        k_j = tl.trans(load_rows(rows.k, j0, tile.stop, H * dims.DK, 0, dims.DK, BJ, dims.PK))
        v_j = load_rows(rows.v, j0, tile.stop, H * dims.DV, column, dims.DV, BJ, BV)
        scores = tl.dot(q_t, k_j, input_precision="ieee")
        scores = tl.where(t[:, None] >= j[None, :], scores, 0.0)
        acc = tl.dot(scores.to(v_j.dtype), v_j, acc, input_precision="ieee")
    if enters >= 0:
        state = _state(states, bh * P + enters, column, dims, BV)
        entered = tl.dot(q_t, state, input_precision="ieee")
        acc += entered
    return acc


@triton.jit
def _store(y, acc, tile, bh, column, T, H, dims: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr):
    t = tile.first + tl.arange(0, BT)
    cols = column + tl.arange(0, BV)
    head = bh // H * T * H + bh % H
    out = y + head * dims.DV + t.to(tl.int64)[:, None] * (H * dims.DV) + cols[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(t < tile.stop)[:, None] & (cols < dims.DV)[None, :])


@triton.jit(do_not_specialize=["together", "T", "H", "N", "P"])
def read_gated_kernel(
    rows, states, gates, spans, tiles, y, scale, together, T, H, N, P, dims: tl.constexpr, BT: tl.constexpr,
    BJ: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens, BV value columns, one head. Every cached state is read with a gate of its own.

    Under ssc a logit may be -inf; it is NaN where unwritten.
    """
    BLOCKS: tl.constexpr = (dims.DV + BV - 1) // BV
    block, bh = block_and_head(together)
    column = block % BLOCKS * BV
    tile = load_tile(tiles + block // BLOCKS * 2, spans, BT)
    enters = tl.load(spans.entering + tile.piece)
    rows = _rows_of(rows, bh, T, H, dims)
    t = tile.first + tl.arange(0, BT)
    valid = t < tile.stop
    q_t = load_rows(rows.q, tile.first, tile.stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
    acc = _online(
        q_t, rows, states, tile, enters, bh, column, H, P, dims=dims, BT=BT, BJ=BJ, BV=BV,
    )  # fmt: skip
    s = tile.segment
    lse = tl.load(gates.lse + bh * T + t, mask=valid, other=0.0)
    row = gates.logits + bh * N * T + t
    log_gate = tl.load(row + s.to(tl.int64) * T, mask=valid, other=0.0) - lse
    # A NaN stays one.
    unit = tl.exp(tl.where(log_gate < FLOOR, FLOOR, log_gate))
    for i in range(tile.oldest, s):
        last = last_piece(spans.seg_last, i)
        state = _state(states, bh * P + last, column, dims, BV)
        log_gate = tl.load(row + tl.cast(i, tl.int64) * T, mask=valid, other=float("-inf")) - lse
        log_gate = tl.where(log_gate < FLOOR, FLOOR, log_gate)
        acc = tl.dot(q_t, state, acc * (unit * tl.exp(-log_gate))[:, None], input_precision="ieee")
        unit = tl.exp(log_gate)
    # Loaded again: carried out of the loop, every unit would be computed in a second layout.
    latest = tl.where(s > tile.oldest, s - 1, s).to(tl.int64)
    log_gate = tl.load(row + latest * T, mask=valid, other=0.0) - lse
    acc *= tl.exp(tl.where(log_gate < FLOOR, FLOOR, log_gate))[:, None]
    _store(y, acc * scale, tile, bh, column, T, H, dims, BT, BV)


def read_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    states: States,
    gates: Gates | None,
    partial: torch.Tensor | None,
    decays: Decays | None,
    tables: Tables,
    tiles: torch.Tensor,
    y: torch.Tensor,
    scale: float,
    first_head: int,
    heads: int,
    first_token: int,
    span: int,
    top_k: int,
) -> torch.Tensor:
    """y ``[B, T, H, DV]``, of q's dtype, with what this launch is about written.

    Args:
        q, k, u [B, T, H, DK], v [B, T, H, DV]: of one dtype; u only with fused gates.
        states, decays: of :mod:`segment_states`; decays None for linear.
        gates: of :mod:`gates`; None where they are fused or not learned.
        partial [heads, span, top_k, DV]: of :mod:`grouped_read`, gates times reads without ``scale``.
        tiles: of BT tokens, of those that this launch is about.
        first_head, heads, first_token, span: which those are.
    """
    T, H, N, P = q.shape[1], q.shape[2], tables.seg_first.shape[0], tables.begin.shape[0]
    bv, together = min(BV, PV), math.gcd(heads, 8)
    grid = (triton.cdiv(DV, bv) * tiles.shape[0] * together, heads // together)
    rows, dims = Rows(q, k, v), Dims(DK, DV, PK, PV, SK, SV)
    spans = Spans(
        tables.begin, tables.end, tables.segment, tables.entering, seg_first=tables.seg_first,
        seg_last=tables.seg_last if P > N else None,
    )  # fmt: skip
    read_gated_kernel[grid](
        rows=rows, states=states.operand, gates=gates, spans=spans, tiles=tiles, y=y, scale=scale, together=together,
        T=T, H=H, N=N, P=P, dims=dims, BT=BT, BJ=BJ, BV=bv, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return y
