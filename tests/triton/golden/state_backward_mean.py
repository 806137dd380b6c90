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

from .backward_common import Pieces, Segments, StateGradients, Tables
from .common import Decays, Dims, load_rows

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
    q, dy, gate, cum, pieces, segments, products, scale, T, H, P, dims: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
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
        product = tl.dot(tl.trans(q_t), dy_t, product, input_precision="ieee")
    s = tl.load(pieces.segment + piece)
    product /= s - tl.load(segments.first + s) + 1
    rows = key + tl.arange(0, BK)
    cols = value + tl.arange(0, BV)
    out = products + (bh * P + piece) * (dims.SK * dims.SV) + rows[:, None] * dims.SV + cols[None, :]
    tl.store(out, product * scale, mask=(rows < dims.SK)[:, None] & (cols < dims.SV)[None, :])


@triton.jit(do_not_specialize=["P"])
def carry_kernel(
    segment, entering, seg_last, seq_begin, seq_end, dentered, products, dends, P, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
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
        grad += tl.where(last, later, 0.0)
        later += tl.load(products + matrix, mask=inside, other=0.0)
        tl.store(dends + matrix, grad.to(dends.dtype.element_ty), mask=inside)
        if dentered is not None:
            entered = tl.load(dentered + matrix, mask=place < height, other=0.0)
            carried = entered + tl.where(enters >= 0, grad, 0.0)


def state_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dy: torch.Tensor, ends: torch.Tensor | None,
    gammas: torch.Tensor | None, gate: torch.Tensor | None, chosen: torch.Tensor | None, decays: Decays, tables: Tables,
    scale: float,
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
    carries = True
    products = _products(
        q, dy, None, None, tables, scale, dims, BT, bk, bv, num_warps, num_stages
    )
    dentered, enters = products if crosses else None, False  # what enters a piece is read as a cached state is
    if enters:
        dentered = _products(
            q, dy, gate, decays.cum, tables, scale, dims, BT, bk, bv, num_warps, num_stages
        )
    if carries:
        crossing = _carry(ends, decays.cum, tables, dentered, products, dstates, dends, SK * SV)
    made = StateGradients(dends)
    return made


def _products(
    q: torch.Tensor, dy: torch.Tensor, gate: torch.Tensor | None, cum: torch.Tensor | None, tables: Tables,
    scale: float, dims: Dims, BT: int, BK: int, BV: int, num_warps: int, num_stages: int,
) -> torch.Tensor:  # fmt: skip
    """``[B*H, P, SK, SV]``, float32: the sum of q_t^T dy_t over every piece, with gates and decays where given."""
    B, T, H, _ = q.shape
    P = tables.begin.shape[0]
    products = q.new_empty((B * H, P, dims.SK, dims.SV), dtype=torch.float32)
    piece_kernel[(triton.cdiv(dims.SK, BK) * triton.cdiv(dims.SV, BV) * P, B * H)](
        q=q, dy=dy, gate=gate, cum=cum, pieces=Pieces(tables.begin, tables.end, tables.segment),
        segments=Segments(first=tables.seg_first), products=products, scale=scale, T=T, H=H, P=P, dims=dims, BT=BT,
        BK=BK, BV=BV, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return products


def _carry(
    ends: torch.Tensor | None, cum: torch.Tensor | None, tables: Tables, dentered: torch.Tensor | None,
    products: torch.Tensor | None, dstates: torch.Tensor | None, dends: torch.Tensor, SIZE: int,
) -> torch.Tensor | None:  # fmt: skip
    """Fills ``dends``, from the last piece to the first; for swla ``crossing``, without the row before the pieces."""
    (heads, P), T = dends.shape[:2], 0 if cum is None else cum.shape[1]
    grid = (triton.cdiv(SIZE, 1024), tables.seq_begin.shape[0], heads)
    crossing = None
    carry_kernel[grid](
        segment=tables.segment, entering=tables.entering, seg_last=tables.seg_last, seq_begin=tables.seq_begin,
        seq_end=tables.seq_end, dentered=dentered, products=products, dends=dends, P=P, SIZE=SIZE, BLOCK=1024,
        num_warps=4,
    )  # fmt: skip
    return None if crossing is None else crossing.sum(-1)
