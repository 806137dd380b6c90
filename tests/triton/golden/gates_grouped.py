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

from .common import Dims, Gates, Keys, Spans, Tables, earlier_logits, load_rows, load_tile, mean_logits

DK = 128
PK = 128
SK = 128
DV = 128
PV = 128
SV = 128
BN = 16
BT = 64
num_stages = 2
num_warps = 4


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


@triton.jit
def _online_logit(
    u_t, k, keys, tile, spans, bh, H, P, dims: tl.constexpr, BT: tl.constexpr
):
    """[BT]: <u_t, p_s> with the mean of the online segment's keys up to t."""
    t = tile.first + tl.arange(0, BT)
    total = earlier_logits(u_t, keys, tile, spans, bh, P, dims)
    for j0 in range(tile.start, tile.stop, BT):
        j = j0 + tl.arange(0, BT)
        k_j = load_rows(k, j0, tile.stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
        scores = tl.dot(u_t, tl.trans(k_j), input_precision="ieee")
        total += tl.sum(tl.where(t[:, None] >= j[None, :], scores, 0.0), 1)
    return total / (t - tl.load(spans.seg_begin + tile.segment) + 1).to(tl.float32)


@triton.jit
def _lists(BT: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr):
    """Empty lists for every place of a tile: each keeps its own best, so that places are compared once, in the end."""
    values = ()
    numbers = ()
    for _ in tl.static_range(KP):
        values = values + (tl.full([BT, BN], float("-inf"), tl.float32),)
        numbers = numbers + (tl.zeros([BT, BN], tl.int32),)
    return values, numbers


@triton.jit
def _choose(logit_s, values: tl.tuple, numbers: tl.tuple, made, line, valid, top_k, N):
    """Largest logit and size of the softmax over the online segment and the best top_k; logit and number of their last.

    ``line``: the tokens' places in ``[B*H, T]``.
    """
    top = tl.maximum(logit_s, tl.max(values[0], 1))
    size = tl.exp(logit_s - top)
    least = tl.full(logit_s.shape, float("-inf"), tl.float32)
    latest = tl.zeros(logit_s.shape, tl.int32)
    for r in range(0, top_k):
        least = tl.max(values[0], 1)
        latest = tl.min(tl.where(values[0] == least[:, None], numbers[0], 1 << 30), 1)
        taken = least > float("-inf")
        size += tl.where(taken, tl.exp(least - top), 0.0)
        place = line * top_k + r
        tl.store(made.chosen + place, tl.where(taken, latest, N), mask=valid)
        tl.store(made.picked + place, least, mask=valid)
        values, numbers = _drop(numbers[0] == latest[:, None], values, numbers)
    return top, size, least, latest


@triton.jit(do_not_specialize=["top_k", "T", "H", "N", "P"])
def gates_kernel(
    u, k, keys, spans, tiles, made, top_k, T, H, N, P, dims: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens of a head."""
    bh = tl.program_id(1).to(tl.int64)
    tile = load_tile(tiles + tl.program_id(0) * 2, spans, BT)
    s = tile.segment
    head = bh // H * T * H + bh % H
    means = keys.means + bh * N * dims.SK
    t = tile.first + tl.arange(0, BT)
    valid = t < tile.stop
    u_t = load_rows(u + head * dims.DK, tile.first, tile.stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
    logit_s = _online_logit(
        u_t, k + head * dims.DK, keys, tile, spans, bh, H, P, dims=dims, BT=BT
    )
    top = logit_s
    size = tl.full([BT], 1.0, tl.float32)
    values, numbers = _lists(BT=BT, BN=BN, KP=KP)
    for i0 in range(tile.oldest, s, BN):
        i = i0 + tl.arange(0, BN)
        score = mean_logits(u_t, means, i0, s, dims, BN, "ieee")
        if made.logits is not None:
            place = (bh * N + i)[None, :] * T + t[:, None]
            tl.store(made.logits + place, score, mask=(i < s)[None, :] & valid[:, None])
        score = tl.where((i < s)[None, :], score, float("-inf"))
        values, numbers = _sift(score, i[None, :] + tl.zeros([BT, BN], tl.int32), values, numbers)
    top, size, least, latest = _choose(
        logit_s, values, numbers, made, bh * T + t, valid, top_k, N
    )
    tl.store(made.lse + bh * T + t, top + tl.log(size), mask=valid)
    if made.logits is not None:
        tl.store(made.logits + (bh * N + s) * T + t, logit_s, mask=valid)
    tl.store(made.own + bh * T + t, logit_s, mask=valid)


def gates(
    u: torch.Tensor,
    k: torch.Tensor,
    means: torch.Tensor,
    sums: torch.Tensor | None,
    tables: Tables,
    tiles: torch.Tensor,
    top_k: int,
) -> Gates:
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
    N, P = tables.seg_first.shape[0], tables.begin.shape[0]
    lse = u.new_empty((B * H, T), dtype=torch.float32)
    own = u.new_empty((B * H, T), dtype=torch.float32)
    chosen = u.new_empty((B * H, T, top_k), dtype=torch.int32)
    made = Gates(None, lse, own, chosen, u.new_empty((B * H, T, top_k), dtype=torch.float32))
    spans = Spans(
        tables.begin, tables.end, tables.segment, seg_begin=tables.seg_begin, seg_first=tables.seg_first,
        seg_piece=tables.seg_piece,
    )  # fmt: skip
    # KP: a place of a tile sees every BN-th segment, and has no more best ones; 4 fit all calls with few.
    gates_kernel[(tiles.shape[0], B * H)](
        u=u, k=k, keys=Keys(means, sums), spans=spans, tiles=tiles, made=made, top_k=top_k, T=T, H=H, N=N, P=P,
        dims=Dims(DK, DV, PK, PV, SK, SV), BT=BT, BN=BN,
        KP=triton.next_power_of_2(min(top_k, max(triton.cdiv(N, BN), 4))), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return made
