"""The lower layers of a deep memory whose parameters are mixed, at a decode step (Eq. 14-15).

    y = gamma_s z W + sum_i gamma_i z W_i        z = gelu of the sum of the hidden units' parts

A program of a head has EB hidden units of a split of the cached states, or of the online state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .deep_common import gelu, store_block
from .deep_decode_common import Memory, Parts, Shares, Widths, even_share, load_lower, load_place


@triton.jit
def _hidden(parts, bh, e, SPLITS: tl.constexpr, widths: tl.constexpr):
    """``[EB]``: the hidden units of the mixture."""
    EB: tl.constexpr = widths.EB
    units = e + tl.arange(0, widths.EB)
    total = tl.zeros([EB], tl.float32)
    for split in range(0, SPLITS + 1):
        place = (bh * (SPLITS + 1) + split) * widths.DE
        total += tl.load(parts.hidden + place + units, mask=units < widths.DE, other=0.0)
    return gelu(total)


@triton.jit(do_not_specialize=["cached_all", "filled_all", "first", "H", "capacity", "length", "top_k"])
def deep_lower_kernel(
    memory, shares, parts, cached_all, filled_all, first, H, capacity, length, top_k,
    ROUTED: tl.constexpr, SPARSE: tl.constexpr, AVERAGES: tl.constexpr, INDEPENDENT: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, MOST: tl.constexpr, widths: tl.constexpr,
):  # fmt: skip
    """The last split is the online state, which an independent segment's end resets now."""
    PV: tl.constexpr = widths.PV
    EB: tl.constexpr = widths.EB
    BLOCKS: tl.constexpr = (widths.DE + EB - 1) // EB
    bh = tl.program_id(0).to(tl.int64)
    pid = tl.program_id(1)
    used, begun = load_place(memory, cached_all, filled_all, bh // H, first, length)
    e = pid % BLOCKS * EB
    split = pid // BLOCKS
    z = _hidden(parts, bh, e, SPLITS, widths)
    total = tl.zeros([EB, PV], tl.float32)
    if split < SPLITS:
        count = used
        if SPARSE:
            count = tl.minimum(top_k, used)
        for r in tl.range((split * count) // SPLITS, ((split + 1) * count) // SPLITS, num_stages=STAGES):
            slot = r
            if SPARSE:
                slot = tl.load(shares.chosen + bh * MOST + r)
            if ROUTED:
                share = tl.load(shares.gammas + bh * MOST + r)
            else:
                share = even_share(used, AVERAGES)
            total += share * load_lower(memory.down + (bh * capacity + slot) * (widths.DE * widths.DV), e, widths)
    else:
        if ROUTED:
            own = tl.load(shares.own + bh)
        else:
            own = even_share(used, AVERAGES)
        online = memory.online_down + bh * (widths.DE * widths.DV)
        total = own * load_lower(online, e, widths)
        if INDEPENDENT:
            if begun + 1 == length:
                first_down = load_lower(memory.initial_down + bh % H * (widths.DE * widths.DV), e, widths)
                # Every thread has read what is overwritten now.
                tl.debug_barrier()
                store_block(online, first_down, e, 0, widths.DE, widths.DV, EB, widths.PV)
    v = tl.arange(0, widths.PV)
    place = (bh * tl.num_programs(1) + pid) * widths.DV
    tl.store(parts.reads + place + v, tl.sum(z[:, None] * total, 0), mask=v < widths.DV)


def deep_decode_mix(
    memory: Memory,
    shares: Shares | None,
    parts: Parts,
    cached_all: int,
    filled_all: int,
    first: int,
    length: int,
    top_k: int,
    ROUTED: bool, SPARSE: bool, AVERAGES: bool, INDEPENDENT: bool, DK: int, DV: int, DE: int, PK: int, PV: int,
    SPLITS: int, EB: int, STAGES: int, num_warps: int,
) -> Parts:  # fmt: skip
    """reads ``[B*H, (SPLITS + 1) BLOCKS, DV]`` in ``parts``; arguments as those of :mod:`deep_decode`."""
    B, H, capacity, _ = memory.descriptors.shape
    shares = shares or Shares()
    programs = (SPLITS + 1) * triton.cdiv(DE, EB)
    made = parts._replace(outputs=None, reads=memory.key_sum.new_empty((B * H, programs, DV)))
    own = Memory(
        down=memory.down, online_down=memory.online_down, initial_down=memory.initial_down, cached=memory.cached,
        filled=memory.filled,
    )  # fmt: skip
    deep_lower_kernel[(B * H, programs)](
        memory=own, shares=shares, parts=made, cached_all=cached_all, filled_all=filled_all, first=first, H=H,
        capacity=capacity, length=length, top_k=top_k, ROUTED=ROUTED, SPARSE=SPARSE, AVERAGES=AVERAGES,
        INDEPENDENT=INDEPENDENT, SPLITS=SPLITS, STAGES=STAGES, MOST=shares.gammas.shape[1] if ROUTED else 1,
        widths=Widths(DK, DV, DE, PK, PV, EB), num_warps=num_warps,
    )  # fmt: skip
    return made
