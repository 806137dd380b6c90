"""The lower layers of a deep memory whose parameters are mixed, at a decode step (Eq. 14-15).

    y = gamma_s z W + sum_i gamma_i z W_i        z = gelu of the sum of the hidden units' parts

A program of a head has EB hidden units of a split of the cached states, or of the online state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .deep_common import gelu
from .deep_decode_common import Memory, Parts, Shares, Widths, even_share, load_lower, load_place

DK = 48
PK = 64
DV = 80
PV = 128
DE = 192
EB = 32
SPLITS = 16
STAGES = 2
num_warps = 4


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


@triton.jit(do_not_specialize=["cached_all", "filled_all", "first", "H", "capacity", "length"])
def deep_lower_kernel(
    memory, parts, cached_all, filled_all, first, H, capacity, length, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    widths: tl.constexpr,
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
        for r in tl.range((split * count) // SPLITS, ((split + 1) * count) // SPLITS, num_stages=STAGES):
            slot = r
            share = even_share(used, True)
            total += share * load_lower(memory.down + (bh * capacity + slot) * (widths.DE * widths.DV), e, widths)
    else:
        own = even_share(used, True)
        online = memory.online_down + bh * (widths.DE * widths.DV)
        total = own * load_lower(online, e, widths)
    v = tl.arange(0, widths.PV)
    place = (bh * tl.num_programs(1) + pid) * widths.DV
    tl.store(parts.reads + place + v, tl.sum(z[:, None] * total, 0), mask=v < widths.DV)


def deep_decode_mix(
    memory: Memory, shares: Shares | None, parts: Parts, cached_all: int, filled_all: int, first: int, length: int,
    top_k: int,
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
        memory=own, parts=made, cached_all=cached_all, filled_all=filled_all, first=first, H=H, capacity=capacity,
        length=length, SPLITS=SPLITS, STAGES=STAGES, widths=Widths(DK, DV, DE, PK, PV, EB), num_warps=num_warps,
    )  # fmt: skip
    return made
