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

import torch
import triton
import triton.language as tl

from .common import block_and_head, load_rows, load_state


@triton.jit(do_not_specialize=["top_k", "together", "T", "H", "N", "P"])
def read_backward_kernel(
    q,
    k,
    v,
    dy,
    states,
    past,
    logits,
    lse,
    own_logit,
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
    seg_first,
    seg_last,
    tiles,
    dq,
    dgamma,
    own,
    delta,
    scale,
    top_k,
    together,
    T,
    H,
    N,
    P,
    SWLA: tl.constexpr,
    AGGREGATION: tl.constexpr,
    FORMULATION: tl.constexpr,
    PRECISION: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PK: tl.constexpr,
    PV: tl.constexpr,
    SK: tl.constexpr,
    SV: tl.constexpr,
    BT: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: BT tokens, BK key columns, one head."""
    BLOCKS: tl.constexpr = (DK + BK - 1) // BK
    block, bh = block_and_head(together)
    column = block % BLOCKS * BK
    tile = tiles + block // BLOCKS * 2
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
    dy += head * DV
    t = t0 + tl.arange(0, BT)
    valid = t < stop
    lines = bh * T + t
    dy_t = load_rows(dy, t0, stop, H * DV, 0, DV, BT, PV)
    q_t = load_rows(q, t0, stop, H * DK, column, DK, BT, BK)
    online = tl.zeros([BT, BK], tl.float32)
    if SWLA:
        cum += bh * T
        cum_t = tl.load(cum + t, mask=valid, other=0.0)
        now_t = tl.load(now + lines, mask=valid, other=0.0)
    for j0 in range(start, stop, BJ):
        j = j0 + tl.arange(0, BJ)
        v_j = load_rows(v, j0, stop, H * DV, 0, DV, BJ, PV)
        k_j = load_rows(k, j0, stop, H * DK, column, DK, BJ, BK)
        scores = tl.dot(dy_t, tl.trans(v_j), input_precision=PRECISION)
        if SWLA:
            cum_next = tl.load(cum + j + 1, mask=j + 1 < stop, other=0.0)
            after_j = tl.load(after + bh * T + j, mask=j + 1 < stop, other=0.0)
            decayed = after_j[None, :] * tl.exp(tl.minimum(cum_t[:, None] - cum_next[None, :], 0.0))
            weights = tl.where(t[:, None] > j[None, :], decayed, 0.0)
            scores *= tl.where(t[:, None] == j[None, :], now_t[:, None], weights)
        else:
            scores = tl.where(t[:, None] >= j[None, :], scores, 0.0)
        online = tl.dot(scores.to(k_j.dtype), k_j, online, input_precision=PRECISION)
    if enters >= 0:
        state = load_state(states + (bh * P + enters) * (SK * SV), column, 0, SK, SV, BK, PV)
        entered = tl.dot(dy_t, tl.trans(state), input_precision=PRECISION)
        if SWLA:
            entered *= tl.exp(cum_t)[:, None]
            # The row before the piece writes once more, with the strength of the piece's first token.
            values = tl.arange(0, PV)
            cols = column + tl.arange(0, BK)
            last = tl.cast(start - 1, tl.int64)
            v_row = tl.load(v + last * (H * DV) + values, mask=values < DV, other=0.0).to(tl.float32)
            k_row = tl.load(k + last * (H * DK) + cols, mask=cols < DK, other=0.0).to(tl.float32)
            score = tl.sum(dy_t.to(tl.float32) * v_row[None, :], 1)
            score *= tl.load(before + bh * P + piece) * tl.exp(cum_t - tl.load(cum + start))
            entered += score[:, None] * k_row[None, :]
        online += entered

    keys = q_t.to(tl.float32)
    part = (column // BK) * (tl.num_programs(1) * together) + bh
    tl.store(own + part * T + t, tl.sum(keys * online, 1) * scale, mask=valid)
    if AGGREGATION == "residual" or AGGREGATION == "mean":
        if s > first:
            state = load_state(past + (bh * N + s) * (SK * SV), column, 0, SK, SV, BK, PV)
            online = tl.dot(dy_t, tl.trans(state), online, input_precision=PRECISION)
    if AGGREGATION == "mean":
        online *= 1.0 / (s - first + 1)
    if AGGREGATION == "grm" or AGGREGATION == "ssc":
        total = tl.load(lse + lines, mask=valid, other=float("inf"))
        if FORMULATION == "grouped":
            online *= tl.exp(tl.load(own_logit + lines, mask=valid, other=0.0) - total)[:, None]
            places = column + tl.arange(0, BK)
            for r in range(0, top_k):
                # Without a segment a logit is -inf, and nothing was written.
                chosen = tl.load(picked + lines * top_k + r, mask=valid, other=float("-inf")) > float("-inf")
                row = (lines * top_k + r)[:, None] * DK + places[None, :]
                inside = chosen[:, None] & (places < DK)[None, :]
                online += tl.load(partial + row, mask=inside, other=0.0).to(tl.float32)
        else:
            online *= tl.exp(tl.load(logits + (bh * N + s) * T + t, mask=valid, other=0.0) - total)[:, None]
            for i in range(first, s):
                last = i
                if seg_last is not None:
                    last = tl.load(seg_last + i)
                state = load_state(states + (bh * P + last) * (SK * SV), column, 0, SK, SV, BK, PV)
                read = tl.dot(dy_t, tl.trans(state), input_precision=PRECISION)
                gamma = tl.exp(tl.load(logits + (bh * N + i) * T + t, mask=valid, other=0.0) - total)
                tl.store(dgamma + (part * N + i) * T + t, tl.sum(keys * read, 1) * scale, mask=valid)
                online += gamma[:, None] * read
            tl.store(delta + part * T + t, tl.sum(keys * online, 1) * scale, mask=valid)
    cols = column + tl.arange(0, BK)
    out = dq + head * DK + t.to(tl.int64)[:, None] * (H * DK) + cols[None, :]
    tl.store(out, (online * scale).to(dq.dtype.element_ty), mask=valid[:, None] & (cols < DK)[None, :])


def read_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dy: torch.Tensor,
    states: torch.Tensor,
    past: torch.Tensor | None,
    logits: torch.Tensor | None,
    lse: torch.Tensor | None,
    own_logit: torch.Tensor | None,
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
    seg_first: torch.Tensor,
    seg_last: torch.Tensor | None,
    tiles: torch.Tensor,
    scale: float,
    top_k: int,
    SWLA: bool,
    AGGREGATION: str,
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
    BK: int,
    num_warps: int,
    num_stages: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """dq ``[B, T, H, DK]``; to be added up over blocks dgamma ``[blocks, B*H, N, T]``, own, delta ``[blocks, B*H, T]``.

    Args:
        q, k [B, T, H, DK], v, dy [B, T, H, DV]: of one dtype.
        states [B*H, P, SK, SV]: end states of the pieces, as operands of products; past: of :mod:`segment_states`.
        logits, lse, own_logit, picked: of :mod:`gates`; None where gates are not learned, logits also with "grouped".
        partial [B*H, T, top_k, DK]: of :mod:`grouped_backward`, parts of dq without ``scale``.
        seg_last: None where every segment is one piece.
        tiles: of BT tokens.

    Returns:
        dq in q's dtype. Float32: the gradients of the cached segments' gates, row i at the tokens of later segments;
        that of the online segment's; the sum of all, each times its gate. dgamma and delta are None where gates are
        equal or others have their gradients.
    """
    B, T, H, _ = q.shape
    bk = min(BK, PK)
    blocks, N, P = triton.cdiv(DK, bk), seg_first.shape[0], begin.shape[0]
    dq = torch.empty_like(q)
    own = q.new_empty((blocks, B * H, T), dtype=torch.float32)
    dgamma = delta = None
    if FORMULATION != "grouped" and (AGGREGATION == "grm" or AGGREGATION == "ssc"):
        dgamma, delta = q.new_empty((blocks, B * H, N, T), dtype=torch.float32), torch.empty_like(own)
    together = math.gcd(B * H, 8)
    read_backward_kernel[(blocks * tiles.shape[0] * together, B * H // together)](
        q=q, k=k, v=v, dy=dy, states=states, past=past, logits=logits, lse=lse, own_logit=own_logit,
        picked=picked, partial=partial, cum=cum, now=now, after=after, before=before, begin=begin, end=end,
        segment=segment, entering=entering, seg_first=seg_first, seg_last=seg_last, tiles=tiles, dq=dq, dgamma=dgamma,
        own=own, delta=delta, scale=scale, top_k=top_k, together=together, T=T, H=H, N=N, P=P, SWLA=SWLA,
        AGGREGATION=AGGREGATION, FORMULATION=FORMULATION, PRECISION=PRECISION, DK=DK, DV=DV, PK=PK, PV=PV, SK=SK, SV=SV,
        BT=BT, BJ=BJ, BK=bk, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return dq, dgamma, own, delta
