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


@triton.jit
def _sift(score, number, values: tl.tuple, numbers: tl.tuple):
    """Lists of the best logits, each place's in descending order, with a further one; of equal ones the older first."""
    best = ()
    which = ()
    for r in tl.static_range(len(values)):
        higher = score > values[r]
        best = best + (tl.where(higher, score, values[r]),)
        which = which + (tl.where(higher, number, numbers[r]),)
        score, number = tl.where(higher, values[r], score), tl.where(higher, numbers[r], number)
    return best, which


@triton.jit
def _drop(here, values: tl.tuple, numbers: tl.tuple):
    """The lists without the first one of these places."""
    best = ()
    which = ()
    for r in tl.static_range(len(values)):
        if r + 1 < len(values):
            best = best + (tl.where(here, values[r + 1], values[r]),)
            which = which + (tl.where(here, numbers[r + 1], numbers[r]),)
        else:
            best = best + (tl.where(here, float("-inf"), values[r]),)
            which = which + (numbers[r],)
    return best, which


@triton.jit(do_not_specialize=["top_k", "T", "H", "N", "P"])
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
    own,
    chosen,
    picked,
    top_k,
    T,
    H,
    N,
    P,
    AGGREGATION: tl.constexpr,
    FORMULATION: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    DK: tl.constexpr,
    PK: tl.constexpr,
    SK: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    KP: tl.constexpr,
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
        scores = tl.dot(u_t, tl.trans(k_j), input_precision=PRECISION)
        total += tl.sum(tl.where(t[:, None] >= j[None, :], scores, 0.0), 1)
    logit_s = total / (t - tl.load(seg_begin + s) + 1).to(tl.float32)

    top = logit_s
    size = tl.full([BT], 1.0, tl.float32)
    if AGGREGATION == "ssc":
        # Every place of a tile keeps its own best, so that they are compared across places once, in the end.
        values = ()
        numbers = ()
        for _ in tl.static_range(KP):
            values = values + (tl.full([BT, BN], float("-inf"), tl.float32),)
            numbers = numbers + (tl.zeros([BT, BN], tl.int32),)
    for i0 in range(first, s, BN):
        i = i0 + tl.arange(0, BN)
        mean = load_rows(means, i0, s, SK, 0, SK, BN, PK)
        if HALF:
            high = mean.to(u_t.dtype)
            low = (mean - high.to(tl.float32)).to(u_t.dtype)
            score = tl.dot(u_t, tl.trans(high), tl.dot(u_t, tl.trans(low)))
        else:
            score = tl.dot(u_t, tl.trans(mean), input_precision=PRECISION)
        if logits is not None:
            place = (bh * N + i)[None, :] * T + t[:, None]
            tl.store(logits + place, score, mask=(i < s)[None, :] & valid[:, None])
        score = tl.where((i < s)[None, :], score, float("-inf"))
        if AGGREGATION == "ssc":
            values, numbers = _sift(score, i[None, :] + tl.zeros([BT, BN], tl.int32), values, numbers)
        else:
            higher = tl.maximum(top, tl.max(score, 1))
            size = size * tl.exp(top - higher) + tl.sum(tl.exp(score - higher[:, None]), 1)
            top = higher
    if AGGREGATION == "ssc":
        top = tl.maximum(top, tl.max(values[0], 1))
        size = tl.exp(logit_s - top)
        least = tl.full([BT], float("-inf"), tl.float32)
        latest = tl.zeros([BT], tl.int32)
        for r in range(0, top_k):
            least = tl.max(values[0], 1)
            latest = tl.min(tl.where(values[0] == least[:, None], numbers[0], 1 << 30), 1)
            taken = least > float("-inf")
            size += tl.where(taken, tl.exp(least - top), 0.0)
            if FORMULATION == "grouped":
                place = (bh * T + t) * top_k + r
                tl.store(chosen + place, tl.where(taken, latest, N), mask=valid)
                tl.store(picked + place, least, mask=valid)
            values, numbers = _drop(numbers[0] == latest[:, None], values, numbers)
    tl.store(lse + bh * T + t, top + tl.log(size), mask=valid)
    if logits is not None:
        tl.store(logits + (bh * N + s) * T + t, logit_s, mask=valid)
    if AGGREGATION == "ssc":
        if FORMULATION == "grouped":
            tl.store(own + bh * T + t, logit_s, mask=valid)
        else:
            # Logits are read by other threads than wrote them.
            tl.debug_barrier()
            for i0 in range(first, s, BN):
                i = i0 + tl.arange(0, BN)
                place = (bh * N + i)[None, :] * T + t[:, None]
                inside = (i < s)[None, :] & valid[:, None]
                score = tl.load(logits + place, mask=inside, other=0.0)
                left = (score < least[:, None]) | ((score == least[:, None]) & (i[None, :] > latest[:, None]))
                tl.store(logits + place, tl.full([BT, BN], float("-inf"), tl.float32), mask=inside & left)


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
    AGGREGATION: str,
    FORMULATION: str,
    HALF: bool,
    PRECISION: str,
    DK: int,
    PK: int,
    SK: int,
    BT: int,
    BN: int,
    num_warps: int,
    num_stages: int,
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
    if FORMULATION == "grouped":
        own = u.new_empty((B * H, T), dtype=torch.float32)
        chosen = u.new_empty((B * H, T, top_k), dtype=torch.int32)
        picked = u.new_empty((B * H, T, top_k), dtype=torch.float32)
    else:
        logits = u.new_empty((B * H, N, T), dtype=torch.float32)
    lse = u.new_empty((B * H, T), dtype=torch.float32)
    # KP: a place of a tile sees every BN-th segment, and has no more best ones; 4 fit all calls with few.
    gates_kernel[(tiles.shape[0], B * H)](
        u=u, k=k, means=means, sums=sums, begin=begin, end=end, segment=segment, seg_begin=seg_begin,
        seg_first=seg_first, seg_piece=seg_piece, tiles=tiles, logits=logits, lse=lse, own=own, chosen=chosen,
        picked=picked, top_k=top_k, T=T, H=H, N=N, P=P, AGGREGATION=AGGREGATION, FORMULATION=FORMULATION, HALF=HALF,
        PRECISION=PRECISION, DK=DK, PK=PK, SK=SK, BT=BT, BN=BN,
        KP=triton.next_power_of_2(min(top_k, max(triton.cdiv(N, BN), 4))), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return logits, lse, own, chosen, picked
