"""Pairs of a token and a segment that ssc chose for it, in the order of the segments (Eq. 16): a stable counting sort.

A head's pairs are cut into parts, and each part's are counted by segment. Sums over segments, and over the parts of a
segment, say where each part's pairs of a segment begin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = tl.constexpr(64)
"""Pairs that are compared together, by one warp: its lanes have columns, so that sums over rows stay in a lane."""


@triton.jit(do_not_specialize=["pairs_a_part", "pairs", "parts", "N"])
def count_kernel(chosen, counts, pairs_a_part, pairs, parts, N, ROWS: tl.constexpr):
    """One program: ROWS pairs, each counted with its segment's of its part. Sums of integers have no order."""
    bh = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which = tl.load(chosen + bh * pairs + pair, mask=pair < pairs, other=0)
    place = (bh * (N + 1) + which) * parts + pair // pairs_a_part
    tl.atomic_add(counts + place, 1, mask=pair < pairs, sem="relaxed")


@triton.jit(do_not_specialize=["rounds", "pairs", "N"])
def place_kernel(chosen, offsets, order, starts, rounds, pairs, N):
    """One program: the pairs of a part, rounds times ROWS, each to its place; the first part's starts too."""
    part = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(0)
    chosen += bh * pairs
    order += bh * pairs
    offsets += bh * (N + 1) * parts
    base = tl.load(offsets)
    if part == 0:
        for i0 in range(0, N + 2, ROWS):
            i = i0 + tl.arange(0, ROWS)
            start = tl.load(offsets + i.to(tl.int64) * parts, mask=i < N + 2, other=0) - base
            tl.store(starts + bh * (N + 2) + i, start.to(tl.int32), mask=i < N + 2)
    offsets += part
    first = part * rounds * ROWS
    for r in range(0, tl.minimum(rounds, tl.cdiv(pairs - first, ROWS))):
        line = first + r * ROWS
        pair = line + tl.arange(0, ROWS)
        which = tl.load(chosen + pair, mask=pair < pairs, other=0)
        same = (which[:, None] == which[None, :]) & (pair[:, None] < pair[None, :])
        before = tl.sum(same.to(tl.int32), 0)
        for e0 in range(first, line, ROWS):
            other = tl.load(chosen + e0 + tl.arange(0, ROWS))
            before += tl.sum((other[:, None] == which[None, :]).to(tl.int32), 0)
        inside = pair < pairs
        place = tl.load(offsets + which.to(tl.int64) * parts, mask=inside, other=0) - base + before
        tl.store(order + place, pair, mask=inside)


def pair_order(
    chosen: torch.Tensor, N: int, blocks: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """order ``[B*H, T * top_k]`` and starts ``[B*H, N + 2]``, int32; for several blocks of tokens theirs.

    Args:
        chosen [B*H, T, top_k]: int32, of :mod:`gates`; N for no segment.
        blocks: into which T is divided, a power of two; each has a multiple of 1024 tokens, if there are several.

    Returns:
        A head's pairs, those of one segment in a row; which of them is a segment's first, segment N having the pairs
        without one, and N + 1 none. Of each block ``[B*H * blocks, N + 2]``: starts among its own pairs, and ``runs``,
        where a segment's begin in the head's order.
    """
    heads, T, top_k = chosen.shape
    pairs = T * top_k
    # At least 128 pairs a part, and so many that there are no more than two counts for a pair.
    rounds = triton.cdiv(max(N + 1, 256), 128)
    if blocks > 1:
        # Blocks are whole parts.
        rounds = min(triton.next_power_of_2(rounds), 16)
    parts = triton.cdiv(pairs, rounds * 64)
    counts = chosen.new_zeros(heads * (N + 1) * parts)
    count_kernel[(triton.cdiv(pairs, 256), heads)](
        chosen=chosen, counts=counts, pairs_a_part=rounds * 64, pairs=pairs, parts=parts, N=N, ROWS=256, num_warps=4
    )
    offsets = chosen.new_zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    order, starts = torch.empty_like(chosen).view(heads, pairs), chosen.new_empty((heads, N + 2))
    place_kernel[(parts, heads)](
        chosen=chosen, offsets=offsets, order=order, starts=starts, rounds=rounds, pairs=pairs, N=N, num_warps=1
    )
    if blocks == 1:
        return order, starts, None
    bounds = offsets.as_strided((heads, N + 1, blocks + 1), ((N + 1) * parts, parts, parts // blocks))
    runs = (bounds[..., :-1] - bounds[:, :1, :1]).mT.to(torch.int32).reshape(heads * blocks, N + 1)
    own = chosen.new_zeros((heads * blocks, N + 2))
    torch.cumsum(bounds.diff(dim=-1).mT.reshape(heads * blocks, N + 1), 1, out=own[:, 1:])
    return order, starts, (own, runs)
