"""Gates of the read of a linear or SWLA Memory Caching layer, where they are learned (Eq. 8-10, 16-17).

    r_t^(i) = <u_t, p_i>        p_i the mean key of a cached segment; of the online one, the mean of its keys up to t
    gamma_t = softmax of r_t    over the segments up to t's; under ssc over t's and the top_k cached ones

What is written are logits, with -inf for what ssc does not choose, and the logarithm of the sum of their exponentials:
gamma = exp(logit - lse). Logits have float32 accuracy: products of 16-bit numbers are exact, and mean keys are split
into two such numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import load_rows

DK = 128
PK = 128
SK = 128
BN = 16
BT = 64
num_stages = 2
num_warps = 4


@triton.jit(do_not_specialize=["T", "H", "N", "P"])
def gates_kernel(
    u,
    k,
    means,
    sums,
    begin,
    end,
    segment,
    seg_begin,
    seg_first,
    seg_piece,
    tiles,
    logits,
    lse,
    T,
    H,
    N,
    P,
    DK: tl.constexpr,
    PK: tl.constexpr,
    SK: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """One program: BT tokens of a head."""
    tile = tiles + tl.program_id(0) * 2
    bh = tl.program_id(1).to(tl.int64)
    piece = tl.load(tile)
    t0 = tl.load(tile + 1)
    start = tl.load(begin + piece)
    stop = tl.minimum(t0 + BT, tl.load(end + piece))
    s = tl.load(segment + piece)
    first = tl.load(seg_first + s)
    head = bh // H * T * H + bh % H
    u += head * DK
    k += head * DK
    means += bh * N * SK
    t = t0 + tl.arange(0, BT)
    valid = t < stop
    u_t = load_rows(u, t0, stop, H * DK, 0, DK, BT, PK)

    # The online segment: <u_t, k_j> over its tokens up to t.
    total = tl.zeros([BT], tl.float32)
    if sums is not None:
        cols = tl.arange(0, PK)
        earlier = tl.zeros([PK], tl.float32)
        for p in range(tl.load(seg_piece + s), piece):
            earlier += tl.load(sums + (bh * P + p) * SK + cols, mask=cols < SK, other=0.0)
        total += tl.sum(u_t.to(tl.float32) * earlier[None, :], 1)
    for j0 in range(start, stop, BT):
        j = j0 + tl.arange(0, BT)
        k_j = load_rows(k, j0, stop, H * DK, 0, DK, BT, PK)
        scores = tl.dot(u_t, tl.trans(k_j), input_precision="ieee")
        total += tl.sum(tl.where(t[:, None] >= j[None, :], scores, 0.0), 1)
    logit_s = total / (t - tl.load(seg_begin + s) + 1).to(tl.float32)

    top = logit_s
    size = tl.full([BT], 1.0, tl.float32)
    for i0 in range(first, s, BN):
        i = i0 + tl.arange(0, BN)
        mean = load_rows(means, i0, s, SK, 0, SK, BN, PK)
        high = mean.to(u_t.dtype)
        low = (mean - high.to(tl.float32)).to(u_t.dtype)
        score = tl.dot(u_t, tl.trans(high), tl.dot(u_t, tl.trans(low)))
        if logits is not None:
            place = (bh * N + i)[None, :] * T + t[:, None]
            tl.store(logits + place, score, mask=(i < s)[None, :] & valid[:, None])
        score = tl.where((i < s)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        size = size * tl.exp(top - higher) + tl.sum(tl.exp(score - higher[:, None]), 1)
        top = higher
    tl.store(lse + bh * T + t, top + tl.log(size), mask=valid)
    if logits is not None:
        tl.store(logits + (bh * N + s) * T + t, logit_s, mask=valid)


def gates(
    u: torch.Tensor,
    k: torch.Tensor,
    means: torch.Tensor,
    sums: torch.Tensor | None,
    begin: torch.Tensor,
    end: torch.Tensor,
    segment: torch.Tensor,
    seg_begin: torch.Tensor,
    seg_first: torch.Tensor,
    seg_piece: torch.Tensor,
    tiles: torch.Tensor,
    top_k: int,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """logits ``[B*H, N, T]``, lse ``[B*H, T]``; with FORMULATION "grouped" own, chosen and picked instead of logits.

    Args:
        u, k [B, T, H, DK]: of one dtype.
        means [B*H, N, SK], sums [B*H, P, SK]: of :mod:`segment_states`, float32.
        tiles: of BT tokens.

    Returns:
        Float32. logits: row i at the tokens of segment i, where it is the online one, and of later ones of the
        sequence; the rest is not written. own ``[B*H, T]``: the online segment's logit. chosen ``[B*H, T, top_k]``:
        int32, the cached segments of a token, N where there are fewer; picked: their logits.
    """
    B, T, H, _ = u.shape
    N, P = seg_first.shape[0], begin.shape[0]
    logits = own = chosen = picked = None
    logits = u.new_empty((B * H, N, T), dtype=torch.float32)
    lse = u.new_empty((B * H, T), dtype=torch.float32)
    # KP: a place of a tile sees every BN-th segment, and has no more best ones; 4 fit all calls with few.
    gates_kernel[(tiles.shape[0], B * H)](
        u=u, k=k, means=means, sums=sums, begin=begin, end=end, segment=segment, seg_begin=seg_begin,
        seg_first=seg_first, seg_piece=seg_piece, tiles=tiles, logits=logits, lse=lse, T=T, H=H, N=N, P=P, DK=DK, PK=PK,
        SK=SK, BT=BT, BN=BN, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return logits, lse, own, chosen, picked
