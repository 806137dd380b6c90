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

from .backward_common import Pieces, Rows, Segments, StateGradients, Tables, last_pieces
from .common import Decays, Dims, load_rows, load_state


@triton.jit(do_not_specialize=["heads", "T", "H", "N", "P"])
def cached_kernel(
    q, dy, gammas, segments, dends, scale, heads, T, H, N, P,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """One program: a block of the states' gradients of SEGMENTS segments, which share the rows that they read."""
    BLOCKS: tl.constexpr = (dims.SV + BV - 1) // BV
    KEYS: tl.constexpr = (dims.SK + BK - 1) // BK
    # The longest first, of all heads: few programs are left for the end.
    bh = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    value = block % BLOCKS * BV
    key = block // BLOCKS % KEYS * BK
    i0 = block // (BLOCKS * KEYS) * SEGMENTS
    i = i0 + tl.arange(0, SEGMENTS)
    there = i < N
    left = tl.load(segments.end + i, mask=there, other=0)
    right = tl.load(segments.end + tl.load(segments.past_end + i, mask=there, other=1) - 1, mask=there, other=0)
    head = bh // H * T * H + bh % H
    q += head * dims.DK
    dy += head * dims.DV
    grad = tl.zeros([BV, SEGMENTS * BK] if OPERAND == "shared" else [SEGMENTS * BK, BV], tl.float32)
    high = tl.max(right, 0)
    for t0 in range(tl.load(segments.end + i0), high, BT):
        t = t0 + tl.arange(0, BT)
        here = (t[None, :] >= left[:, None]) & (t[None, :] < right[:, None])
        gamma = tl.load(gammas + (bh * N + i)[:, None] * T + t[None, :], mask=here, other=0.0)
        q_t = load_rows(q, t0, high, H * dims.DK, key, dims.DK, BT, BK)
        dy_t = load_rows(dy, t0, high, H * dims.DV, value, dims.DV, BT, BV)
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
    if segments.last is not None:
        last = tl.load(segments.last + which, mask=which < N, other=0)
    out = dends + ((bh * P + last) * (dims.SK * dims.SV) + rows * dims.SV)[:, None] + cols[None, :]
    inside = ((which < N) & (rows < dims.SK))[:, None] & (cols < dims.SV)[None, :]
    tl.store(out, (grad * scale).to(dends.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "H", "P"])
def piece_kernel(
    q, dy, gate, cum, pieces, segments, products, scale, T, H, P,
    AVERAGES: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program: a block of the sum of q_t^T dy_t over a piece, with gates and decays where they are given."""
    BLOCKS: tl.constexpr = (dims.SV + BV - 1) // BV
    KEYS: tl.constexpr = (dims.SK + BK - 1) // BK
    value = tl.program_id(0) % BLOCKS * BV
    key = tl.program_id(0) // BLOCKS % KEYS * BK
    piece = tl.program_id(0) // (BLOCKS * KEYS)
    bh = tl.program_id(1).to(tl.int64)
    stop = tl.load(pieces.end + piece)
    head = bh // H * T * H + bh % H
    q += head * dims.DK
    dy += head * dims.DV
    product = tl.zeros([BK, BV], tl.float32)
    for t0 in range(tl.load(pieces.begin + piece), stop, BT):
        t = t0 + tl.arange(0, BT)
        q_t = load_rows(q, t0, stop, H * dims.DK, key, dims.DK, BT, BK)
        dy_t = load_rows(dy, t0, stop, H * dims.DV, value, dims.DV, BT, BV)
        weight = tl.full([BT], 1.0, tl.float32)
        if gate is not None:
            weight *= tl.load(gate + bh * T + t, mask=t < stop, other=0.0)
        if cum is not None:
            weight *= tl.exp(tl.load(cum + bh * T + t, mask=t < stop, other=0.0))
        q_t = (q_t.to(tl.float32) * weight[:, None]).to(dy_t.dtype)
        product = tl.dot(tl.trans(q_t), dy_t, product, input_precision=PRECISION)
    if AVERAGES:
        s = tl.load(pieces.segment + piece)
        product /= s - tl.load(segments.first + s) + 1
    rows = key + tl.arange(0, BK)
    cols = value + tl.arange(0, BV)
    out = products + (bh * P + piece) * (dims.SK * dims.SV) + rows[:, None] * dims.SV + cols[None, :]
    tl.store(out, product * scale, mask=(rows < dims.SK)[:, None] & (cols < dims.SV)[None, :])


@triton.jit(do_not_specialize=["T", "P"])
def carry_kernel(
    ends, cum, end, segment, entering, seg_last, seq_begin, seq_end, dentered, products, dstates, dends, crossing, T, P,
    SWLA: tl.constexpr, ROUTED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
        if not ROUTED:
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


@triton.jit
def lead_of_tokens(
    k_row, v_row, q, dy, gate, cum, cum_start, gate_t, start, stop, bh, T, H,
    ROUTED: tl.constexpr, dims: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """What the piece's tokens say of the row before it at strength 1: of its key, its value, and the strength."""
    PK: tl.constexpr = dims.PK
    PV: tl.constexpr = dims.PV
    dk_row = tl.zeros([PK], tl.float32)
    dv_row = tl.zeros([PV], tl.float32)
    strength = 0.0
    for t0 in range(start, stop, BT):
        t = t0 + tl.arange(0, BT)
        q_t = load_rows(q, t0, stop, H * dims.DK, 0, dims.DK, BT, PK).to(tl.float32)
        dy_t = load_rows(dy, t0, stop, H * dims.DV, 0, dims.DV, BT, PV).to(tl.float32)
        decay = tl.exp(tl.load(cum + bh * T + t, mask=t < stop, other=0.0) - cum_start) * gate_t
        if ROUTED:
            decay *= tl.load(gate + bh * T + t, mask=t < stop, other=0.0)
        of_key = tl.sum(q_t * k_row[None, :], 1)
        of_value = tl.sum(dy_t * v_row[None, :], 1)
        dk_row += tl.sum(q_t * (decay * of_value)[:, None], 0)
        dv_row += tl.sum(dy_t * (decay * of_key)[:, None], 0)
        strength += tl.sum(decay * of_key * of_value, 0)
    return dk_row, dv_row, strength


@triton.jit
def lead_of_end(k_row, v_row, dv_row, dend, dk_lead, left, strong, dims: tl.constexpr, BR: tl.constexpr):
    """What the gradient of the piece's end state says of the row: dv_row with it, and of the strength; dk is written.

    ``k_row``: where the row's key begins; the row weighs ``left`` times ``strong`` in the end state.
    """
    ended = 0.0
    for r0 in range(0, dims.SK, BR):
        rows = r0 + tl.arange(0, BR)
        state = load_state(dend, r0, 0, dims.SK, dims.SV, BR, dims.PV).to(tl.float32)
        k_part = tl.load(k_row + rows, mask=rows < dims.DK, other=0.0).to(tl.float32)
        dv_row += tl.sum(state * k_part[:, None], 0) * left
        of_value = tl.sum(state * v_row[None, :], 1) * left
        ended += tl.sum(k_part * of_value, 0)
        tl.store(dk_lead + rows, strong * of_value, mask=rows < dims.SK)
    return dv_row, ended


@triton.jit(do_not_specialize=["T", "H", "P"])
def lead_kernel(
    rows, gate, decays, pieces, segments, made, scale, T, H, P,
    ROUTED: tl.constexpr, AVERAGES: tl.constexpr, dims: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One program: what a piece that is entered says of the row before it, which its first token writes once more.

    ``crossing``, what its end state says of the decay of what enters it, gets the row's share too.
    """
    piece = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    start = tl.load(pieces.begin + piece)
    stop = tl.load(pieces.end + piece)
    if tl.load(pieces.entering + piece) >= 0:
        head = bh // H * T * H + bh % H
        row = head + tl.cast(start - 1, tl.int64) * H
        keys = tl.arange(0, dims.PK)
        values = tl.arange(0, dims.PV)
        k_row = tl.load(rows.k + row * dims.DK + keys, mask=keys < dims.DK, other=0.0).to(tl.float32)
        v_row = tl.load(rows.v + row * dims.DV + values, mask=values < dims.DV, other=0.0).to(tl.float32)
        cum_start = tl.load(decays.cum + bh * T + start)
        gate_t = scale
        if AVERAGES:
            s = tl.load(pieces.segment + piece)
            gate_t = scale / (s - tl.load(segments.first + s) + 1)
        dk_row, dv_row, strength = lead_of_tokens(
            k_row, v_row, rows.q + head * dims.DK, rows.dy + head * dims.DV, gate, decays.cum, cum_start, gate_t,
            start, stop, bh, T, H, ROUTED, dims, BT,
        )  # fmt: skip
        left = tl.exp(tl.load(decays.cum + bh * T + stop - 1) - cum_start)
        strong = tl.load(decays.before + bh * P + piece)
        place = bh * P + piece
        dv_row, ended = lead_of_end(
            rows.k + row * dims.DK, v_row, dv_row, made.dends + place * (dims.SK * dims.SV),
            made.dk_lead + place * 2 * dims.SK, left, strong, dims, BR,
        )  # fmt: skip
        tl.store(made.dk_lead + (place * 2 + 1) * dims.SK + keys, strong * dk_row, mask=keys < dims.SK)
        tl.store(made.dv_lead + place * dims.SV + values, strong * dv_row, mask=values < dims.SV)
        tl.store(made.dbefore + place, strength + ended)
        tl.store(made.crossing + place, tl.load(made.crossing + place) + strong * ended)


def state_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dy: torch.Tensor,
    ends: torch.Tensor | None,
    gammas: torch.Tensor | None,
    gate: torch.Tensor | None,
    chosen: torch.Tensor | None,
    decays: Decays,
    tables: Tables,
    scale: float,
    SWLA: bool, ROUTED: bool, AVERAGES: bool, FORMULATION: str, OPERAND: str, PRECISION: str,
    DK: int, DV: int, PK: int, PV: int, SK: int, SV: int, BT: int, BK: int, BV: int, SEGMENTS: int,
    num_warps: int, num_stages: int,
) -> StateGradients:  # fmt: skip
    """dEnd ``[B*H, P, SK, SV]``; for swla, of pieces that are entered, what it says of what enters.

    Args:
        q, k [B, T, H, DK], v, dy [B, T, H, DV]: of one dtype.
        ends [B*H, P, SK, SV]: end states of the pieces, float32; for swla where pieces are entered.
        gammas [B*H, N, T], of cached segments, and gate [B*H, T], of the online one: of :mod:`gates_backward`; None
            where gates are not learned.
        chosen: with FORMULATION "grouped", dEnd as :mod:`grouped_backward` left it, to be carried on if any piece is
            entered.
        OPERAND: where gated rows wait for their product, "registers" (a left operand) or "shared" memory (a right one).
    """
    B, T, H, _ = q.shape
    N, P, crosses = tables.seg_first.shape[0], tables.begin.shape[0], tables.crosses
    bk, bv, dims = min(BK, PK), min(BV, PV), Dims(DK, DV, PK, PV, SK, SV)  # blocks are no wider than the state
    # What is carried on has float32; what is left is an operand of products.
    dends, dstates = q.new_empty((B * H, P, SK, SV)) if chosen is None or crosses else chosen, chosen
    products = dentered = crossing = None
    carries, enters = crosses, crosses
    if ROUTED and FORMULATION != "grouped":
        dstates = torch.empty_like(dends, dtype=torch.float32) if crosses else dends
        blocks = triton.cdiv(SK, bk) * triton.cdiv(SV, bv) * triton.cdiv(N, SEGMENTS)
        cached_kernel[(blocks * B * H,)](
            q=q, dy=dy, gammas=gammas,
            segments=Segments(end=tables.seg_end, past_end=tables.seg_past_end, last=last_pieces(tables)),
            dends=dstates, scale=scale, heads=B * H, T=T, H=H, N=N, P=P, OPERAND=OPERAND, PRECISION=PRECISION,
            dims=dims, BT=BT, BK=bk, BV=bv, SEGMENTS=SEGMENTS, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if not ROUTED:
        carries = True
        products = _products(
            q, dy, None, None, tables, scale, AVERAGES, PRECISION, dims, BT, bk, bv, num_warps, num_stages
        )
        if not SWLA:
            dentered, enters = products if crosses else None, False  # what enters a piece is read as a cached state is
    if enters:
        dentered = _products(
            q, dy, gate, decays.cum, tables, scale, AVERAGES, PRECISION, dims, BT, bk, bv, num_warps, num_stages
        )
    if carries:
        crossing = _carry(ends, decays.cum, tables, dentered, products, dstates, dends, SWLA, ROUTED, SK * SV)
    made = StateGradients(dends)
    if SWLA and crosses:
        made = _leads(Rows(q=q, k=k, v=v, dy=dy), gate, decays, tables, dends, crossing, scale, ROUTED, AVERAGES, dims)
    return made


def _products(
    q: torch.Tensor, dy: torch.Tensor, gate: torch.Tensor | None, cum: torch.Tensor | None, tables: Tables,
    scale: float, AVERAGES: bool, PRECISION: str, dims: Dims, BT: int, BK: int, BV: int, num_warps: int,
    num_stages: int,
) -> torch.Tensor:  # fmt: skip
    """``[B*H, P, SK, SV]``, float32: the sum of q_t^T dy_t over every piece, with gates and decays where given."""
    B, T, H, _ = q.shape
    P = tables.begin.shape[0]
    products = q.new_empty((B * H, P, dims.SK, dims.SV), dtype=torch.float32)
    piece_kernel[(triton.cdiv(dims.SK, BK) * triton.cdiv(dims.SV, BV) * P, B * H)](
        q=q, dy=dy, gate=gate, cum=cum, pieces=Pieces(tables.begin, tables.end, tables.segment),
        segments=Segments(first=tables.seg_first), products=products, scale=scale, T=T, H=H, P=P, AVERAGES=AVERAGES,
        PRECISION=PRECISION, dims=dims, BT=BT, BK=BK, BV=BV, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return products


def _carry(
    ends: torch.Tensor | None, cum: torch.Tensor | None, tables: Tables, dentered: torch.Tensor | None,
    products: torch.Tensor | None, dstates: torch.Tensor | None, dends: torch.Tensor, SWLA: bool, ROUTED: bool,
    SIZE: int,
) -> torch.Tensor | None:  # fmt: skip
    """Fills ``dends``, from the last piece to the first; for swla ``crossing``, without the row before the pieces."""
    (heads, P), T = dends.shape[:2], 0 if cum is None else cum.shape[1]
    grid = (triton.cdiv(SIZE, 1024), tables.seq_begin.shape[0], heads)
    crossing = None
    if SWLA and tables.crosses:
        crossing = dends.new_empty((heads, P, grid[0]), dtype=torch.float32)
    carry_kernel[grid](
        ends=ends, cum=cum, end=tables.end, segment=tables.segment, entering=tables.entering, seg_last=tables.seg_last,
        seq_begin=tables.seq_begin, seq_end=tables.seq_end, dentered=dentered, products=products, dstates=dstates,
        dends=dends, crossing=crossing, T=T, P=P, SWLA=SWLA, ROUTED=ROUTED, SIZE=SIZE, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return None if crossing is None else crossing.sum(-1)


def _leads(
    rows: Rows, gate: torch.Tensor | None, decays: Decays, tables: Tables, dends: torch.Tensor, crossing: torch.Tensor,
    scale: float, ROUTED: bool, AVERAGES: bool, dims: Dims,
) -> StateGradients:  # fmt: skip
    """What pieces that are entered say of the row before them, beside ``dends`` and ``crossing``."""
    (_, T, H, _), (heads, P) = rows.q.shape, crossing.shape
    dk_lead, dv_lead = crossing.new_empty((heads, P, 2, dims.SK)), crossing.new_empty((heads, P, dims.SV))
    made = StateGradients(dends, crossing, dk_lead, dv_lead, torch.empty_like(crossing))
    lead_kernel[(P, heads)](
        rows=rows, gate=gate, decays=decays._replace(now=None, after=None),
        pieces=Pieces(tables.begin, tables.end, tables.segment, tables.entering),
        segments=Segments(first=tables.seg_first), made=made, scale=scale, T=T, H=H, P=P, ROUTED=ROUTED,
        AVERAGES=AVERAGES, dims=dims, BT=16, BR=16, num_warps=4,
    )  # fmt: skip
    return made
