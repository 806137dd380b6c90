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
    Keys,
    Rows,
    Spans,
    States,
    Tables,
    block_and_head,
    decay_scores,
    earlier_logits,
    last_piece,
    load_rows,
    load_state,
    load_tile,
    mean_logits,
    soften,
)

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
def _row_before(q_t, cum_t, rows, decays, tile, bh, column, T, H, P, dims: tl.constexpr, BV: tl.constexpr):
    """The read of what the token before the piece writes once more, with the strength of the piece's first token."""
    keys = tl.arange(0, dims.PK)
    cols = column + tl.arange(0, BV)
    last = tl.cast(tile.start - 1, tl.int64)
    k_row = tl.load(rows.k + last * (H * dims.DK) + keys, mask=keys < dims.DK, other=0.0).to(tl.float32)
    v_row = tl.load(rows.v + last * (H * dims.DV) + cols, mask=cols < dims.DV, other=0.0).to(tl.float32)
    score = tl.sum(q_t.to(tl.float32) * k_row[None, :], 1)
    strength = tl.load(decays.before + bh * P + tile.piece)
    score *= strength * tl.exp(cum_t - tl.load(decays.cum + bh * T + tile.start))
    return score[:, None] * v_row[None, :]


@triton.jit
def _online(
    q_t, u_t, total, rows, states, decays, tile, enters, bh, column, T, H, P,
    SWLA: tl.constexpr, GATES: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr,
    BT: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The read of the online memory by a tile of tokens: of what its piece has written up to each, and what entered it.

    With fused gates also ``total``, to which <u_t, k_j> of the same tokens j is added.
    """
    t = tile.first + tl.arange(0, BT)
    if SWLA:
        cum = decays.cum + bh * T
        cum_t = tl.load(cum + t, mask=t < tile.stop, other=0.0)
        now_t = tl.load(decays.now + bh * T + t, mask=t < tile.stop, other=0.0)
    acc = tl.zeros([BT, BV], tl.float32)
    for j0 in range(tile.start, tile.stop, BJ):
        j = j0 + tl.arange(0, BJ)
        k_j = tl.trans(load_rows(rows.k, j0, tile.stop, H * dims.DK, 0, dims.DK, BJ, dims.PK))
        v_j = load_rows(rows.v, j0, tile.stop, H * dims.DV, column, dims.DV, BJ, BV)
        scores = tl.dot(q_t, k_j, input_precision=PRECISION)
        if GATES == "fused":
            writes = tl.dot(u_t, k_j, input_precision=PRECISION)
            total += tl.sum(tl.where(t[:, None] >= j[None, :], writes, 0.0), 1)
        if SWLA:
            scores = decay_scores(scores, t, j, cum_t, now_t, cum, decays.after + bh * T, tile.stop)
        else:
            scores = tl.where(t[:, None] >= j[None, :], scores, 0.0)
        acc = tl.dot(scores.to(v_j.dtype), v_j, acc, input_precision=PRECISION)
    if enters >= 0:
        state = _state(states, bh * P + enters, column, dims, BV)
        entered = tl.dot(q_t, state, input_precision=PRECISION)
        if SWLA:
            entered *= tl.exp(cum_t)[:, None]
            entered += _row_before(q_t, cum_t, rows, decays, tile, bh, column, T, H, P, dims, BV)
        acc += entered
    if GATES == "fused":
        return acc, total
    else:
        return acc


@triton.jit
def _add_read(acc, q_t, state, gate, FORMULATION: tl.constexpr, PRECISION: tl.constexpr):
    """acc and the read of a state times its gate: a gate times a product, or a product of gates times q."""
    if FORMULATION == "gated":
        gated = (q_t.to(tl.float32) * gate[:, None]).to(q_t.dtype)
        return tl.dot(gated, state, acc, input_precision=PRECISION)
    else:
        return acc + gate[:, None] * tl.dot(q_t, state, input_precision=PRECISION)


@triton.jit
def _store(y, acc, tile, bh, column, T, H, dims: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr):
    t = tile.first + tl.arange(0, BT)
    cols = column + tl.arange(0, BV)
    head = bh // H * T * H + bh % H
    out = y + head * dims.DV + t.to(tl.int64)[:, None] * (H * dims.DV) + cols[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(t < tile.stop)[:, None] & (cols < dims.DV)[None, :])


@triton.jit(do_not_specialize=["together", "T", "H", "N", "P"])
def read_summed_kernel(
    rows, states, past, decays, spans, tiles, y, scale, together, T, H, N, P,
    SWLA: tl.constexpr, AVERAGES: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr,
    BT: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens, BV value columns, one head. Gates are equal: cached states are read as one sum."""
    BLOCKS: tl.constexpr = (dims.DV + BV - 1) // BV
    block, bh = block_and_head(together)
    column = block % BLOCKS * BV
    tile = load_tile(tiles + block // BLOCKS * 2, spans, BT)
    enters = tl.load(spans.entering + tile.piece)
    rows = _rows_of(rows, bh, T, H, dims)
    q_t = load_rows(rows.q, tile.first, tile.stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
    acc = _online(
        q_t, None, None, rows, states, decays, tile, enters, bh, column, T, H, P,
        SWLA=SWLA, GATES="precomputed", PRECISION=PRECISION, dims=dims, BT=BT, BJ=BJ, BV=BV,
    )  # fmt: skip
    if tile.segment > tile.oldest:
        state = _state(past, bh * N + tile.segment, column, dims, BV)
        acc = tl.dot(q_t, state, acc, input_precision=PRECISION)
    if AVERAGES:
        acc *= 1.0 / (tile.segment - tile.oldest + 1)
    _store(y, acc * scale, tile, bh, column, T, H, dims, BT, BV)


@triton.jit(do_not_specialize=["together", "T", "H", "N", "P"])
def read_gated_kernel(
    rows, states, gates, decays, spans, tiles, y, scale, together, T, H, N, P,
    SWLA: tl.constexpr, FORMULATION: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr,
    BT: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr,
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
        q_t, None, None, rows, states, decays, tile, enters, bh, column, T, H, P,
        SWLA=SWLA, GATES="precomputed", PRECISION=PRECISION, dims=dims, BT=BT, BJ=BJ, BV=BV,
    )  # fmt: skip
    s = tile.segment
    lse = tl.load(gates.lse + bh * T + t, mask=valid, other=0.0)
    row = gates.logits + bh * N * T + t
    log_gate = tl.load(row + s.to(tl.int64) * T, mask=valid, other=0.0) - lse
    if FORMULATION == "scaled":
        # A NaN stays one.
        unit = tl.exp(tl.where(log_gate < FLOOR, FLOOR, log_gate))
    else:
        acc *= tl.exp(log_gate)[:, None]
    for i in range(tile.oldest, s):
        last = last_piece(spans.seg_last, i)
        state = _state(states, bh * P + last, column, dims, BV)
        log_gate = tl.load(row + tl.cast(i, tl.int64) * T, mask=valid, other=float("-inf")) - lse
        if FORMULATION == "scaled":
            log_gate = tl.where(log_gate < FLOOR, FLOOR, log_gate)
            acc = tl.dot(q_t, state, acc * (unit * tl.exp(-log_gate))[:, None], input_precision=PRECISION)
            unit = tl.exp(log_gate)
        else:
            acc = _add_read(acc, q_t, state, tl.exp(log_gate), FORMULATION=FORMULATION, PRECISION=PRECISION)
    if FORMULATION == "scaled":
        # Loaded again: carried out of the loop, every unit would be computed in a second layout.
        latest = tl.where(s > tile.oldest, s - 1, s).to(tl.int64)
        log_gate = tl.load(row + latest * T, mask=valid, other=0.0) - lse
        acc *= tl.exp(tl.where(log_gate < FLOOR, FLOOR, log_gate))[:, None]
    _store(y, acc * scale, tile, bh, column, T, H, dims, BT, BV)


@triton.jit(do_not_specialize=["first_head", "first_token", "span", "top_k", "together", "T", "H", "P"])
def read_pairs_kernel(
    rows, states, gates, partial, decays, spans, tiles, y, scale, first_head, first_token, span, top_k, together,
    T, H, P, SWLA: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr,
    BT: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens, BV value columns, one head. Adds up what :mod:`grouped_read` has read of their states."""
    BLOCKS: tl.constexpr = (dims.DV + BV - 1) // BV
    block, bh = block_and_head(together)
    column = block % BLOCKS * BV
    # ``partial`` has the heads and the tokens of this launch.
    partial += (bh * span - first_token) * top_k * dims.DV
    bh += first_head
    tile = load_tile(tiles + block // BLOCKS * 2, spans, BT)
    enters = tl.load(spans.entering + tile.piece)
    rows = _rows_of(rows, bh, T, H, dims)
    t = tile.first + tl.arange(0, BT)
    valid = t < tile.stop
    q_t = load_rows(rows.q, tile.first, tile.stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
    acc = _online(
        q_t, None, None, rows, states, decays, tile, enters, bh, column, T, H, P,
        SWLA=SWLA, GATES="precomputed", PRECISION=PRECISION, dims=dims, BT=BT, BJ=BJ, BV=BV,
    )  # fmt: skip
    lse = tl.load(gates.lse + bh * T + t, mask=valid, other=0.0)
    acc *= tl.exp(tl.load(gates.own + bh * T + t, mask=valid, other=0.0) - lse)[:, None]
    cols = column + tl.arange(0, BV)
    for r in range(0, top_k):
        row = t.to(tl.int64) * top_k + r
        # Without a segment a logit is -inf, and nothing was written.
        logit = tl.load(gates.picked + bh * T * top_k + row, mask=valid, other=float("-inf"))
        inside = (logit > float("-inf"))[:, None] & (cols < dims.DV)[None, :]
        acc += tl.load(partial + row[:, None] * dims.DV + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    _store(y, acc * scale, tile, bh, column, T, H, dims, BT, BV)


@triton.jit(do_not_specialize=["together", "T", "H", "N", "P"])
def read_fused_kernel(
    rows, u, states, keys, decays, spans, tiles, y, scale, together, T, H, N, P,
    SWLA: tl.constexpr, FORMULATION: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr,
    BT: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens, BV value columns, one head. Gates are a softmax that goes along, BN states at a time."""
    BLOCKS: tl.constexpr = (dims.DV + BV - 1) // BV
    block, bh = block_and_head(together)
    column = block % BLOCKS * BV
    tile = load_tile(tiles + block // BLOCKS * 2, spans, BT)
    enters = tl.load(spans.entering + tile.piece)
    rows = _rows_of(rows, bh, T, H, dims)
    t = tile.first + tl.arange(0, BT)
    q_t = load_rows(rows.q, tile.first, tile.stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
    u += (bh // H * T * H + bh % H) * dims.DK
    u_t = load_rows(u, tile.first, tile.stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
    total = earlier_logits(u_t, keys, tile, spans, bh, P, dims)
    acc, total = _online(
        q_t, u_t, total, rows, states, decays, tile, enters, bh, column, T, H, P,
        SWLA=SWLA, GATES="fused", PRECISION=PRECISION, dims=dims, BT=BT, BJ=BJ, BV=BV,
    )  # fmt: skip
    s = tile.segment
    top = total / (t - tl.load(spans.seg_begin + s) + 1).to(tl.float32)
    size = tl.full([BT], 1.0, tl.float32)
    for i0 in range(tile.oldest, s, BN):
        i = i0 + tl.arange(0, BN)
        score = mean_logits(u_t, keys.means + bh * N * dims.SK, i0, s, dims, BN, PRECISION)
        score = tl.where((i < s)[None, :], score, float("-inf"))
        top, size, keep, gammas = soften(top, size, score)
        acc *= keep[:, None]
        for n in range(i0, tl.minimum(i0 + BN, s)):
            last = last_piece(spans.seg_last, n)
            state = _state(states, bh * P + last, column, dims, BV)
            gamma = tl.sum(tl.where(i[None, :] == n, gammas, 0.0), 1)
            acc = _add_read(acc, q_t, state, gamma, FORMULATION=FORMULATION, PRECISION=PRECISION)
    acc /= size[:, None]
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
    SWLA: bool,
    ROUTED: bool,
    AVERAGES: bool,
    GATES: str,
    FORMULATION: str,
    PRECISION: str,
    DK: int,
    DV: int,
    PK: int,
    PV: int,
    SK: int,
    SV: int,
    BT: int,
    BJ: int,
    BV: int,
    BN: int,
    num_warps: int,
    num_stages: int,
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
    if not ROUTED:
        read_summed_kernel[grid](
            rows=rows, states=states.operand, past=states.past, decays=decays, spans=spans, tiles=tiles, y=y,
            scale=scale, together=together, T=T, H=H, N=N, P=P, SWLA=SWLA, AVERAGES=AVERAGES, PRECISION=PRECISION,
            dims=dims, BT=BT, BJ=BJ, BV=bv, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    elif GATES == "fused":
        read_fused_kernel[grid](
            rows=rows, u=u, states=states.operand, keys=Keys(states.means, states.sums), decays=decays,
            spans=spans._replace(seg_begin=tables.seg_begin, seg_piece=tables.seg_piece), tiles=tiles, y=y, scale=scale,
            together=together, T=T, H=H, N=N, P=P, SWLA=SWLA, FORMULATION=FORMULATION,
            PRECISION=PRECISION, dims=dims, BT=BT, BJ=BJ, BV=bv, BN=BN, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    elif FORMULATION == "grouped":
        read_pairs_kernel[grid](
            rows=rows, states=states.operand, gates=gates._replace(chosen=None), partial=partial, decays=decays,
            spans=spans, tiles=tiles, y=y, scale=scale, first_head=first_head,
            first_token=first_token, span=span, top_k=top_k, together=together, T=T, H=H, P=P, SWLA=SWLA,
            PRECISION=PRECISION, dims=dims, BT=BT, BJ=BJ, BV=bv, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    else:
        read_gated_kernel[grid](
            rows=rows, states=states.operand, gates=gates, decays=decays, spans=spans, tiles=tiles, y=y, scale=scale,
            together=together, T=T, H=H, N=N, P=P, SWLA=SWLA, FORMULATION=FORMULATION, PRECISION=PRECISION,
            dims=dims, BT=BT, BJ=BJ, BV=bv, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return y
