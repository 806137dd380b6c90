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

from .common import load_rows, load_state


@triton.jit(do_not_specialize=["heads", "T", "H", "N", "P"])
def cached_kernel(
    q,
    dy,
    gammas,
    seg_end,
    seg_past_end,
    seg_last,
    dends,
    scale,
    heads,
    T,
    H,
    N,
    P,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    SK: tl.constexpr,
    SV: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """One program: a block of the states' gradients of SEGMENTS segments, which share the rows that they read."""
    BLOCKS: tl.constexpr = (SV + BV - 1) // BV
    KEYS: tl.constexpr = (SK + BK - 1) // BK
    # The longest first, of all heads: few programs are left for the end.
    bh = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    value = block % BLOCKS * BV
    key = block // BLOCKS % KEYS * BK
    i0 = block // (BLOCKS * KEYS) * SEGMENTS
    i = i0 + tl.arange(0, SEGMENTS)
    there = i < N
    left = tl.load(seg_end + i, mask=there, other=0)
    right = tl.load(seg_end + tl.load(seg_past_end + i, mask=there, other=1) - 1, mask=there, other=0)
    head = bh // H * T * H + bh % H
    q += head * DK
    dy += head * DV
    grad = tl.zeros([BV, SEGMENTS * BK] if OPERAND == "shared" else [SEGMENTS * BK, BV], tl.float32)
    high = tl.max(right, 0)
    for t0 in range(tl.load(seg_end + i0), high, BT):
        t = t0 + tl.arange(0, BT)
        here = (t[None, :] >= left[:, None]) & (t[None, :] < right[:, None])
        gamma = tl.load(gammas + (bh * N + i)[:, None] * T + t[None, :], mask=here, other=0.0)
        q_t = load_rows(q, t0, high, H * DK, key, DK, BT, BK)
        dy_t = load_rows(dy, t0, high, H * DV, value, DV, BT, BV)
        weighted = gamma[:, None, :] * tl.trans(q_t)[None, :, :].to(tl.float32)
        weighted = tl.reshape(weighted.to(q_t.dtype), [SEGMENTS * BK, BT])
        if OPERAND == "shared":
            grad = tl.dot(tl.trans(dy_t), tl.trans(weighted), grad, input_precision=PRECISION)
        else:
            grad = tl.dot(weighted, dy_t, grad, input_precision=PRECISION)
    if OPERAND == "shared":
        grad = tl.trans(grad)
    place = tl.arange(0, SEGMENTS * BK)
    which = i0 + place // BK
    rows = key + place % BK
    cols = value + tl.arange(0, BV)
    last = which
    if seg_last is not None:
        last = tl.load(seg_last + which, mask=which < N, other=0)
    out = dends + ((bh * P + last) * (SK * SV) + rows * SV)[:, None] + cols[None, :]
    inside = ((which < N) & (rows < SK))[:, None] & (cols < SV)[None, :]
    tl.store(out, (grad * scale).to(dends.dtype.element_ty), mask=inside)


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
    AGGREGATION: tl.constexpr,
    PRECISION: tl.constexpr,
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
        product = tl.dot(tl.trans(q_t), dy_t, product, input_precision=PRECISION)
    if AGGREGATION == "mean":
        s = tl.load(segment + piece)
        product /= s - tl.load(seg_first + s) + 1
    rows = key + tl.arange(0, BK)
    cols = value + tl.arange(0, BV)
    out = products + (bh * P + piece) * (SK * SV) + rows[:, None] * SV + cols[None, :]
    tl.store(out, product * scale, mask=(rows < SK)[:, None] & (cols < SV)[None, :])


@triton.jit(do_not_specialize=["T", "P"])
def carry_kernel(
    ends,
    cum,
    end,
    segment,
    entering,
    seg_last,
    seq_begin,
    seq_end,
    dentered,
    products,
    dstates,
    dends,
    crossing,
    T,
    P,
    SWLA: tl.constexpr,
    AGGREGATION: tl.constexpr,
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
        if AGGREGATION == "residual" or AGGREGATION == "mean":
            grad += tl.where(last, later, 0.0)
            later += tl.load(products + matrix, mask=inside, other=0.0)
        else:
            grad += tl.load(dstates + matrix, mask=place < tl.where(last, SIZE, 0), other=0.0)
        tl.store(dends + matrix, grad.to(dends.dtype.element_ty), mask=inside)
        if dentered is not None:
            if SWLA:
                decay = tl.exp(tl.load(cum + bh * T + tl.load(end + piece) - 1))
                state = tl.load(ends + (bh * P + enters) * SIZE + place, mask=place < height, other=0.0)
                blocks = tl.num_programs(0)
                tl.store(crossing + (bh * P + piece) * blocks + block, decay * tl.sum(grad * state, 0))
                grad *= decay
            entered = tl.load(dentered + matrix, mask=place < height, other=0.0)
            carried = entered + tl.where(enters >= 0, grad, 0.0)


@triton.jit(do_not_specialize=["T", "H", "P"])
def lead_kernel(
    q,
    k,
    v,
    dy,
    gate,
    cum,
    before,
    dends,
    begin,
    end,
    segment,
    entering,
    seg_first,
    dk_lead,
    dv_lead,
    dbefore,
    crossing,
    scale,
    T,
    H,
    P,
    AGGREGATION: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PK: tl.constexpr,
    PV: tl.constexpr,
    SK: tl.constexpr,
    SV: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
):
    """One program: what a piece that is entered says of the row before it, which its first token writes once more.

    ``crossing``, what its end state says of the decay of what enters it, gets the row's share too.
    """
    piece = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    start = tl.load(begin + piece)
    stop = tl.load(end + piece)
    if tl.load(entering + piece) >= 0:
        head = bh // H * T * H + bh % H
        q += head * DK
        dy += head * DV
        row = head + tl.cast(start - 1, tl.int64) * H
        keys = tl.arange(0, PK)
        values = tl.arange(0, PV)
        k_row = tl.load(k + row * DK + keys, mask=keys < DK, other=0.0).to(tl.float32)
        v_row = tl.load(v + row * DV + values, mask=values < DV, other=0.0).to(tl.float32)
        cum_start = tl.load(cum + bh * T + start)
        gate_t = scale
        if AGGREGATION == "mean":
            s = tl.load(segment + piece)
            gate_t = scale / (s - tl.load(seg_first + s) + 1)
        dk_row = tl.zeros([PK], tl.float32)
        dv_row = tl.zeros([PV], tl.float32)
        strength = 0.0
        for t0 in range(start, stop, BT):
            t = t0 + tl.arange(0, BT)
            q_t = load_rows(q, t0, stop, H * DK, 0, DK, BT, PK).to(tl.float32)
            dy_t = load_rows(dy, t0, stop, H * DV, 0, DV, BT, PV).to(tl.float32)
            decay = tl.exp(tl.load(cum + bh * T + t, mask=t < stop, other=0.0) - cum_start) * gate_t
            if AGGREGATION == "grm" or AGGREGATION == "ssc":
                decay *= tl.load(gate + bh * T + t, mask=t < stop, other=0.0)
            of_key = tl.sum(q_t * k_row[None, :], 1)
            of_value = tl.sum(dy_t * v_row[None, :], 1)
            dk_row += tl.sum(q_t * (decay * of_value)[:, None], 0)
            dv_row += tl.sum(dy_t * (decay * of_key)[:, None], 0)
            strength += tl.sum(decay * of_key * of_value, 0)
        # The row in the piece's end state.
        left = tl.exp(tl.load(cum + bh * T + stop - 1) - cum_start)
        strong = tl.load(before + bh * P + piece)
        ended = 0.0
        for r0 in range(0, SK, BR):
            rows = r0 + tl.arange(0, BR)
            state = load_state(dends + (bh * P + piece) * (SK * SV), r0, 0, SK, SV, BR, PV).to(tl.float32)
            k_part = tl.load(k + row * DK + rows, mask=rows < DK, other=0.0).to(tl.float32)
            dv_row += tl.sum(state * k_part[:, None], 0) * left
            of_value = tl.sum(state * v_row[None, :], 1) * left
            ended += tl.sum(k_part * of_value, 0)
            tl.store(dk_lead + (bh * P + piece) * 2 * SK + rows, strong * of_value, mask=rows < SK)
        tl.store(dk_lead + ((bh * P + piece) * 2 + 1) * SK + keys, strong * dk_row, mask=keys < SK)
        tl.store(dv_lead + (bh * P + piece) * SV + values, strong * dv_row, mask=values < SV)
        tl.store(dbefore + bh * P + piece, strength + ended)
        tl.store(crossing + bh * P + piece, tl.load(crossing + bh * P + piece) + strong * ended)


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
    SWLA: bool,
    AGGREGATION: str,
    FORMULATION: str,
    OPERAND: str,
    PRECISION: str,
    DK: int,
    DV: int,
    PK: int,
    PV: int,
    SK: int,
    SV: int,
    BT: int,
    BK: int,
    BV: int,
    SEGMENTS: int,
    num_warps: int,
    num_stages: int,
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
    if (AGGREGATION == "grm" or AGGREGATION == "ssc") and FORMULATION != "grouped":
        dstates = torch.empty_like(dends, dtype=torch.float32) if crosses else dends
        cached_kernel[(blocks * triton.cdiv(N, SEGMENTS) * B * H,)](
            q=q, dy=dy, gammas=gammas, seg_end=seg_end, seg_past_end=seg_past_end,
            seg_last=None if P == N else seg_last, dends=dstates, scale=scale, heads=B * H, T=T, H=H, N=N, P=P,
            OPERAND=OPERAND, PRECISION=PRECISION, DK=DK, DV=DV, SK=SK, SV=SV, BT=BT, BK=bk, BV=bv, SEGMENTS=SEGMENTS,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if AGGREGATION == "residual" or AGGREGATION == "mean":
        carries = True
        products = torch.empty_like(dends, dtype=torch.float32)
        piece_kernel[(blocks * P, B * H)](
            q=q, dy=dy, gate=None, cum=None, begin=begin, end=end, segment=segment, seg_first=seg_first,
            products=products, scale=scale, T=T, H=H, P=P, AGGREGATION=AGGREGATION, PRECISION=PRECISION, DK=DK, DV=DV,
            SK=SK, SV=SV, BT=BT, BK=bk, BV=bv, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        if not SWLA:
            dentered, enters = products if crosses else None, False  # what enters a piece is read as a cached state is
    if enters:
        dentered = torch.empty_like(dends, dtype=torch.float32)
        piece_kernel[(blocks * P, B * H)](
            q=q, dy=dy, gate=gate, cum=cum, begin=begin, end=end, segment=segment, seg_first=seg_first,
            products=dentered, scale=scale, T=T, H=H, P=P, AGGREGATION=AGGREGATION, PRECISION=PRECISION, DK=DK, DV=DV,
            SK=SK, SV=SV, BT=BT, BK=bk, BV=bv, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if carries:
        grid = (triton.cdiv(SK * SV, 1024), seq_begin.shape[0], B * H)
        if SWLA and crosses:
            crossing = q.new_empty((B * H, P, grid[0]), dtype=torch.float32)
        carry_kernel[grid](
            ends=ends, cum=cum, end=end, segment=segment, entering=entering, seg_last=seg_last, seq_begin=seq_begin,
            seq_end=seq_end, dentered=dentered, products=products, dstates=dstates, dends=dends, crossing=crossing, T=T,
            P=P, SWLA=SWLA, AGGREGATION=AGGREGATION, SIZE=SK * SV, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    if SWLA and crosses:
        crossing = crossing.sum(-1)
        dk_lead, dv_lead = crossing.new_empty((B * H, P, 2, SK)), crossing.new_empty((B * H, P, SV))
        dbefore = torch.empty_like(crossing)
        lead_kernel[(P, B * H)](
            q=q, k=k, v=v, dy=dy, gate=gate, cum=cum, before=before, dends=dends, begin=begin, end=end, segment=segment,
            entering=entering, seg_first=seg_first, dk_lead=dk_lead, dv_lead=dv_lead, dbefore=dbefore,
            crossing=crossing, scale=scale, T=T, H=H, P=P, AGGREGATION=AGGREGATION, DK=DK, DV=DV, PK=PK, PV=PV, SK=SK,
            SV=SV, BT=16, BR=16, num_warps=4,
        )  # fmt: skip
    return dends, crossing, dk_lead, dv_lead, dbefore
