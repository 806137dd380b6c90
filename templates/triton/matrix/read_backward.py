"""Gradient of the read of a linear or SWLA Memory Caching layer (Eq. 6-17) to q and, where gates are learned, to them.

    P_t^(i) = dy_t M^(i)T                            of the cached states, and of the online memory
    dq_t = scale sum_i gamma_t^(i) P_t^(i)
    dgamma_t^(i) = scale <q_t, P_t^(i)>
    delta_t = sum_i gamma_t^(i) dgamma_t^(i) = <q_t, dq_t>

Under ssc with FORMULATION "grouped" another kernel has read the cached states, and their parts of dq are added up here.

The online memory at t is what the tokens of t's piece up to t write, after the state that enters the piece:
P_t^(s) = sum_j w_tj <dy_t, v_j> k_j + e^{cum_t} dy_t A^T, and under SWLA the row before the piece.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .backward_common import Gates, Pieces, ReadGradients, Rows, Segments, Tables, last_pieces
from .common import Decays, Dims, block_and_head, decay_scores, load_rows, load_state


class Reads(NamedTuple):
    """What was read, or its parts of dq: None where a layer has no such.

    Attributes:
        states [B*H, P, SK, SV]: end states of the pieces; past [B*H, N, SK, SV]: sums of the states before a segment.
        partial [B*H, T, top_k, DK]: of pairs of a token and a segment that ssc chose.
    """

    states: torch.Tensor | None
    past: torch.Tensor | None
    partial: torch.Tensor | None


@triton.jit
def row_before(dy_t, k, v, cum_t, cum_start, before, start, column, H, dims: tl.constexpr, BK: tl.constexpr):
    """SWLA: the read of the row before the piece, which writes once more; pointers say how strongly, and since when."""
    values = tl.arange(0, dims.PV)
    cols = column + tl.arange(0, BK)
    last = tl.cast(start - 1, tl.int64)
    v_row = tl.load(v + last * (H * dims.DV) + values, mask=values < dims.DV, other=0.0).to(tl.float32)
    k_row = tl.load(k + last * (H * dims.DK) + cols, mask=cols < dims.DK, other=0.0).to(tl.float32)
    score = tl.sum(dy_t.to(tl.float32) * v_row[None, :], 1)
    score *= tl.load(before) * tl.exp(cum_t - tl.load(cum_start))
    return score[:, None] * k_row[None, :]


@triton.jit
def read_online(
    dy_t, k, v, states, decays, piece, enters, t, lines, start, stop, bh, column, T, H, P,
    SWLA: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr,
    BT: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """P_t^(s) ``[BT, BK]``, of the online memory: what the piece's tokens write, and what enters it."""
    read = tl.zeros([BT, BK], tl.float32)
    if SWLA:
        cum = decays.cum + bh * T
        after = decays.after + bh * T
        cum_t = tl.load(cum + t, mask=t < stop, other=0.0)
        now_t = tl.load(decays.now + lines, mask=t < stop, other=0.0)
    for j0 in range(start, stop, BJ):
        j = j0 + tl.arange(0, BJ)
        v_j = load_rows(v, j0, stop, H * dims.DV, 0, dims.DV, BJ, dims.PV)
        k_j = load_rows(k, j0, stop, H * dims.DK, column, dims.DK, BJ, BK)
        scores = tl.dot(dy_t, tl.trans(v_j), input_precision=PRECISION)
        if SWLA:
            scores = decay_scores(scores, t, j, cum_t, now_t, cum, after, stop)
        else:
            scores = tl.where(t[:, None] >= j[None, :], scores, 0.0)
        read = tl.dot(scores.to(k_j.dtype), k_j, read, input_precision=PRECISION)
    if enters >= 0:
        state = load_state(states + (bh * P + enters) * (dims.SK * dims.SV), column, 0, dims.SK, dims.SV, BK, dims.PV)
        entered = tl.dot(dy_t, tl.trans(state), input_precision=PRECISION)
        if SWLA:
            entered *= tl.exp(cum_t)[:, None]
            before = decays.before + bh * P + piece
            entered += row_before(dy_t, k, v, cum_t, cum + start, before, start, column, H, dims, BK)
        read += entered
    return read


@triton.jit
def add_pairs(read, picked, partial, lines, valid, column, top_k, dims: tl.constexpr, BK: tl.constexpr):
    """``read`` and the parts of dq of the segments that ssc chose; ``lines``: of the tokens, over all heads."""
    places = column + tl.arange(0, BK)
    for r in range(0, top_k):
        # Without a segment a logit is -inf, and nothing was written.
        chosen = tl.load(picked + lines * top_k + r, mask=valid, other=float("-inf")) > float("-inf")
        row = (lines * top_k + r)[:, None] * dims.DK + places[None, :]
        inside = chosen[:, None] & (places < dims.DK)[None, :]
        read += tl.load(partial + row, mask=inside, other=0.0).to(tl.float32)
    return read


@triton.jit
def read_segments(
    read, dy_t, keys, total, states, logits, last, dgamma, scale, first, s, t, valid, column, bh, part, T, N, P,
    PRECISION: tl.constexpr, dims: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``read`` and gamma_t^(i) P_t^(i) of the cached segments, whose gates' gradients are written."""
    for i in range(first, s):
        piece = i
        if last is not None:
            piece = tl.load(last + i)
        state = load_state(states + (bh * P + piece) * (dims.SK * dims.SV), column, 0, dims.SK, dims.SV, BK, dims.PV)
        cached = tl.dot(dy_t, tl.trans(state), input_precision=PRECISION)
        gamma = tl.exp(tl.load(logits + (bh * N + i) * T + t, mask=valid, other=0.0) - total)
        tl.store(dgamma + (part * N + i) * T + t, tl.sum(keys * cached, 1) * scale, mask=valid)
        read += gamma[:, None] * cached
    return read


@triton.jit(do_not_specialize=["top_k", "together", "T", "H", "N", "P"])
def read_backward_kernel(
    rows, reads, gates, decays, pieces, segments, tiles, made, scale, top_k, together, T, H, N, P,
    SWLA: tl.constexpr, ROUTED: tl.constexpr, AVERAGES: tl.constexpr, FORMULATION: tl.constexpr,
    PRECISION: tl.constexpr, dims: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens, BK key columns, one head."""
    BLOCKS: tl.constexpr = (dims.DK + BK - 1) // BK
    block, bh = block_and_head(together)
    column = block % BLOCKS * BK
    tile = tiles + block // BLOCKS * 2
    piece = tl.load(tile)
    t0 = tl.load(tile + 1)
    start = tl.load(pieces.begin + piece)
    stop = tl.minimum(t0 + BT, tl.load(pieces.end + piece))
    s = tl.load(pieces.segment + piece)
    first = tl.load(segments.first + s)
    enters = tl.load(pieces.entering + piece)
    head = bh // H * T * H + bh % H
    q = rows.q + head * dims.DK
    k = rows.k + head * dims.DK
    v = rows.v + head * dims.DV
    dy = rows.dy + head * dims.DV
    t = t0 + tl.arange(0, BT)
    valid = t < stop
    lines = bh * T + t
    dy_t = load_rows(dy, t0, stop, H * dims.DV, 0, dims.DV, BT, dims.PV)
    q_t = load_rows(q, t0, stop, H * dims.DK, column, dims.DK, BT, BK)
    read = read_online(
        dy_t, k, v, reads.states, decays, piece, enters, t, lines, start, stop, bh, column, T, H, P,
        SWLA, PRECISION, dims, BT, BJ, BK,
    )  # fmt: skip

    keys = q_t.to(tl.float32)
    part = (column // BK) * (tl.num_programs(1) * together) + bh
    tl.store(made.own + part * T + t, tl.sum(keys * read, 1) * scale, mask=valid)
    if not ROUTED:
        if s > first:
            past = reads.past + (bh * N + s) * (dims.SK * dims.SV)
            state = load_state(past, column, 0, dims.SK, dims.SV, BK, dims.PV)
            read = tl.dot(dy_t, tl.trans(state), read, input_precision=PRECISION)
    if AVERAGES:
        read *= 1.0 / (s - first + 1)
    if ROUTED:
        total = tl.load(gates.lse + lines, mask=valid, other=float("inf"))
        if FORMULATION == "grouped":
            read *= tl.exp(tl.load(gates.own + lines, mask=valid, other=0.0) - total)[:, None]
            read = add_pairs(read, gates.picked, reads.partial, lines, valid, column, top_k, dims, BK)
        else:
            read *= tl.exp(tl.load(gates.logits + (bh * N + s) * T + t, mask=valid, other=0.0) - total)[:, None]
            read = read_segments(
                read, dy_t, keys, total, reads.states, gates.logits, segments.last, made.dgamma, scale, first, s, t,
                valid, column, bh, part, T, N, P, PRECISION, dims, BK,
            )  # fmt: skip
            tl.store(made.delta + part * T + t, tl.sum(keys * read, 1) * scale, mask=valid)
    cols = column + tl.arange(0, BK)
    out = made.dq + head * dims.DK + t.to(tl.int64)[:, None] * (H * dims.DK) + cols[None, :]
    tl.store(out, (read * scale).to(made.dq.dtype.element_ty), mask=valid[:, None] & (cols < dims.DK)[None, :])


def read_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dy: torch.Tensor,
    states: torch.Tensor,
    past: torch.Tensor | None,
    partial: torch.Tensor | None,
    gates: Gates,
    decays: Decays,
    tables: Tables,
    scale: float,
    top_k: int,
    SWLA: bool, ROUTED: bool, AVERAGES: bool, FORMULATION: str, PRECISION: str,
    DK: int, DV: int, PK: int, PV: int, SK: int, SV: int, BT: int, BJ: int, BK: int, num_warps: int, num_stages: int,
) -> ReadGradients:  # fmt: skip
    """Gradients of q and of the gates, but for their softmax.

    Args:
        q, k [B, T, H, DK], v, dy [B, T, H, DV]: of one dtype.
        states [B*H, P, SK, SV]: end states of the pieces, as operands of products; past: of :mod:`segment_states`.
        partial [B*H, T, top_k, DK]: of :mod:`grouped_backward`, parts of dq without ``scale``.
    """
    B, T, H, _ = q.shape
    bk = min(BK, PK)
    blocks, N, P = triton.cdiv(DK, bk), tables.seg_first.shape[0], tables.begin.shape[0]
    own = q.new_empty((blocks, B * H, T), dtype=torch.float32)
    dgamma = delta = None
    if ROUTED and FORMULATION != "grouped":
        dgamma, delta = q.new_empty((blocks, B * H, N, T), dtype=torch.float32), torch.empty_like(own)
    made = ReadGradients(torch.empty_like(q), dgamma, own, delta)
    pieces = Pieces(tables.begin, tables.end, tables.segment, tables.entering)
    tiles = tables.tiles(BT)
    together = math.gcd(B * H, 8)
    read_backward_kernel[(blocks * tiles.shape[0] * together, B * H // together)](
        rows=Rows(q=q, k=k, v=v, dy=dy), reads=Reads(states, past, partial),
        gates=Gates(logits=gates.logits, lse=gates.lse, own=gates.own, picked=gates.picked), decays=decays,
        pieces=pieces, segments=Segments(first=tables.seg_first, last=last_pieces(tables)), tiles=tiles, made=made,
        scale=scale, top_k=top_k, together=together, T=T, H=H, N=N, P=P, SWLA=SWLA, ROUTED=ROUTED, AVERAGES=AVERAGES,
        FORMULATION=FORMULATION, PRECISION=PRECISION, dims=Dims(DK, DV, PK, PV, SK, SV), BT=BT, BJ=BJ, BK=bk,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return made
