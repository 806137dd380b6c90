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

from .common import Decays, Leads, Pieces, Pulls, Sums, load_rows, load_state


@triton.jit(do_not_specialize=["T", "H", "N", "P"])
def write_kernel(
    q,
    k,
    v,
    u,
    dy,
    gate,
    decays,
    dends,
    pulls,
    leads,
    pieces,
    tiles,
    dk,
    dv,
    sums,
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
    BS: tl.constexpr,
):
    """One program: dk and dv of BJ tokens of a head, and under SWLA what their gates' gradients add up."""
    tile = tiles + tl.program_id(0) * 2
    bh = tl.program_id(1).to(tl.int64)
    piece = tl.load(tile)
    j0 = tl.load(tile + 1)
    stop = tl.load(pieces.end + piece)
    s = tl.load(pieces.segment + piece)
    head = bh // H * T * H + bh % H
    q += head * DK
    k += head * DK
    v += head * DV
    dy += head * DV
    j = j0 + tl.arange(0, BJ)
    k_j = load_rows(k, j0, stop, H * DK, 0, DK, BJ, PK)
    v_j = load_rows(v, j0, stop, H * DV, 0, DV, BJ, PV)

    # What the piece's end state says, BS rows or columns of it at a time; where it is all of them, it is loaded once.
    KEYS: tl.constexpr = BS if BS < PK else PK
    VALUES: tl.constexpr = BS if BS < PV else PV
    dends += (bh * P + piece) * (SK * SV)
    dv_j = tl.zeros([BJ, PV], tl.float32)
    for c in range(0, SK, KEYS):
        k_c = load_rows(k, j0, stop, H * DK, c, DK, BJ, KEYS)
        dv_j = tl.dot(k_c, load_state(dends, c, 0, SK, SV, KEYS, PV), dv_j, input_precision=PRECISION)
    dk_j = tl.zeros([BJ, PK], tl.float32)
    for c in range(0, SV, VALUES):
        v_c = load_rows(v, j0, stop, H * DV, c, DV, BJ, VALUES)
        dk_j = tl.dot(v_c, tl.trans(load_state(dends, 0, c, SK, SV, PK, VALUES)), dk_j, input_precision=PRECISION)
    weight = scale
    if AGGREGATION == "mean":
        weight = scale / (s - tl.load(pieces.seg_first + s) + 1)
    if SWLA:
        cum = decays.cum + bh * T
        cum_next = tl.load(cum + j + 1, mask=j + 1 < stop, other=0.0)
        after_j = tl.load(decays.after + bh * T + j, mask=j + 1 < stop, other=0.0)
        now_j = tl.load(decays.now + bh * T + j, mask=j < stop, other=0.0)
        tl.store(sums.ending + bh * T + j, tl.sum(k_j.to(tl.float32) * dk_j, 1), mask=j < stop)
        left = tl.where(j + 1 < stop, after_j * tl.exp(tl.load(cum + stop - 1) - cum_next), now_j)
        dv_j *= left[:, None]
        dk_j *= left[:, None]
        own = tl.zeros([BJ], tl.float32)
        others = tl.zeros([BJ], tl.float32)

    # What its later tokens say.
    for t0 in range(j0, stop, BT):
        t = t0 + tl.arange(0, BT)
        q_t = load_rows(q, t0, stop, H * DK, 0, DK, BT, PK)
        dy_t = load_rows(dy, t0, stop, H * DV, 0, DV, BT, PV)
        for_values = tl.dot(k_j, tl.trans(q_t), input_precision=PRECISION)
        for_keys = tl.dot(v_j, tl.trans(dy_t), input_precision=PRECISION)
        if AGGREGATION == "grm" or AGGREGATION == "ssc":
            weight_t = weight * tl.load(gate + bh * T + t, mask=t < stop, other=0.0)[None, :]
        else:
            weight_t = weight
        if SWLA:
            cum_t = tl.load(cum + t, mask=t < stop, other=0.0)
            decay = tl.exp(tl.minimum(cum_t[None, :] - cum_next[:, None], 0.0))
            decay = tl.where(t[None, :] > j[:, None], decay, 0.0)
            both = for_values * for_keys * weight_t
            own += tl.sum(tl.where(t[None, :] == j[:, None], both, 0.0), 1)
            others += tl.sum(both * decay, 1)
            weights = tl.where(t[None, :] == j[:, None], now_j[:, None], after_j[:, None] * decay) * weight_t
        else:
            weights = tl.where(t[None, :] >= j[:, None], weight_t, 0.0)
        dv_j = tl.dot((for_values * weights).to(dy_t.dtype), dy_t, dv_j, input_precision=PRECISION)
        dk_j = tl.dot((for_keys * weights).to(q_t.dtype), q_t, dk_j, input_precision=PRECISION)

    keys = tl.arange(0, PK)
    cols = tl.arange(0, PV)
    if leads.dv_lead is not None:
        # The piece's last token writes once more in the next piece, if its memory goes on there.
        if piece + 1 < P:
            if tl.load(pieces.entering + piece + 1) >= 0:
                place = bh * P + piece + 1
                last = (j == stop - 1)[:, None]
                lead = tl.load(leads.dv_lead + place * SV + cols, mask=cols < DV, other=0.0)
                dv_j += tl.where(last, lead[None, :], 0.0)
                lead = tl.load(leads.dk_lead + place * 2 * SK + keys, mask=keys < DK, other=0.0)
                lead += tl.load(leads.dk_lead + (place * 2 + 1) * SK + keys, mask=keys < DK, other=0.0)
                dk_j += tl.where(last, lead[None, :], 0.0)
    out = dv + head * DV + j.to(tl.int64)[:, None] * (H * DV) + cols[None, :]
    tl.store(out, dv_j.to(dv.dtype.element_ty), mask=(j < stop)[:, None] & (cols < DV)[None, :])
    if SWLA:
        tl.store(sums.diagonal + bh * T + j, own, mask=j < stop)
        tl.store(sums.tail + bh * T + j, others, mask=j < stop)
    if AGGREGATION == "grm" or AGGREGATION == "ssc":
        u += head * DK
        pull = pulls.pull + bh * T
        rest = tl.load(pulls.dmeans + (bh * N + s) * SK + keys, mask=keys < DK, other=0.0)
        if pulls.pulls is not None:
            for p in range(piece + 1, tl.load(pieces.seg_last + s) + 1):
                rest += tl.load(pulls.pulls + (bh * P + p) * SK + keys, mask=keys < DK, other=0.0)
        aside: tl.constexpr = (BJ + BT - 1) // BT * BT
        for t0 in range(j0, tl.minimum(j0 + aside, stop), BT):
            t = t0 + tl.arange(0, BT)
            u_t = load_rows(u, t0, stop, H * DK, 0, DK, BT, PK).to(tl.float32)
            pull_t = tl.load(pull + t, mask=t < stop, other=0.0)
            pulled = tl.where(t[None, :] >= j[:, None], pull_t[None, :], 0.0)
            if HALF and PRECISION == "tf32x3":
                # u is exact in TF32, and the pulls have more bits than the result.
                dk_j = tl.dot(pulled, u_t, dk_j, input_precision="tf32")
            else:
                dk_j = tl.dot(pulled, u_t, dk_j, input_precision=PRECISION)
        for t0 in range(j0 + aside, stop, BT):
            u_t = load_rows(u, t0, stop, H * DK, 0, DK, BT, PK).to(tl.float32)
            t = t0 + tl.arange(0, BT)
            rest += tl.sum(u_t * tl.load(pull + t, mask=t < stop, other=0.0)[:, None], 0)
        dk_j += rest[None, :]
    out = dk + head * DK + j.to(tl.int64)[:, None] * (H * DK) + keys[None, :]
    tl.store(out, dk_j.to(dk.dtype.element_ty), mask=(j < stop)[:, None] & (keys < DK)[None, :])


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
    BS: int,
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
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    sums, dg, dbeta, dlam = Sums(None, None, None), None, None, None
    if SWLA:
        sums = Sums(*(own.new_empty((B * H, T)) for _ in range(3)))
    write_kernel[(tiles.shape[0], B * H)](
        q=q, k=k, v=v, u=u, dy=dy, gate=gate, decays=Decays(cum, now, after), dends=dends,
        pulls=Pulls(dmeans, pull, pulls), leads=Leads(dk_lead, dv_lead),
        pieces=Pieces(end, segment, entering, seg_first, seg_last), tiles=tiles, dk=dk, dv=dv, sums=sums, scale=scale,
        T=T, H=H, N=N, P=P, SWLA=SWLA, AGGREGATION=AGGREGATION, HALF=HALF, PRECISION=PRECISION, DK=DK, DV=DV, PK=PK,
        PV=PV, SK=SK, SV=SV, BJ=BJ, BT=BT, BS=BS, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if SWLA:
        dg, dbeta, dlam = (torch.empty_like(g) for _ in range(3))
        strength_kernel[(P, B * H)](
            gate=gate, own=own.sum(0), g=g, lam=lam, cum=cum, now=now, after=after, before=before,
            diagonal=sums.diagonal, tail=sums.tail, ending=sums.ending, dbefore=dbefore, crossing=crossing,
            begin=begin, end=end, segment=segment, entering=entering, seg_first=seg_first, dg=dg, dbeta=dbeta,
            dlam=dlam, T=T, H=H, P=P, AGGREGATION=AGGREGATION, PIECE=PIECE, num_warps=4,
        )  # fmt: skip
    return dk, dv, dg, dbeta, dlam
