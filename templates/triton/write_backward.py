"""Gradients of the writes to k and v, and under SWLA to the strengths and decays of the writes (Eq. 2, 10, 26-27).

    dv_j = scale sum_t w_tj gamma_t <q_t, k_j> dy_t + we_j k_j dEnd            t >= j in the piece, gamma the online one
    dk_j = scale sum_t w_tj gamma_t <dy_t, v_j> q_t + we_j v_j dEnd^T
           + dp_i / len_i + sum_{t >= j} pull_t u_t                            through the mean keys (gates_backward)

w_tj is the weight of token j in the memory at t, we_j that in the piece's end state. SWLA's gates have gradients made
of sums of D_tj = scale gamma_t <q_t, k_j> <dy_t, v_j> and of E_j = k_j dEnd v_j^T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import load_rows, load_state


@triton.jit(do_not_specialize=["T", "H", "P"])
def value_kernel(
    q, k, dy, gate, cum, now, after, dends, dv_lead, begin, end, segment, entering, seg_first, tiles, dv, scale, T,
    H, P,
    SWLA: tl.constexpr, AGGREGATION: tl.constexpr, PRECISION: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PK: tl.constexpr, SK: tl.constexpr, SV: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program: dv of BJ tokens, BN columns, of a head."""
    BLOCKS: tl.constexpr = (DV + BN - 1) // BN
    column = tl.program_id(0) % BLOCKS * BN
    tile = tiles + tl.program_id(0) // BLOCKS * 2
    bh = tl.program_id(1).to(tl.int64)
    piece = tl.load(tile)
    j0 = tl.load(tile + 1)
    stop = tl.load(end + piece)
    head = bh // H * T * H + bh % H
    q += head * DK
    k += head * DK
    dy += head * DV
    j = j0 + tl.arange(0, BJ)
    k_j = load_rows(k, j0, stop, H * DK, 0, DK, BJ, PK)
    state = load_state(dends + (bh * P + piece) * (SK * SV), 0, column, SK, SV, PK, BN)
    grad = tl.dot(k_j, state.to(k_j.dtype), input_precision=PRECISION)
    gate_t = scale
    if AGGREGATION == "mean":
        s = tl.load(segment + piece)
        gate_t = scale / (s - tl.load(seg_first + s) + 1)
    if SWLA:
        cum_next = tl.load(cum + bh * T + j + 1, mask=j + 1 < stop, other=0.0)
        after_j = tl.load(after + bh * T + j, mask=j + 1 < stop, other=0.0)
        now_j = tl.load(now + bh * T + j, mask=j < stop, other=0.0)
        left = after_j * tl.exp(tl.load(cum + bh * T + stop - 1) - cum_next)
        grad *= tl.where(j + 1 < stop, left, now_j)[:, None]
    for t0 in range(j0, stop, BT):
        t = t0 + tl.arange(0, BT)
        q_t = load_rows(q, t0, stop, H * DK, 0, DK, BT, PK)
        dy_t = load_rows(dy, t0, stop, H * DV, column, DV, BT, BN)
        scores = tl.dot(k_j, tl.trans(q_t), input_precision=PRECISION)
        if AGGREGATION == "grm" or AGGREGATION == "ssc":
            scores *= tl.load(gate + bh * T + t, mask=t < stop, other=0.0)[None, :]
        if SWLA:
            cum_t = tl.load(cum + bh * T + t, mask=t < stop, other=0.0)
            decayed = after_j[:, None] * tl.exp(tl.minimum(cum_t[None, :] - cum_next[:, None], 0.0))
            weights = tl.where(t[None, :] > j[:, None], decayed, 0.0)
            scores *= tl.where(t[None, :] == j[:, None], now_j[:, None], weights)
        else:
            scores = tl.where(t[None, :] >= j[:, None], scores, 0.0)
        scores *= gate_t
        grad = tl.dot(scores.to(dy_t.dtype), dy_t, grad, input_precision=PRECISION)
    cols = column + tl.arange(0, BN)
    if dv_lead is not None:
        # The piece's last token writes once more in the next piece, if its memory goes on there.
        if piece + 1 < P:
            if tl.load(entering + piece + 1) >= 0:
                lead = tl.load(dv_lead + (bh * P + piece + 1) * SV + cols, mask=cols < DV, other=0.0)
                grad += tl.where((j == stop - 1)[:, None], lead[None, :], 0.0)
    out = dv + head * DV + j.to(tl.int64)[:, None] * (H * DV) + cols[None, :]
    tl.store(out, grad.to(dv.dtype.element_ty), mask=(j < stop)[:, None] & (cols < DV)[None, :])


@triton.jit(do_not_specialize=["T", "H", "N", "P"])
def key_kernel(
    q,
    k,
    v,
    u,
    dy,
    gate,
    cum,
    now,
    after,
    dends,
    dmeans,
    pull,
    pulls,
    dk_lead,
    begin,
    end,
    segment,
    entering,
    seg_first,
    seg_last,
    tiles,
    dk,
    diagonal,
    tail,
    ending,
    scale,
    T,
    H,
    N,
    P,
    SWLA: tl.constexpr,
    AGGREGATION: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PK: tl.constexpr,
    PV: tl.constexpr,
    SK: tl.constexpr,
    SV: tl.constexpr,
    BJ: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """One program: dk of BJ tokens, BN columns, of a head; the program of the first columns adds up D over t."""
    BLOCKS: tl.constexpr = (DK + BN - 1) // BN
    column = tl.program_id(0) % BLOCKS * BN
    tile = tiles + tl.program_id(0) // BLOCKS * 2
    bh = tl.program_id(1).to(tl.int64)
    piece = tl.load(tile)
    j0 = tl.load(tile + 1)
    stop = tl.load(end + piece)
    s = tl.load(segment + piece)
    head = bh // H * T * H + bh % H
    q += head * DK
    v += head * DV
    dy += head * DV
    j = j0 + tl.arange(0, BJ)
    cols = column + tl.arange(0, BN)
    v_j = load_rows(v, j0, stop, H * DV, 0, DV, BJ, PV)
    state = load_state(dends + (bh * P + piece) * (SK * SV), column, 0, SK, SV, BN, PV)
    grad = tl.dot(v_j, tl.trans(state.to(v_j.dtype)), input_precision=PRECISION)
    gate_t = scale
    if AGGREGATION == "mean":
        gate_t = scale / (s - tl.load(seg_first + s) + 1)
    if SWLA:
        cum_next = tl.load(cum + bh * T + j + 1, mask=j + 1 < stop, other=0.0)
        after_j = tl.load(after + bh * T + j, mask=j + 1 < stop, other=0.0)
        now_j = tl.load(now + bh * T + j, mask=j < stop, other=0.0)
        part = ((column // BN) * tl.num_programs(1) + bh) * T
        k_part = load_rows(k + head * DK, j0, stop, H * DK, column, DK, BJ, BN).to(tl.float32)
        tl.store(ending + part + j, tl.sum(k_part * grad, 1), mask=j < stop)
        left = after_j * tl.exp(tl.load(cum + bh * T + stop - 1) - cum_next)
        grad *= tl.where(j + 1 < stop, left, now_j)[:, None]
        k_j = load_rows(k + head * DK, j0, stop, H * DK, 0, DK, BJ, PK)
        own = tl.zeros([BJ], tl.float32)
        others = tl.zeros([BJ], tl.float32)
    for t0 in range(j0, stop, BT):
        t = t0 + tl.arange(0, BT)
        q_t = load_rows(q, t0, stop, H * DK, column, DK, BT, BN)
        dy_t = load_rows(dy, t0, stop, H * DV, 0, DV, BT, PV)
        scores = tl.dot(v_j, tl.trans(dy_t), input_precision=PRECISION)
        if AGGREGATION == "grm" or AGGREGATION == "ssc":
            scores *= tl.load(gate + bh * T + t, mask=t < stop, other=0.0)[None, :]
        scores *= gate_t
        if SWLA:
            cum_t = tl.load(cum + bh * T + t, mask=t < stop, other=0.0)
            decay = tl.exp(tl.minimum(cum_t[None, :] - cum_next[:, None], 0.0))
            decay = tl.where(t[None, :] > j[:, None], decay, 0.0)
            reads = load_rows(q, t0, stop, H * DK, 0, DK, BT, PK)
            both = scores * tl.dot(k_j, tl.trans(reads), input_precision=PRECISION)
            own += tl.sum(tl.where(t[None, :] == j[:, None], both, 0.0), 1)
            others += tl.sum(both * decay, 1)
            scores *= tl.where(t[None, :] == j[:, None], now_j[:, None], after_j[:, None] * decay)
        else:
            scores = tl.where(t[None, :] >= j[:, None], scores, 0.0)
        grad = tl.dot(scores.to(q_t.dtype), q_t, grad, input_precision=PRECISION)
    if SWLA:
        if column == 0:
            tl.store(diagonal + bh * T + j, own, mask=j < stop)
            tl.store(tail + bh * T + j, others, mask=j < stop)
    if AGGREGATION == "grm" or AGGREGATION == "ssc":
        u += head * DK
        rest = tl.load(dmeans + (bh * N + s) * SK + cols, mask=cols < DK, other=0.0)
        if pulls is not None:
            for p in range(piece + 1, tl.load(seg_last + s) + 1):
                rest += tl.load(pulls + (bh * P + p) * SK + cols, mask=cols < DK, other=0.0)
        aside: tl.constexpr = (BJ + BT - 1) // BT * BT
        for t0 in range(j0, tl.minimum(j0 + aside, stop), BT):
            t = t0 + tl.arange(0, BT)
            u_t = load_rows(u, t0, stop, H * DK, column, DK, BT, BN).to(tl.float32)
            pull_t = tl.load(pull + bh * T + t, mask=t < stop, other=0.0)
            pulled = tl.where(t[None, :] >= j[:, None], pull_t[None, :], 0.0)
            if HALF and PRECISION == "tf32x3":
                # u is exact in TF32, and the pulls have more bits than the result.
                grad = tl.dot(pulled, u_t, grad, input_precision="tf32")
            else:
                grad = tl.dot(pulled, u_t, grad, input_precision=PRECISION)
        for t0 in range(j0 + aside, stop, BT):
            u_t = load_rows(u, t0, stop, H * DK, column, DK, BT, BN).to(tl.float32)
            t = t0 + tl.arange(0, BT)
            rest += tl.sum(u_t * tl.load(pull + bh * T + t, mask=t < stop, other=0.0)[:, None], 0)
        grad += rest[None, :]
    if dk_lead is not None:
        if piece + 1 < P:
            if tl.load(entering + piece + 1) >= 0:
                lead_row = dk_lead + (bh * P + piece + 1) * 2 * SK + cols
                lead = tl.load(lead_row, mask=cols < DK, other=0.0) + tl.load(lead_row + SK, mask=cols < DK, other=0.0)
                grad += tl.where((j == stop - 1)[:, None], lead[None, :], 0.0)
    out = dk + head * DK + j.to(tl.int64)[:, None] * (H * DK) + cols[None, :]
    tl.store(out, grad.to(dk.dtype.element_ty), mask=(j < stop)[:, None] & (cols < DK)[None, :])


@triton.jit(do_not_specialize=["T", "H", "P"])
def strength_kernel(
    gate,
    own,
    g,
    lam,
    cum,
    now,
    after,
    before,
    diagonal,
    tail,
    ending,
    dbefore,
    crossing,
    begin,
    end,
    segment,
    entering,
    seg_first,
    dg,
    dbeta,
    dlam,
    T,
    H,
    P,
    AGGREGATION: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One program: the gates' gradients of a piece."""
    piece = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    start = tl.load(begin + piece)
    stop = tl.load(end + piece)
    enters = tl.load(entering + piece) >= 0
    t = start + tl.arange(0, PIECE)
    here = t < stop
    inner = here & (t > start)
    more = t + 1 < stop
    line = bh * T + t
    place = (bh // H * T + t) * H + bh % H
    cum_t = tl.load(cum + line, mask=here, other=0.0)
    cum_end = tl.load(cum + bh * T + stop - 1)
    # Of the token before t in the piece, or of the row before the piece.
    left = tl.exp(tl.minimum(cum_end - cum_t, 0.0))
    ended = left * tl.load(ending + line - 1, mask=inner, other=0.0)
    strong = tl.load(after + line - 1, mask=inner, other=0.0)
    last = tl.sum(strong * ended, 0)
    dstrong = ended + tl.load(tail + line - 1, mask=inner, other=0.0)
    if dbefore is not None:
        at_start = (t == start) & enters
        dstrong += tl.where(at_start, tl.load(dbefore + bh * P + piece, mask=enters, other=0.0), 0.0)
        strong += tl.where(at_start, tl.load(before + bh * P + piece, mask=enters, other=0.0), 0.0)
        last += tl.load(crossing + bh * P + piece, mask=enters, other=0.0)
    tl.store(dbeta + place, dstrong, mask=here)
    own_t = tl.load(own + line, mask=here, other=0.0)
    if AGGREGATION == "grm" or AGGREGATION == "ssc":
        own_t *= tl.load(gate + line, mask=here, other=0.0)
    if AGGREGATION == "mean":
        s = tl.load(segment + piece)
        own_t /= s - tl.load(seg_first + s) + 1
    dnow = tl.load(diagonal + line, mask=here, other=0.0)
    dcum = own_t - tl.load(now + line, mask=here, other=0.0) * dnow - strong * dstrong
    dcum += tl.where(t == stop - 1, last, 0.0)
    written = tl.load(lam + place - H, mask=inner, other=0.0)
    decay = tl.exp(tl.load(g + place, mask=here, other=0.0))
    total = tl.cumsum(dcum, 0, reverse=True) + written * decay * dstrong
    # What nothing enters does not decay; only rounding would say that it does.
    tl.store(dg + place, tl.where((t > start) | enters, total, 0.0), mask=here)
    e_t = tl.load(ending + line, mask=here, other=0.0)
    later = tl.exp(tl.minimum(cum_end - tl.load(cum + line + 1, mask=more, other=0.0), 0.0)) * e_t
    later += tl.load(tail + line, mask=more, other=0.0)
    later *= tl.exp(tl.load(g + place + H, mask=more, other=0.0))
    tl.store(dlam + place, dnow + tl.where(more, later, tl.where(t == stop - 1, e_t, 0.0)), mask=here)


def write_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    dy: torch.Tensor,
    g: torch.Tensor | None,
    lam: torch.Tensor | None,
    gate: torch.Tensor | None,
    own: torch.Tensor,
    cum: torch.Tensor | None,
    now: torch.Tensor | None,
    after: torch.Tensor | None,
    before: torch.Tensor | None,
    dends: torch.Tensor,
    crossing: torch.Tensor | None,
    dk_lead: torch.Tensor | None,
    dv_lead: torch.Tensor | None,
    dbefore: torch.Tensor | None,
    dmeans: torch.Tensor | None,
    pull: torch.Tensor | None,
    pulls: torch.Tensor | None,
    begin: torch.Tensor,
    end: torch.Tensor,
    segment: torch.Tensor,
    entering: torch.Tensor,
    seg_first: torch.Tensor,
    seg_last: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    SWLA: bool,
    AGGREGATION: str,
    HALF: bool,
    PRECISION: str,
    PIECE: int,
    DK: int,
    DV: int,
    PK: int,
    PV: int,
    SK: int,
    SV: int,
    BJ: int,
    BT: int,
    BN: int,
    num_warps: int,
    num_stages: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dk ``[B, T, H, DK]``, dv ``[B, T, H, DV]``, dg, dbeta and dlam ``[B, T, H]`` (None for linear).

    Args:
        q, k, u [B, T, H, DK], v, dy [B, T, H, DV]: of one dtype; g, lam [B, T, H]: float32, None for linear.
        gate, dmeans, pull, pulls: of :mod:`gates_backward`; None where gates are not learned.
        own: of :mod:`read_backward`; dends, crossing, dk_lead, dv_lead, dbefore: of :mod:`state_backward`.
        cum, now, after, before: None for linear.
        tiles: of BJ tokens.

    Returns:
        dk and dv in k's dtype, the others float32.
    """
    B, T, H, _ = k.shape
    N, P = seg_first.shape[0], begin.shape[0]
    bk, bv = min(BN, PK), min(BN, PV)
    blocks = triton.cdiv(DK, bk)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    diagonal = tail = ending = dg = dbeta = dlam = None
    if SWLA:
        diagonal, tail = dends.new_empty((B * H, T)), dends.new_empty((B * H, T))
        ending = dends.new_empty((blocks, B * H, T))
    value_kernel[(triton.cdiv(DV, bv) * tiles.shape[0], B * H)](
        q=q, k=k, dy=dy, gate=gate, cum=cum, now=now, after=after, dends=dends, dv_lead=dv_lead, begin=begin, end=end,
        segment=segment, entering=entering, seg_first=seg_first, tiles=tiles, dv=dv, scale=scale, T=T, H=H, P=P,
        SWLA=SWLA, AGGREGATION=AGGREGATION, PRECISION=PRECISION, DK=DK, DV=DV, PK=PK, SK=SK, SV=SV, BJ=BJ, BT=BT,
        BN=bv, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    key_kernel[(blocks * tiles.shape[0], B * H)](
        q=q, k=k, v=v, u=u, dy=dy, gate=gate, cum=cum, now=now, after=after, dends=dends, dmeans=dmeans, pull=pull,
        pulls=pulls, dk_lead=dk_lead, begin=begin, end=end, segment=segment, entering=entering, seg_first=seg_first,
        seg_last=seg_last, tiles=tiles, dk=dk, diagonal=diagonal, tail=tail, ending=ending, scale=scale, T=T, H=H,
        N=N, P=P, SWLA=SWLA, AGGREGATION=AGGREGATION, HALF=HALF, PRECISION=PRECISION, DK=DK, DV=DV, PK=PK, PV=PV,
        SK=SK, SV=SV, BJ=BJ, BT=BT, BN=bk, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if SWLA:
        dg, dbeta, dlam = (torch.empty_like(g) for _ in range(3))
        strength_kernel[(P, B * H)](
            gate=gate, own=own.sum(0), g=g, lam=lam, cum=cum, now=now, after=after, before=before, diagonal=diagonal,
            tail=tail, ending=ending.sum(0), dbefore=dbefore, crossing=crossing, begin=begin, end=end,
            segment=segment, entering=entering, seg_first=seg_first, dg=dg, dbeta=dbeta, dlam=dlam, T=T, H=H, P=P,
            AGGREGATION=AGGREGATION, PIECE=PIECE, num_warps=4,
        )  # fmt: skip
    return dk, dv, dg, dbeta, dlam
