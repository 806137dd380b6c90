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

DK = 48
PK = 64
SK = 48
DV = 80
PV = 128
SV = 80
BJ = 64
BT = 128
BV = 128
num_stages = 3
num_warps = 8


@triton.jit(do_not_specialize=["together", "T", "H", "N", "P"])
def read_forward_kernel(
    q,
    k,
    v,
    states,
    past,
    begin,
    end,
    segment,
    entering,
    seg_first,
    tiles,
    y,
    scale,
    together,
    T,
    H,
    N,
    P,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PK: tl.constexpr,
    SK: tl.constexpr,
    SV: tl.constexpr,
    BT: tl.constexpr,
    BJ: tl.constexpr,
    BV: tl.constexpr,
):
    """One program: BT tokens, BV value columns, one head."""
    BLOCKS: tl.constexpr = (DV + BV - 1) // BV
    block, bh = block_and_head(together)
    column = block % BLOCKS * BV
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
    t = t0 + tl.arange(0, BT)
    valid = t < stop
    q_t = load_rows(q, t0, stop, H * DK, 0, DK, BT, PK)

    # The online memory: first what the piece has written, up to t.
    acc = tl.zeros([BT, BV], tl.float32)
    for j0 in range(start, stop, BJ):
        j = j0 + tl.arange(0, BJ)
        k_j = tl.trans(load_rows(k, j0, stop, H * DK, 0, DK, BJ, PK))
        v_j = load_rows(v, j0, stop, H * DV, column, DV, BJ, BV)
        scores = tl.dot(q_t, k_j, input_precision="ieee")
        scores = tl.where(t[:, None] >= j[None, :], scores, 0.0)
        acc = tl.dot(scores.to(v_j.dtype), v_j, acc, input_precision="ieee")
    if enters >= 0:
        state = load_state(states + (bh * P + enters) * (SK * SV), 0, column, SK, SV, PK, BV)
        entered = tl.dot(q_t, state, input_precision="ieee")
        acc += entered

    if s > first:
        state = load_state(past + (bh * N + s) * (SK * SV), 0, column, SK, SV, PK, BV)
        acc = tl.dot(q_t, state, acc, input_precision="ieee")
    acc *= 1.0 / (s - first + 1)
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
        q=q, k=k, v=v, states=states, past=past, begin=begin, end=end, segment=segment, entering=entering,
        seg_first=seg_first, tiles=tiles, y=y, scale=scale, together=together, T=T, H=H, N=seg_first.shape[0],
        P=begin.shape[0], DK=DK, DV=DV, PK=PK, SK=SK, SV=SV, BT=BT, BJ=BJ, BV=bv, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return y
