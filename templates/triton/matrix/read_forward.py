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

from .common import block_and_head, load_rows, load_state


@triton.jit(do_not_specialize=["first_head", "first_token", "span", "top_k", "together", "T", "H", "N", "P"])
def read_forward_kernel(
    q,
    k,
    v,
    u,
    states,
    past,
    means,
    sums,
    logits,
    lse,
    own,
    picked,
    partial,
    cum,
    now,
    after,
    before,
    begin,
    end,
    segment,
    entering,
    seg_begin,
    seg_first,
    seg_piece,
    seg_last,
    tiles,
    y,
    scale,
    first_head,
    first_token,
    span,
    top_k,
    together,
    T,
    H,
    N,
    P,
    SWLA: tl.constexpr,
    AGGREGATION: tl.constexpr,
    GATES: tl.constexpr,
    FORMULATION: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PK: tl.constexpr,
    SK: tl.constexpr,
    SV: tl.constexpr,
    BT: tl.constexpr,
    BJ: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
):
    """One program: BT tokens, BV value columns, one head."""
    BLOCKS: tl.constexpr = (DV + BV - 1) // BV
    block, bh = block_and_head(together)
    column = block % BLOCKS * BV
    tile = tiles + block // BLOCKS * 2
    if FORMULATION == "grouped":
        # ``partial`` has the heads and the tokens of this launch.
        partial += (bh * span - first_token) * top_k * DV
        bh += first_head
    piece = tl.load(tile)
    t0 = tl.load(tile + 1)
    start = tl.load(begin + piece)
    stop = tl.minimum(t0 + BT, tl.load(end + piece))
    s = tl.load(segment + piece)
    first = tl.load(seg_first + s)
    enters = tl.load(entering + piece)
    head = bh // H * T * H + bh % H
    q += head * DK
    k += head * DK
    v += head * DV
    t = t0 + tl.arange(0, BT)
    valid = t < stop
    q_t = load_rows(q, t0, stop, H * DK, 0, DK, BT, PK)
    if SWLA:
        cum += bh * T
        cum_t = tl.load(cum + t, mask=valid, other=0.0)
        now_t = tl.load(now + bh * T + t, mask=valid, other=0.0)
    if GATES == "fused":
        u_t = load_rows(u + head * DK, t0, stop, H * DK, 0, DK, BT, PK)
        total = tl.zeros([BT], tl.float32)
        if sums is not None:
            keys = tl.arange(0, PK)
            earlier = tl.zeros([PK], tl.float32)
            for p in range(tl.load(seg_piece + s), piece):
                earlier += tl.load(sums + (bh * P + p) * SK + keys, mask=keys < SK, other=0.0)
            total += tl.sum(u_t.to(tl.float32) * earlier[None, :], 1)

    # The online memory: first what the piece has written, up to t.
    acc = tl.zeros([BT, BV], tl.float32)
    for j0 in range(start, stop, BJ):
        j = j0 + tl.arange(0, BJ)
        k_j = tl.trans(load_rows(k, j0, stop, H * DK, 0, DK, BJ, PK))
        v_j = load_rows(v, j0, stop, H * DV, column, DV, BJ, BV)
        scores = tl.dot(q_t, k_j, input_precision=PRECISION)
        if GATES == "fused":
            writes = tl.dot(u_t, k_j, input_precision=PRECISION)
            total += tl.sum(tl.where(t[:, None] >= j[None, :], writes, 0.0), 1)
        if SWLA:
            cum_next = tl.load(cum + j + 1, mask=j + 1 < stop, other=0.0)
            after_j = tl.load(after + bh * T + j, mask=j + 1 < stop, other=0.0)
            decayed = after_j[None, :] * tl.exp(tl.minimum(cum_t[:, None] - cum_next[None, :], 0.0))
            weights = tl.where(t[:, None] > j[None, :], decayed, 0.0)
            scores *= tl.where(t[:, None] == j[None, :], now_t[:, None], weights)
        else:
            scores = tl.where(t[:, None] >= j[None, :], scores, 0.0)
        acc = tl.dot(scores.to(v_j.dtype), v_j, acc, input_precision=PRECISION)
    if enters >= 0:
        state = load_state(states + (bh * P + enters) * (SK * SV), 0, column, SK, SV, PK, BV)
        entered = tl.dot(q_t, state, input_precision=PRECISION)
        if SWLA:
            entered *= tl.exp(cum_t)[:, None]
            # The token before the piece writes once more, with the strength of the piece's first token.
            keys = tl.arange(0, PK)
            cols = column + tl.arange(0, BV)
            last = tl.cast(start - 1, tl.int64)
            k_row = tl.load(k + last * (H * DK) + keys, mask=keys < DK, other=0.0).to(tl.float32)
            v_row = tl.load(v + last * (H * DV) + cols, mask=cols < DV, other=0.0).to(tl.float32)
            score = tl.sum(q_t.to(tl.float32) * k_row[None, :], 1)
            score *= tl.load(before + bh * P + piece) * tl.exp(cum_t - tl.load(cum + start))
            entered += score[:, None] * v_row[None, :]
        acc += entered

    if AGGREGATION == "residual" or AGGREGATION == "mean":
        if s > first:
            state = load_state(past + (bh * N + s) * (SK * SV), 0, column, SK, SV, PK, BV)
            acc = tl.dot(q_t, state, acc, input_precision=PRECISION)
    if AGGREGATION == "mean":
        acc *= 1.0 / (s - first + 1)
    if AGGREGATION == "grm" or AGGREGATION == "ssc":
        if FORMULATION == "grouped":
            logsum = tl.load(lse + bh * T + t, mask=valid, other=0.0)
            acc *= tl.exp(tl.load(own + bh * T + t, mask=valid, other=0.0) - logsum)[:, None]
            cols = column + tl.arange(0, BV)
            for r in range(0, top_k):
                row = t.to(tl.int64) * top_k + r
                # Without a segment a logit is -inf, and nothing was written.
                logit = tl.load(picked + bh * T * top_k + row, mask=valid, other=float("-inf"))
                inside = (logit > float("-inf"))[:, None] & (cols < DV)[None, :]
                acc += tl.load(partial + row[:, None] * DV + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        elif GATES == "precomputed":
            # Under ssc a logit may be -inf; it is no number where nothing was written.
            logsum = tl.load(lse + bh * T + t, mask=valid, other=0.0)
            row = logits + bh * N * T + t
            log_gate = tl.load(row + s.to(tl.int64) * T, mask=valid, other=0.0) - logsum
            if FORMULATION == "scaled":
                # At most e^40 between two gates, whatever came in between: the sum in units of one stays finite where
                # reads are below 1e21, and no gate is off by more than 4e-18. What is no number stays none.
                FLOOR: tl.constexpr = -40.0
                unit = tl.exp(tl.where(log_gate < FLOOR, FLOOR, log_gate))
            else:
                acc *= tl.exp(log_gate)[:, None]
            for i in range(first, s):
                last = i
                if seg_last is not None:
                    last = tl.load(seg_last + i)
                state = load_state(states + (bh * P + last) * (SK * SV), 0, column, SK, SV, PK, BV)
                log_gate = tl.load(row + tl.cast(i, tl.int64) * T, mask=valid, other=float("-inf")) - logsum
                if FORMULATION == "scaled":
                    log_gate = tl.where(log_gate < FLOOR, FLOOR, log_gate)
                    acc = tl.dot(q_t, state, acc * (unit * tl.exp(-log_gate))[:, None], input_precision=PRECISION)
                    unit = tl.exp(log_gate)
                elif FORMULATION == "gated":
                    gated = (q_t.to(tl.float32) * tl.exp(log_gate)[:, None]).to(q_t.dtype)
                    acc = tl.dot(gated, state, acc, input_precision=PRECISION)
                else:
                    acc += tl.exp(log_gate)[:, None] * tl.dot(q_t, state, input_precision=PRECISION)
            if FORMULATION == "scaled":
                # Loaded again: carried out of the loop, every unit would be computed in a second layout.
                latest = tl.where(s > first, s - 1, s).to(tl.int64)
                log_gate = tl.load(row + latest * T, mask=valid, other=0.0) - logsum
                acc *= tl.exp(tl.where(log_gate < FLOOR, FLOOR, log_gate))[:, None]
        else:
            top = total / (t - tl.load(seg_begin + s) + 1).to(tl.float32)
            size = tl.full([BT], 1.0, tl.float32)
            for i0 in range(first, s, BN):
                i = i0 + tl.arange(0, BN)
                mean = load_rows(means + bh * N * SK, i0, s, SK, 0, SK, BN, PK)
                if HALF:
                    high = mean.to(u_t.dtype)
                    low = (mean - high.to(tl.float32)).to(u_t.dtype)
                    score = tl.dot(u_t, tl.trans(high), tl.dot(u_t, tl.trans(low)))
                else:
                    score = tl.dot(u_t, tl.trans(mean), input_precision=PRECISION)
                score = tl.where((i < s)[None, :], score, float("-inf"))
                higher = tl.maximum(top, tl.max(score, 1))
                keep = tl.exp(top - higher)
                score = tl.exp(score - higher[:, None])
                size = size * keep + tl.sum(score, 1)
                acc *= keep[:, None]
                top = higher
                for n in range(i0, tl.minimum(i0 + BN, s)):
                    last = n
                    if seg_last is not None:
                        last = tl.load(seg_last + n)
                    state = load_state(states + (bh * P + last) * (SK * SV), 0, column, SK, SV, PK, BV)
                    gamma = tl.sum(tl.where(i[None, :] == n, score, 0.0), 1)
                    if FORMULATION == "gated":
                        gated = (q_t.to(tl.float32) * gamma[:, None]).to(q_t.dtype)
                        acc = tl.dot(gated, state, acc, input_precision=PRECISION)
                    else:
                        acc += gamma[:, None] * tl.dot(q_t, state, input_precision=PRECISION)
            acc /= size[:, None]
    cols = column + tl.arange(0, BV)
    out = y + head * DV + t.to(tl.int64)[:, None] * (H * DV) + cols[None, :]
    tl.store(out, (acc * scale).to(y.dtype.element_ty), mask=valid[:, None] & (cols < DV)[None, :])


def read_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    states: torch.Tensor,
    past: torch.Tensor | None,
    means: torch.Tensor,
    sums: torch.Tensor | None,
    logits: torch.Tensor | None,
    lse: torch.Tensor | None,
    own: torch.Tensor | None,
    picked: torch.Tensor | None,
    partial: torch.Tensor | None,
    cum: torch.Tensor | None,
    now: torch.Tensor | None,
    after: torch.Tensor | None,
    before: torch.Tensor | None,
    begin: torch.Tensor,
    end: torch.Tensor,
    segment: torch.Tensor,
    entering: torch.Tensor,
    seg_begin: torch.Tensor,
    seg_first: torch.Tensor,
    seg_piece: torch.Tensor,
    seg_last: torch.Tensor | None,
    tiles: torch.Tensor,
    y: torch.Tensor,
    scale: float,
    first_head: int,
    heads: int,
    first_token: int,
    span: int,
    top_k: int,
    SWLA: bool,
    AGGREGATION: str,
    GATES: str,
    FORMULATION: str,
    HALF: bool,
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
        states [B*H, P, SK, SV]: end states of the pieces, as operands of products.
        past, means, sums: of :mod:`segment_states`; logits, lse, own, picked: of :mod:`gates`.
        partial [heads, span, top_k, DV]: of :mod:`grouped_read`, gates times reads without ``scale``.
        seg_last: None where every segment is one piece.
        tiles: of BT tokens, of those that this launch is about.
        first_head, heads, first_token, span: which those are.
    """
    _, T, H, _ = q.shape
    bv = min(BV, PV)
    together = math.gcd(heads, 8)
    read_forward_kernel[(triton.cdiv(DV, bv) * tiles.shape[0] * together, heads // together)](
        q=q, k=k, v=v, u=u, states=states, past=past, means=means, sums=sums, logits=logits, lse=lse, own=own,
        picked=picked, partial=partial, cum=cum, now=now, after=after, before=before, begin=begin, end=end,
        segment=segment, entering=entering, seg_begin=seg_begin, seg_first=seg_first, seg_piece=seg_piece,
        seg_last=seg_last, tiles=tiles, y=y, scale=scale, first_head=first_head, first_token=first_token, span=span,
        top_k=top_k, together=together, T=T, H=H, N=seg_first.shape[0], P=begin.shape[0], SWLA=SWLA,
        AGGREGATION=AGGREGATION, GATES=GATES, FORMULATION=FORMULATION, HALF=HALF, PRECISION=PRECISION, DK=DK, DV=DV,
        PK=PK, SK=SK, SV=SV, BT=BT, BJ=BJ, BV=bv, BN=BN, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return y
