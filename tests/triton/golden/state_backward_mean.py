"""Gradients of the memory's states: of cached ones (Eq. 6-17) and of the end state of every piece (Eq. 2, 26-27).

    dS_i = scale sum_t gamma_t^(i) q_t^T dy_t                      t in later segments of the sequence
    dA_p = scale sum_{t in p} gamma_t^(s) e^{cum_t} q_t^T dy_t     the state that enters piece p
    dEnd_p = [dS_i, if p is the last of segment i] + dA_next + e^{cum_end(next)} dEnd_next     next: entered by p's end

A program owns what it adds up. Where gates are equal, dS_i is the sum of the products of the segments after i.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import load_rows

DK = 48
PK = 64
SK = 48
DV = 80
PV = 128
SV = 80
BK = 64
BT = 32
BV = 32
num_stages = 1
num_warps = 8


@triton.jit(do_not_specialize=["T", "H", "P"])
def piece_kernel(
    q,
    dy,
    gate,
    cum,
    begin,
    end,
    segment,
    seg_first,
    products,
    scale,
    T,
    H,
    P,
    DK: tl.constexpr,
    DV: tl.constexpr,
    SK: tl.constexpr,
    SV: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One program: a block of the sum of q_t^T dy_t over a piece, with gates and decays where they are given."""
    BLOCKS: tl.constexpr = (SV + BV - 1) // BV
    KEYS: tl.constexpr = (SK + BK - 1) // BK
    value = tl.program_id(0) % BLOCKS * BV
    key = tl.program_id(0) // BLOCKS % KEYS * BK
    piece = tl.program_id(0) // (BLOCKS * KEYS)
    bh = tl.program_id(1).to(tl.int64)
    stop = tl.load(end + piece)
    head = bh // H * T * H + bh % H
    q += head * DK
    dy += head * DV
    product = tl.zeros([BK, BV], tl.float32)
    for t0 in range(tl.load(begin + piece), stop, BT):
        t = t0 + tl.arange(0, BT)
        q_t = load_rows(q, t0, stop, H * DK, key, DK, BT, BK)
        dy_t = load_rows(dy, t0, stop, H * DV, value, DV, BT, BV)
        weight = tl.full([BT], 1.0, tl.float32)
        if gate is not None:
            weight *= tl.load(gate + bh * T + t, mask=t < stop, other=0.0)
        if cum is not None:
            weight *= tl.exp(tl.load(cum + bh * T + t, mask=t < stop, other=0.0))
        q_t = (q_t.to(tl.float32) * weight[:, None]).to(dy_t.dtype)
        product = tl.dot(tl.trans(q_t), dy_t, product, input_precision="ieee")
    s = tl.load(segment + piece)
    product /= s - tl.load(seg_first + s) + 1
    rows = key + tl.arange(0, BK)
    cols = value + tl.arange(0, BV)
    out = products + (bh * P + piece) * (SK * SV) + rows[:, None] * SV + cols[None, :]
    tl.store(out, product * scale, mask=(rows < SK)[:, None] & (cols < SV)[None, :])


@triton.jit(do_not_specialize=["P"])
def carry_kernel(
    segment,
    entering,
    seg_last,
    seq_begin,
    seq_end,
    dentered,
    products,
    dends,
    P,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of the states of a sequence, from its last piece to its first."""
    block = tl.program_id(0)
    sequence = tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    low = tl.load(seq_begin + sequence)
    high = tl.load(seq_end + sequence)
    carried = tl.zeros([BLOCK], tl.float32)
    later = tl.zeros([BLOCK], tl.float32)
    # Only additions wait for the piece after: loads go ahead.
    for n in tl.range(0, high - low, num_stages=4):
        piece = high - 1 - n
        matrix = (bh * P + piece) * SIZE + place
        last = tl.load(seg_last + tl.load(segment + piece)) == piece
        enters = tl.load(entering + piece)
        height = tl.where(enters >= 0, SIZE, 0)
        grad = carried
        grad += tl.where(last, later, 0.0)
        later += tl.load(products + matrix, mask=inside, other=0.0)
        tl.store(dends + matrix, grad.to(dends.dtype.element_ty), mask=inside)
        if dentered is not None:
            entered = tl.load(dentered + matrix, mask=place < height, other=0.0)
            carried = entered + tl.where(enters >= 0, grad, 0.0)


def state_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dy: torch.Tensor,
    ends: torch.Tensor | None,
    gammas: torch.Tensor | None,
    gate: torch.Tensor | None,
    chosen: torch.Tensor | None,
    cum: torch.Tensor | None,
    before: torch.Tensor | None,
    begin: torch.Tensor,
    end: torch.Tensor,
    segment: torch.Tensor,
    entering: torch.Tensor,
    seg_end: torch.Tensor,
    seg_first: torch.Tensor,
    seg_past_end: torch.Tensor,
    seg_last: torch.Tensor,
    seq_begin: torch.Tensor,
    seq_end: torch.Tensor,
    scale: float,
    crosses: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dEnd ``[B*H, P, SK, SV]``, of q's dtype; for swla crossing, dk_lead, dv_lead, dbefore ``[B*H, P, ...]``, float32.

    Args:
        q, k [B, T, H, DK], v, dy [B, T, H, DV]: of one dtype.
        ends [B*H, P, SK, SV]: end states of the pieces, float32; for swla where pieces are entered.
        gammas [B*H, N, T], of cached segments, and gate [B*H, T], of the online one: of :mod:`gates_backward`; None
            where gates are not learned.
        chosen: with FORMULATION "grouped", dEnd as :mod:`grouped_backward` left it, to be carried on if any piece is
            entered.
        cum, before: None for linear.
        crosses: whether any piece is entered.
        OPERAND: where gated rows wait for their product, "registers" (a left operand) or "shared" memory (a right one).

    Returns:
        Of pieces that are entered: what the end state says of the decay of what enters, e^{cum_end} <dEnd, A> and the
        like of the row before the piece; the gradients of that row, dk in two parts; that of the strength ``before``.
    """
    (B, T, H, _), N, P = q.shape, seg_first.shape[0], begin.shape[0]
    bk, bv = min(BK, PK), min(BV, PV)  # no wider than the state
    blocks = triton.cdiv(SK, bk) * triton.cdiv(SV, bv)
    # What is carried on has float32; what is left is an operand of products.
    dends, dstates = q.new_empty((B * H, P, SK, SV)) if chosen is None or crosses else chosen, chosen
    products = dentered = crossing = dk_lead = dv_lead = dbefore = None
    carries, enters = crosses, crosses
    carries = True
    products = torch.empty_like(dends, dtype=torch.float32)
    piece_kernel[(blocks * P, B * H)](
        q=q, dy=dy, gate=None, cum=None, begin=begin, end=end, segment=segment, seg_first=seg_first, products=products,
        scale=scale, T=T, H=H, P=P, DK=DK, DV=DV, SK=SK, SV=SV, BT=BT, BK=bk, BV=bv, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    dentered, enters = products if crosses else None, False  # what enters a piece is read as a cached state is
    if enters:
        dentered = torch.empty_like(dends, dtype=torch.float32)
        piece_kernel[(blocks * P, B * H)](
            q=q, dy=dy, gate=gate, cum=cum, begin=begin, end=end, segment=segment, seg_first=seg_first,
            products=dentered, scale=scale, T=T, H=H, P=P, DK=DK, DV=DV, SK=SK, SV=SV, BT=BT, BK=bk, BV=bv,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if carries:
        grid = (triton.cdiv(SK * SV, 1024), seq_begin.shape[0], B * H)
        carry_kernel[grid](
            segment=segment, entering=entering, seg_last=seg_last, seq_begin=seq_begin, seq_end=seq_end,
            dentered=dentered, products=products, dends=dends, P=P, SIZE=SK * SV, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return dends, crossing, dk_lead, dv_lead, dbefore
