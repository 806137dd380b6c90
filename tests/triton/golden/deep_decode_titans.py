"""A new token of a deep Memory Caching layer over its cache, read in place (Eq. 2, 4, 6-17, 30-36).

With U, W the state that entered the inner chunk, z = gelu(k U), err = -v (dla) or 2 (z W (+ k) - v) (titans) and
back = (err W^T) gelu'(k U), the online state M and for titans its momentum S go on, and are read:

    S = mu S + eta (k^T back, z^T err), M = e^g M - S        dla: M = M - eta (k^T back, z^T err)
    y = gamma_s M(x) + sum_i gamma_i M_i(x), x = scale q

Bound by the bytes of the states. A program of a head has EB hidden units of the online state, writes them and adds
their part of y; others share the cached states, each of which is read once. Where parameters are mixed, the parts are
those of the hidden units, and :mod:`deep_decode_mix` reads the lower layers. A token at the end of a segment leaves the
online state in the cache, rounded to its dtype, which nothing reads before the next token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .deep_common import gelu_slope, store_block
from .deep_decode_common import (
    Memory,
    Parts,
    Shares,
    Strengths,
    Tokens,
    Widths,
    even_share,
    load_lower,
    load_place,
    load_row,
    load_upper,
    tokens_of,
)

INNER = 16
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
def _store(up, down, upper, lower, e, widths: tl.constexpr):
    """A block of hidden units of both layers."""
    store_block(up, upper, 0, e, widths.DK, widths.DE, widths.PK, widths.EB)
    store_block(down, lower, e, 0, widths.DE, widths.DV, widths.EB, widths.PV)


@triton.jit
def _append(memory, upper, lower, bh, e, slot, capacity, widths: tl.constexpr):
    """The end state of a segment, where there is room: there is, unless counts are on the device."""
    place = bh * capacity + tl.minimum(slot, capacity - 1)
    up = memory.up + place * (widths.DK * widths.DE)
    down = memory.down + place * (widths.DE * widths.DV)
    if slot < capacity:
        _store(up, down, upper, lower, e, widths)


@triton.jit
def _error(tokens, parts, bh, adds, widths: tl.constexpr):
    """err ``[PV]``."""
    x = tl.arange(0, widths.PV)
    err = -load_row(tokens.v, widths.DV, widths.PV)
    BLOCKS: tl.constexpr = (widths.DE + widths.EB - 1) // widths.EB
    for block in range(0, BLOCKS):
        err += tl.load(parts.outputs + (bh * BLOCKS + block) * widths.DV + x, mask=x < widths.DV, other=0.0)
    if adds:
        err += load_row(tokens.k, widths.DV, widths.PV)
    err *= 2.0
    return err


@triton.jit
def _write(
    tokens, strengths, memory, parts, bh, row, e, used, begun, capacity, length, adds, widths: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """EB hidden units of the online state after the token, and all that is written of them.

    Where parameters are mixed, the lower layer is read once more before a segment's end resets it.
    """
    up = bh * (widths.DK * widths.DE)
    down = bh * (widths.DE * widths.DV)
    M_up = load_upper(memory.online_up + up, e, widths)
    M_down = load_lower(memory.online_down + down, e, widths)
    U = M_up
    W = M_down
    if begun % INNER == 0:
        _store(memory.start_up + up, memory.start_down + down, U, W, e, widths)
    else:
        U = load_upper(memory.start_up + up, e, widths)
        W = load_lower(memory.start_down + down, e, widths)
    key = load_row(tokens.k, widths.DK, widths.PK)
    err = _error(tokens, parts, bh, adds, widths)
    z, slope = gelu_slope(tl.sum(key[:, None] * U, 0))
    back = tl.sum(W * err[None, :], 1) * slope
    if strengths.eta is not None:
        eta = tl.load(strengths.eta + row)
        back *= eta
        z *= eta
    S_up = key[:, None] * back[None, :]
    S_down = z[:, None] * err[None, :]
    if strengths.mu is not None:
        mu = tl.load(strengths.mu + row)
        S_up += mu * load_upper(memory.momentum_up + up, e, widths)
        S_down += mu * load_lower(memory.momentum_down + down, e, widths)
    if strengths.g is not None:
        decay = tl.exp(tl.load(strengths.g + row))
        M_up *= decay
        M_down *= decay
    M_up -= S_up
    M_down -= S_down
    # Every thread has read what is overwritten now.
    tl.debug_barrier()
    _store(memory.online_up + up, memory.online_down + down, M_up, M_down, e, widths)
    _store(memory.momentum_up + up, memory.momentum_down + down, S_up, S_down, e, widths)
    if begun + 1 == length:
        _append(memory, M_up, M_down, bh, e, used, capacity, widths)
    return M_up, M_down


@triton.jit
def _share(used):
    """What cached state number r of those that are read weighs."""
    return even_share(used, True)


@triton.jit
def _slot(r):
    """The cached state number r of those that are read."""
    return r


@triton.jit
def read_uppers(
    x, memory, bh, e, lo, hi, used, capacity, STAGES: tl.constexpr, widths: tl.constexpr,
):  # fmt: skip
    """``[EB]``: the weighted upper layers of the cached states number ``lo`` to ``hi``, read with x."""
    PK: tl.constexpr = widths.PK
    EB: tl.constexpr = widths.EB
    total = tl.zeros([PK, EB], tl.float32)
    for r in tl.range(lo, hi, num_stages=STAGES):
        place = bh * capacity + _slot(r)
        share = _share(used)
        total += share * load_upper(memory.up + place * (widths.DK * widths.DE), e, widths)
    return tl.sum(x[:, None] * total, 0)


@triton.jit(do_not_specialize=["cached_all", "filled_all", "first", "total", "H", "capacity", "length"])
def deep_step_kernel(
    tokens, strengths, memory, parts, cached_all, filled_all, first, total, H, capacity, length, scale,
    ADDS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, widths: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The first programs of a head have EB hidden units of the online state each, the others a split of the states.

    These have EB hidden units of them where parameters are mixed, else all.
    """
    EB: tl.constexpr = widths.EB
    BLOCKS: tl.constexpr = (widths.DE + EB - 1) // EB
    bh = tl.program_id(0).to(tl.int64)
    pid = tl.program_id(1)
    used, begun = load_place(memory, cached_all, filled_all, bh // H, first, length)
    row = (bh // H * total + first) * H + bh % H
    mine = tokens_of(tokens, row, widths)
    x = load_row(mine.q, widths.DK, widths.PK) * scale
    v = tl.arange(0, widths.PV)
    if pid < BLOCKS:
        e = pid * EB
        M_up, M_down = _write(
            mine, strengths, memory, parts, bh, row, e, used, begun, capacity, length, ADDS, widths, INNER,
        )  # fmt: skip
        hidden = tl.sum(x[:, None] * M_up, 0)
        own = even_share(used, True)
        units = e + tl.arange(0, EB)
        place = (bh * (SPLITS + 1) + SPLITS) * widths.DE
        tl.store(parts.hidden + place + units, own * hidden, mask=units < widths.DE)
    else:
        count = used
        split = (pid - BLOCKS) // BLOCKS
        e = (pid - BLOCKS) % BLOCKS * EB
        units = e + tl.arange(0, EB)
        hidden = read_uppers(
            x, memory, bh, e, (split * count) // SPLITS, ((split + 1) * count) // SPLITS, used, capacity, STAGES,
            widths,
        )  # fmt: skip
        place = (bh * (SPLITS + 1) + split) * widths.DE
        tl.store(parts.hidden + place + units, hidden, mask=units < widths.DE)


def deep_decode(
    tokens: Tokens, strengths: Strengths, memory: Memory, shares: Shares | None, parts: Parts | None, cached_all: int,
    filled_all: int, first: int, length: int, top_k: int, scale: float, adds: bool,
) -> Parts:  # fmt: skip
    """Token ``first`` of all T over a memory, which is written in place but for key_sum and descriptors.

    Args:
        tokens: q, k, u [B, T, H, DK], v [B, T, H, DV], of one dtype.
        strengths: [B, T, H] float32, or None.
        memory: its states float32, bfloat16 or float16; without cached and filled, which are ``cached_all`` and
            ``filled_all`` for every sequence, or with both.
        shares, parts: of :mod:`deep_decode_gates`, None where it has nothing to do.
        length: C.
        adds: whether the memory adds its input.

    Returns:
        reads ``[B*H, SPLITS + BLOCKS, DV]``, whose sum is y without the input that a memory adds; where parameters are
        mixed instead hidden ``[B*H, SPLITS + 1, DE]``, for :mod:`deep_decode_mix`.
    """
    (B, total, H, _), capacity, blocks = tokens.k.shape, memory.descriptors.shape[2], triton.cdiv(DE, EB)
    like, shares, parts = memory.key_sum, shares or Shares(), parts or Parts()
    programs, made = blocks * (SPLITS + 1), parts._replace(hidden=like.new_empty((B * H, SPLITS + 1, DE)))
    deep_step_kernel[(B * H, programs)](
        tokens=tokens, strengths=strengths, memory=memory._replace(descriptors=None, key_sum=None), parts=made,
        cached_all=cached_all, filled_all=filled_all, first=first, total=total, H=H, capacity=capacity, length=length,
        scale=scale, ADDS=adds, SPLITS=SPLITS, STAGES=STAGES, widths=Widths(DK, DV, DE, PK, PV, EB), INNER=INNER,
        num_warps=num_warps,
    )  # fmt: skip
    return made
