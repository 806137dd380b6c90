"""Gradients of the gates to logits, connectors and mean keys (Eq. 8-10, 16-17).

    dr_t^(i) = gamma_t^(i) (dgamma_t^(i) - sum_j gamma_t^(j) dgamma_t^(j))        the logits' gradient
    du_t = sum_{i < s} dr_t^(i) p_i + dr_t^(s) pbar_t          pbar_t: the mean of the segment's keys up to t
    dp_i = sum_t dr_t^(i) u_t                                  over the later tokens of the sequence

Under ssc with FORMULATION "grouped" a token has only the gates of the segments that it chose, by pairs.

Mean keys have much in common while the dr of a token sum to zero, so that their products are of float32 accuracy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import load_rows


@triton.jit(do_not_specialize=["top_k", "T", "H", "N", "P"])
def connector_kernel(
    k,
    means,
    sums,
    logits,
    gammas,
    lse,
    own_logit,
    chosen,
    picked,
    dgamma,
    chosen_dr,
    own,
    deltas,
    begin,
    end,
    segment,
    seg_first,
    seg_begin,
    seg_piece,
    tiles,
    du,
    gate,
    pull,
    top_k,
    T,
    H,
    N,
    P,
    PARTS,
    FORMULATION: tl.constexpr,
    PRECISION: tl.constexpr,
    DK: tl.constexpr,
    PK: tl.constexpr,
    SK: tl.constexpr,
    BT: tl.constexpr,
    BI: tl.constexpr,
):
    """One program: BT tokens of a head. The first part of ``dgamma`` becomes dr, or the pairs' go to ``chosen_dr``.

    The gates of cached segments go to ``gammas``, which may be where their logits are.
    """
    tile = tiles + tl.program_id(0) * 2
    bh = tl.program_id(1).to(tl.int64)
    piece = tl.load(tile)
    t0 = tl.load(tile + 1)
    start = tl.load(begin + piece)
    stop = tl.minimum(t0 + BT, tl.load(end + piece))
    s = tl.load(segment + piece)
    first = tl.load(seg_first + s)
    part = tl.num_programs(1).to(tl.int64) * T
    head = bh // H * T * H + bh % H
    k += head * DK

    t = t0 + tl.arange(0, BT)
    valid = t < stop
    total = tl.load(lse + bh * T + t, mask=valid, other=0.0)
    if FORMULATION == "grouped":
        logit_s = tl.load(own_logit + bh * T + t, mask=valid, other=float("-inf"))
    else:
        logit_s = tl.load(logits + (bh * N + s) * T + t, mask=valid, other=float("-inf"))
    gamma_s = tl.exp(logit_s - total)
    dgamma_s = tl.zeros([BT], tl.float32)
    for p in range(PARTS):
        dgamma_s += tl.load(own + p * part + bh * T + t, mask=valid, other=0.0)
    grad = tl.zeros([BT, PK], tl.float32)
    cols = tl.arange(0, PK)
    if FORMULATION == "grouped":
        delta = gamma_s * dgamma_s
        for r in range(0, top_k):
            place = (bh * T + t) * top_k + r
            gamma = tl.exp(tl.load(picked + place, mask=valid, other=float("-inf")) - total)
            # Without a segment nothing was written.
            delta += gamma * tl.load(dgamma + place, mask=valid & (gamma > 0.0), other=0.0)
        for r in range(0, top_k):
            place = (bh * T + t) * top_k + r
            gamma = tl.exp(tl.load(picked + place, mask=valid, other=float("-inf")) - total)
            dr = gamma * (tl.load(dgamma + place, mask=valid & (gamma > 0.0), other=0.0) - delta)
            tl.store(chosen_dr + place, dr, mask=valid)
            i = tl.load(chosen + place, mask=valid, other=0)
            inside = (valid & (i < N))[:, None] & (cols < SK)[None, :]
            grad += dr[:, None] * tl.load(means + (bh * N + i)[:, None] * SK + cols[None, :], mask=inside, other=0.0)
    else:
        delta = tl.zeros([BT], tl.float32)
        for p in range(PARTS):
            delta += tl.load(deltas + p * part + bh * T + t, mask=valid, other=0.0)
        for i0 in range(first, s, BI):
            i = i0 + tl.arange(0, BI)
            here = (i < s)[:, None] & valid[None, :]
            place = (bh * N + i)[:, None] * T + t[None, :]
            gamma = tl.exp(tl.load(logits + place, mask=here, other=float("-inf")) - total[None, :])
            dr = tl.zeros([BI, BT], tl.float32) - delta[None, :]
            for p in range(PARTS):
                dr += tl.load(dgamma + p * part * N + place, mask=here, other=0.0)
            dr *= gamma
            tl.store(dgamma + place, dr, mask=here)
            tl.store(gammas + place, gamma, mask=here)
            mean = load_rows(means + bh * N * SK, i0, s, SK, 0, SK, BI, PK)
            grad = tl.dot(tl.trans(dr), mean, grad, input_precision=PRECISION)

    dr_s = gamma_s * (dgamma_s - delta) / (t - tl.load(seg_begin + s) + 1).to(tl.float32)
    tl.store(gate + bh * T + t, gamma_s, mask=valid)
    tl.store(pull + bh * T + t, dr_s, mask=valid)
    earlier = tl.zeros([PK], tl.float32)
    if sums is not None:
        for p in range(tl.load(seg_piece + s), piece):
            earlier += tl.load(sums + (bh * P + p) * SK + cols, mask=cols < SK, other=0.0)
    for j0 in range(start, t0, BT):
        earlier += tl.sum(load_rows(k, j0, t0, H * DK, 0, DK, BT, PK).to(tl.float32), 0)
    k_t = load_rows(k, t0, stop, H * DK, 0, DK, BT, PK)
    until = tl.where(t[:, None] >= t[None, :], 1.0, 0.0).to(k_t.dtype)
    # Exact in 16 bits: ones times keys.
    running = tl.dot(until, k_t, input_precision=PRECISION) + earlier[None, :]
    grad += dr_s[:, None] * running
    out = du + head * DK + t.to(tl.int64)[:, None] * (H * DK) + cols[None, :]
    tl.store(out, grad.to(du.dtype.element_ty), mask=valid[:, None] & (cols < DK)[None, :])


@triton.jit(do_not_specialize=["T", "H", "N"])
def descriptor_kernel(
    u,
    dr,
    seg_begin,
    seg_end,
    seg_past_end,
    dmeans,
    T,
    H,
    N,
    PRECISION: tl.constexpr,
    DK: tl.constexpr,
    PK: tl.constexpr,
    SK: tl.constexpr,
    BT: tl.constexpr,
    BI: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program: BI segments of a head and one of SPLITS parts of the tokens after them."""
    split = tl.program_id(0) % SPLITS
    i0 = tl.program_id(0) // SPLITS * BI
    bh = tl.program_id(1).to(tl.int64)
    i = i0 + tl.arange(0, BI)
    there = i < N
    # Gates that read segment i are those of the tokens from its end to the end of its sequence.
    left = tl.load(seg_end + i, mask=there, other=0)
    right = tl.load(seg_end + tl.load(seg_past_end + i, mask=there, other=1) - 1, mask=there, other=0)
    low = tl.load(seg_end + i0)
    span = tl.cdiv(tl.cdiv(tl.max(right, 0) - low, SPLITS), BT) * BT
    low += split * span
    high = tl.minimum(low + span, tl.max(right, 0))
    head = bh // H * T * H + bh % H
    u += head * DK
    grad = tl.zeros([BI, PK], tl.float32)
    for t0 in range(low, high, BT):
        t = t0 + tl.arange(0, BT)
        here = (t[None, :] >= left[:, None]) & (t[None, :] < right[:, None])
        dr_t = tl.load(dr + (bh * N + i)[:, None] * T + t[None, :], mask=here, other=0.0)
        u_t = load_rows(u, t0, high, H * DK, 0, DK, BT, PK).to(tl.float32)
        grad = tl.dot(dr_t, u_t, grad, input_precision=PRECISION)
    grad /= (left - tl.load(seg_begin + i, mask=there, other=-1))[:, None].to(tl.float32)
    cols = tl.arange(0, PK)
    out = dmeans + ((split * tl.num_programs(1) + bh) * N + i)[:, None] * SK + cols[None, :]
    tl.store(out, grad, mask=there[:, None] & (cols < SK)[None, :])


@triton.jit(do_not_specialize=["top_k", "T", "H", "N"])
def chosen_descriptor_kernel(
    u,
    chosen_dr,
    order,
    starts,
    seg_begin,
    seg_end,
    dmeans,
    top_k,
    T,
    H,
    N,
    DK: tl.constexpr,
    PK: tl.constexpr,
    SK: tl.constexpr,
    BT: tl.constexpr,
):
    """One program: a segment of a head, and the pairs that chose it."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    starts += bh * (N + 2) + i
    first = tl.load(starts)
    stop = tl.load(starts + 1)
    order += bh * (T * top_k)
    chosen_dr += bh * (T * top_k)
    cols = tl.arange(0, PK)
    total = tl.zeros([BT, PK], tl.float32)
    for p0 in range(first, stop, BT):
        pair = p0 + tl.arange(0, BT)
        place = tl.load(order + pair, mask=pair < stop, other=0)
        row = ((bh // H * T + place // top_k) * H + bh % H)[:, None]
        inside = (pair < stop)[:, None] & (cols < DK)[None, :]
        u_t = tl.load(u + row * DK + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        total += u_t * tl.load(chosen_dr + place, mask=pair < stop, other=0.0)[:, None]
    grad = tl.sum(total, 0) / (tl.load(seg_end + i) - tl.load(seg_begin + i)).to(tl.float32)
    tl.store(dmeans + (bh * N + i) * SK + cols, grad, mask=cols < SK)


@triton.jit(do_not_specialize=["T", "H", "P"])
def pulls_kernel(
    u,
    pull,
    begin,
    end,
    pulls,
    T,
    H,
    P,
    DK: tl.constexpr,
    PK: tl.constexpr,
    SK: tl.constexpr,
    BT: tl.constexpr,
):
    """One program: how the tokens of a piece pull at the keys of earlier pieces of their segment."""
    piece = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    stop = tl.load(end + piece)
    u += (bh // H * T * H + bh % H) * DK
    total = tl.zeros([PK], tl.float32)
    for t0 in range(tl.load(begin + piece), stop, BT):
        t = t0 + tl.arange(0, BT)
        u_t = load_rows(u, t0, stop, H * DK, 0, DK, BT, PK).to(tl.float32)
        total += tl.sum(u_t * tl.load(pull + bh * T + t, mask=t < stop, other=0.0)[:, None], 0)
    cols = tl.arange(0, PK)
    tl.store(pulls + (bh * P + piece) * SK + cols, total, mask=cols < SK)


def gates_backward(
    k: torch.Tensor,
    u: torch.Tensor,
    means: torch.Tensor,
    sums: torch.Tensor | None,
    logits: torch.Tensor | None,
    gammas: torch.Tensor | None,
    lse: torch.Tensor,
    own_logit: torch.Tensor | None,
    chosen: torch.Tensor | None,
    picked: torch.Tensor | None,
    order: torch.Tensor | None,
    starts: torch.Tensor | None,
    dgamma: torch.Tensor,
    own: torch.Tensor,
    delta: torch.Tensor | None,
    begin: torch.Tensor,
    end: torch.Tensor,
    segment: torch.Tensor,
    seg_begin: torch.Tensor,
    seg_end: torch.Tensor,
    seg_first: torch.Tensor,
    seg_past_end: torch.Tensor,
    seg_piece: torch.Tensor,
    tiles: torch.Tensor,
    FORMULATION: str,
    PRECISION: str,
    DK: int,
    PK: int,
    SK: int,
    BT: int,
    BI: int,
    SPLITS: int,
    num_warps: int,
    num_stages: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """du ``[B, T, H, DK]``, dmeans ``[B*H, N, SK]``, gate and pull ``[B*H, T]``, pulls ``[B*H, P, SK]``.

    Args:
        k, u [B, T, H, DK]: of one dtype.
        means, sums: of :mod:`segment_states`; logits, lse, own_logit, chosen, picked: of :mod:`gates`.
        gammas: where the gates of cached segments go, as :mod:`state_backward` takes them; like logits, or logits
            itself.
        dgamma [blocks, B*H, N, T], own, delta [blocks, B*H, T]: of :mod:`read_backward`. dgamma is overwritten.
        With FORMULATION "grouped" dgamma is ``[B*H, T, top_k]``, of :mod:`grouped_backward`, logits, gammas and delta
        are None, and there are order and starts, of :mod:`pair_order`.
        tiles: of BT tokens.

    Returns:
        du in u's dtype. Float32: the gradient of each key of a segment through its mean; the online segment's gate; how
        each token pulls at the keys of its segment up to it, dr_t^(s) / (how many they are); the sum of these pulls
        times u over each piece, None where every segment is one piece.
    """
    B, T, H, _ = u.shape
    N, P = seg_first.shape[0], begin.shape[0]
    du = torch.empty_like(u)
    gate, pull = torch.empty_like(lse), torch.empty_like(lse)
    top_k = 0
    chosen_dr = None
    if FORMULATION == "grouped":
        top_k = dgamma.shape[-1]
        chosen_dr = torch.empty_like(dgamma)
    connector_kernel[(tiles.shape[0], B * H)](
        k=k, means=means, sums=sums, logits=logits, gammas=gammas, lse=lse, own_logit=own_logit, chosen=chosen,
        picked=picked, dgamma=dgamma, chosen_dr=chosen_dr, own=own, deltas=delta, begin=begin, end=end,
        segment=segment, seg_first=seg_first, seg_begin=seg_begin, seg_piece=seg_piece, tiles=tiles, du=du, gate=gate,
        pull=pull, top_k=top_k, T=T, H=H, N=N, P=P, PARTS=own.shape[0], FORMULATION=FORMULATION, PRECISION=PRECISION,
        DK=DK, PK=PK, SK=SK, BT=BT, BI=BI, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if FORMULATION == "grouped":
        dmeans = torch.empty_like(means)
        chosen_descriptor_kernel[(N, B * H)](
            u=u, chosen_dr=chosen_dr, order=order, starts=starts, seg_begin=seg_begin, seg_end=seg_end, dmeans=dmeans,
            top_k=top_k, T=T, H=H, N=N, DK=DK, PK=PK, SK=SK, BT=BT, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    else:
        parts = means.new_empty((SPLITS, B * H, N, SK))
        descriptor_kernel[(SPLITS * triton.cdiv(N, BI), B * H)](
            u=u, dr=dgamma, seg_begin=seg_begin, seg_end=seg_end, seg_past_end=seg_past_end, dmeans=parts, T=T, H=H,
            N=N, PRECISION=PRECISION, DK=DK, PK=PK, SK=SK, BT=BT, BI=BI, SPLITS=SPLITS, num_warps=num_warps,
            num_stages=num_stages,
        )  # fmt: skip
        dmeans = parts.sum(0)
    pulls = None
    if P > N:
        pulls = means.new_empty((B * H, P, SK))
        pulls_kernel[(P, B * H)](
            u=u, pull=pull, begin=begin, end=end, pulls=pulls, T=T, H=H, P=P, DK=DK, PK=PK, SK=SK, BT=BT,
            num_warps=num_warps,
        )  # fmt: skip
    return du, dmeans, gate, pull, pulls
