"""The end of a decode step of a deep memory: y from its parts, and the sum of the segment's keys (Eq. 6-17)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .deep_decode_common import Memory, Tokens, Widths, load_place, load_row, tokens_of

DK = 64
PK = 64
DV = 64
PV = 64
DE = 256


@triton.jit(do_not_specialize=["cached_all", "filled_all", "first", "total", "H", "capacity", "length", "PARTS"])
def deep_combine_kernel(
    tokens, memory, reads, cached_all, filled_all, first, total, H, capacity, length, PARTS, scale, ADDS: tl.constexpr,
    widths: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """One program: the token of a head."""
    PV: tl.constexpr = widths.PV
    bh = tl.program_id(0).to(tl.int64)
    used, begun = load_place(memory, cached_all, filled_all, bh // H, first, length)
    row = (bh // H * total + first) * H + bh % H
    mine = tokens_of(tokens, row, widths)
    x = tl.arange(0, widths.PV)
    y = tl.zeros([PV], tl.float32)
    for p0 in range(0, PARTS, BP):
        p = p0 + tl.arange(0, BP)
        inside = (p < PARTS)[:, None] & (x < widths.DV)[None, :]
        y += tl.sum(tl.load(reads + (bh * PARTS + p[:, None]) * widths.DV + x[None, :], mask=inside, other=0.0), 0)
    if ADDS:
        # Gates sum to 1, and where there are none a memory's input is added once a state.
        added = load_row(mine.q, widths.DV, widths.PV) * scale
        y += added
    tl.store(mine.y + x, y.to(mine.y.dtype.element_ty), mask=x < widths.DV)
    d = tl.arange(0, widths.PK)
    keys = load_row(memory.key_sum + bh * widths.DK, widths.DK, widths.PK) + load_row(mine.k, widths.DK, widths.PK)
    if begun + 1 == length:
        # The host knows that there is room, unless counts are on the device.
        room = d < tl.where(used < capacity, widths.DK, 0)
        tl.store(memory.descriptors + (bh * capacity + used) * widths.DK + d, keys / length, mask=room)
        keys = tl.zeros_like(keys)
    # Every thread has read what is overwritten now.
    tl.debug_barrier()
    tl.store(memory.key_sum + bh * widths.DK + d, keys, mask=d < widths.DK)


def deep_decode_combine(
    tokens: Tokens, memory: Memory, reads: torch.Tensor, cached_all: int, filled_all: int, first: int, length: int,
    scale: float, adds: bool,
) -> None:  # fmt: skip
    """y of token ``first`` from reads ``[B*H, PARTS, DV]``, key_sum, and descriptors at a segment's end.

    The other arguments as those of :mod:`deep_decode`.
    """
    B, H, capacity, _ = memory.descriptors.shape
    own = Memory(
        descriptors=memory.descriptors, key_sum=memory.key_sum, cached=memory.cached, filled=memory.filled
    )  # fmt: skip
    deep_combine_kernel[(B * H,)](
        tokens=tokens, memory=own, reads=reads, cached_all=cached_all, filled_all=filled_all, first=first,
        total=tokens.k.shape[1], H=H, capacity=capacity, length=length, PARTS=reads.shape[1], scale=scale, ADDS=adds,
        widths=Widths(DK, DV, DE, PK, PV, 16), BP=min(16, triton.next_power_of_2(reads.shape[1])), num_warps=4,
    )  # fmt: skip
