"""Gradients of the read of the cached states that ssc chose, grouped by state (Eq. 16-17): as top_k costs, not as N.

A pair is a token t and one of its chosen segments i. Pairs in the order of their segments are rows of products:

    P_t^(i) = dy_t M^(i)T        dgamma_t^(i) = scale <q_t, P_t^(i)>        and of dq_t / scale: gamma_t^(i) P_t^(i)
    dS_i = scale sum_t gamma_t^(i) q_t^T dy_t                               over the pairs of segment i

:mod:`read_backward` adds up the parts of dq.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import find_pairs, load_state

DK = 128
PK = 128
SK = 128
DV = 128
PV = 128
SV = 128
BK = 128
BT = 64
BV = 128
num_stages = 3
num_warps = 4


@triton.jit(do_not_specialize=["top_k", "T", "H", "N", "P", "parts"])
def pair_kernel(
    q,
    dy,
    states,
    order,
    offsets,
    picked,
    lse,
    seg_last,
    partial,
    dgamma,
    scale,
    top_k,
    T,
    H,
    N,
    P,
    parts,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PK: tl.constexpr,
    PV: tl.constexpr,
    SK: tl.constexpr,
    SV: tl.constexpr,
    BT: tl.constexpr,
):
    """One program: at most BT pairs of one segment of a head."""
    bh = tl.program_id(1).to(tl.int64)
    i, p0, stop = find_pairs(offsets, bh, tl.program_id(0), N, parts, ROWS=BT)
    if (i < N) & (p0 < stop):
        pair = p0 + tl.arange(0, BT)
        valid = pair < stop
        place = bh * (T * top_k) + tl.load(order + bh * (T * top_k) + pair, mask=valid, other=0)
        t = (place - bh * (T * top_k)) // top_k
        row = ((bh // H * T + t) * H + bh % H)[:, None]
        keys = tl.arange(0, PK)
        values = tl.arange(0, PV)
        inside = valid[:, None] & (keys < DK)[None, :]
        dy_t = tl.load(dy + row * DV + values[None, :], mask=valid[:, None] & (values < DV)[None, :], other=0.0)
        q_t = tl.load(q + row * DK + keys[None, :], mask=inside, other=0.0).to(tl.float32)
        last = i
        if seg_last is not None:
            last = tl.load(seg_last + i)
        state = load_state(states + (bh * P + last) * (SK * SV), 0, 0, SK, SV, PK, PV)
        read = tl.dot(dy_t, tl.trans(state), input_precision="tf32x3")
        total = tl.load(lse + bh * T + t, mask=valid, other=0.0)
        gamma = tl.exp(tl.load(picked + place, mask=valid, other=0.0) - total)
        tl.store(dgamma + place, tl.sum(q_t * read, 1) * scale, mask=valid)
        out = partial + place[:, None] * DK + keys[None, :]
        tl.store(out, (read * gamma[:, None]).to(partial.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["top_k", "T", "H", "N", "P", "parts"])
def chosen_kernel(
    q,
    dy,
    order,
    offsets,
    picked,
    lse,
    seg_last,
    dends,
    scale,
    top_k,
    T,
    H,
    N,
    P,
    parts,
    DK: tl.constexpr,
    DV: tl.constexpr,
    SK: tl.constexpr,
    SV: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One program: a block of the gradient of a segment's state, from all of its pairs."""
    BLOCKS: tl.constexpr = (SV + BV - 1) // BV
    KEYS: tl.constexpr = (SK + BK - 1) // BK
    value = tl.program_id(0) % BLOCKS * BV
    key = tl.program_id(0) // BLOCKS % KEYS * BK
    i = tl.program_id(0) // (BLOCKS * KEYS)
    bh = tl.program_id(1).to(tl.int64)
    offsets += bh * (N + 1) * parts
    base = tl.load(offsets)
    first = (tl.load(offsets + i * parts) - base).to(tl.int32)
    stop = (tl.load(offsets + (i + 1) * parts) - base).to(tl.int32)
    order += bh * (T * top_k)
    picked += bh * (T * top_k)
    rows = key + tl.arange(0, BK)
    cols = value + tl.arange(0, BV)
    grad = tl.zeros([BK, BV], tl.float32)
    for p0 in range(first, stop, BT):
        pair = p0 + tl.arange(0, BT)
        valid = pair < stop
        place = tl.load(order + pair, mask=valid, other=0)
        t = place // top_k
        row = ((bh // H * T + t) * H + bh % H)[:, None]
        q_t = tl.load(q + row * DK + rows[None, :], mask=valid[:, None] & (rows < DK)[None, :], other=0.0)
        dy_t = tl.load(dy + row * DV + cols[None, :], mask=valid[:, None] & (cols < DV)[None, :], other=0.0)
        total = tl.load(lse + bh * T + t, mask=valid, other=0.0)
        gamma = tl.exp(tl.load(picked + place, mask=valid, other=float("-inf")) - total)
        weighted = (q_t.to(tl.float32) * gamma[:, None]).to(dy_t.dtype)
        grad = tl.dot(tl.trans(weighted), dy_t, grad, input_precision="tf32x3")
    last = i
    if seg_last is not None:
        last = tl.load(seg_last + i)
    out = dends + (bh * P + last) * (SK * SV) + rows[:, None] * SV + cols[None, :]
    tl.store(out, grad * scale, mask=(rows < SK)[:, None] & (cols < SV)[None, :])


def pair_backward(
    q: torch.Tensor,
    dy: torch.Tensor,
    states: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    picked: torch.Tensor,
    lse: torch.Tensor,
    seg_last: torch.Tensor | None,
    N: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """partial ``[B*H, T, top_k, DK]``, of q's dtype, and dgamma ``[B*H, T, top_k]``, float32.

    Args:
        q [B, T, H, DK], dy [B, T, H, DV], states [B*H, P, SK, SV]: of one dtype.
        order, offsets: of :mod:`pair_order`; picked, lse: of :mod:`gates`.
        seg_last: None where every segment is one piece.

    Returns:
        Of every pair, its part of dq without ``scale``, and the gradient of its gate; where it has a segment.
    """
    B, T, H, _ = q.shape
    top_k = picked.shape[-1]
    partial = q.new_empty((B * H, T, top_k, DK))
    dgamma = torch.empty_like(picked)
    # No more tiles than this, however the pairs fall.
    pair_kernel[(triton.cdiv(T * top_k, BT) + N + 1, B * H)](
        q=q, dy=dy, states=states, order=order, offsets=offsets, picked=picked, lse=lse, seg_last=seg_last,
        partial=partial, dgamma=dgamma, scale=scale, top_k=top_k, T=T, H=H, N=N, P=states.shape[1],
        parts=offsets.shape[0] // (B * H * (N + 1)), DK=DK, DV=DV, PK=PK, PV=PV, SK=SK, SV=SV, BT=BT,
        num_warps=num_warps,
    )  # fmt: skip
    return partial, dgamma


def chosen_backward(
    q: torch.Tensor,
    dy: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    picked: torch.Tensor,
    lse: torch.Tensor,
    seg_last: torch.Tensor | None,
    N: int,
    P: int,
    scale: float,
) -> torch.Tensor:
    """dends ``[B*H, P, SK, SV]``, float32: the gradient of every segment's state, at its last piece.

    Args:
        as of :func:`pair_backward`; N, P: segments and pieces of a head.
    """
    B, T, H, _ = q.shape
    # No wider than the state.
    bk, bv = min(BK, PK), min(BV, PV)
    dends = q.new_empty((B * H, P, SK, SV), dtype=torch.float32)
    chosen_kernel[(triton.cdiv(SK, bk) * triton.cdiv(SV, bv) * N, B * H)](
        q=q, dy=dy, order=order, offsets=offsets, picked=picked, lse=lse, seg_last=seg_last, dends=dends, scale=scale,
        top_k=picked.shape[-1], T=T, H=H, N=N, P=P, parts=offsets.shape[0] // (B * H * (N + 1)), DK=DK, DV=DV, SK=SK,
        SV=SV, BT=BT, BK=bk, BV=bv, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return dends
