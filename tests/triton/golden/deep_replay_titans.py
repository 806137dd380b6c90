"""The writes of a deep memory once more: the state that enters every inner chunk (Eq. 30-31, 34-36).

With all gradients of a chunk at its first state, K, V its keys and values, U, W the layers and S_U, S_W their momentum:

    H = K U    Z = gelu(H)    err = -V (dla) or 2 (Z W (+ K) - V) (titans)    back = (err W^T) gelu'(H)
    U' = c U - d S_U - K^T (c_j back_j)        S_U' = p S_U + K^T (s_j back_j)
    W' = c W - d S_W - Z^T (c_j err_j)         S_W' = p S_W + Z^T (s_j err_j)

A lane is a segment; under checkpoint a sequence, unless it is known what its segments start from. The states that enter
chunks are operands of products, in k's dtype. Where errors are -v, hidden units do not depend on each other: a program
has EB of them, in registers. Else it has a lane, whose state is in memory, and goes twice through the blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .deep_backward_common import (
    Chunks,
    Dims,
    Layers,
    Tables,
    Weights,
    add_product,
    load_down,
    load_line,
    load_up,
    product,
    store_down,
    store_up,
)
from .deep_common import gelu_slope_as, load_rows, store_rows

INNER = 16
DK = 48
PK = 64
SK = 48
DV = 80
PV = 128
SV = 80
SE = 192
EB = 32
num_stages = 1
num_warps = 8


@triton.jit
def first_state(initial, known, chunks, first, bh, H, N, e, dims: tl.constexpr):
    """EB hidden units of the state that a lane starts from, whose first chunk is ``first``."""
    up: tl.constexpr = dims.SK * dims.SE
    down: tl.constexpr = dims.SE * dims.SV
    U = load_up(initial.up + bh % H * up, e, dims)
    W = load_down(initial.down + bh % H * down, e, dims)
    if known is not None:
        before = tl.load(chunks.entering + first)
        if before >= 0:
            place = bh * N + tl.load(chunks.segment + before)
            U = load_up(known.up + place * up, e, dims)
            W = load_down(known.down + place * down, e, dims)
    return U, W


@triton.jit
def leave(made, place, U, W, e, dims: tl.constexpr):
    """EB hidden units of a state."""
    store_up(made.up + place * (dims.SK * dims.SE), e, U.to(made.up.dtype.element_ty), dims)
    store_down(made.down + place * (dims.SE * dims.SV), e, W.to(made.down.dtype.element_ty), dims)


@triton.jit
def residuals(k_j, v_j, up, down, TYPE: tl.constexpr, ADDS: tl.constexpr, dims: tl.constexpr):
    """``[BB, PV]``: 2 (M(k) - v) of a chunk's tokens, over all hidden units."""
    PV: tl.constexpr = dims.PV
    o = tl.zeros([k_j.shape[0], PV], tl.float32)
    for e in range(0, dims.SE, dims.EB):
        z, _ = gelu_slope_as(product(k_j, load_up(up, e, dims), TYPE, "ieee"), TYPE)
        o = add_product(z, load_down(down, e, dims), o, TYPE, "ieee")
    if ADDS:
        o += k_j.to(tl.float32)
    return 2.0 * (o - v_j.to(tl.float32))


@triton.jit
def open_lane(initial, known, carry, chunks, first, place, bh, H, N, dims: tl.constexpr):
    """The state that a lane starts from, and no momentum."""
    PK: tl.constexpr = dims.PK
    EB: tl.constexpr = dims.EB
    PV: tl.constexpr = dims.PV
    for e in range(0, dims.SE, dims.EB):
        U, W = first_state(initial, known, chunks, first, bh, H, N, e, dims)
        leave(carry, place, U, W, e, dims)
        if carry.s_up is not None:
            store_up(carry.s_up + place * (dims.SK * dims.SE), e, tl.zeros([PK, EB], tl.float32), dims)
            store_down(carry.s_down + place * (dims.SE * dims.SV), e, tl.zeros([EB, PV], tl.float32), dims)


@triton.jit
def write_chunk(
    k_j, err, carry, states, ends, weights, own, place, closes, end_place, last, TYPE: tl.constexpr, dims: tl.constexpr,
    INNER: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """A chunk in place of what enters it in ``carry``, which goes to ``states``; at a segment's end to ``ends`` too."""
    up: tl.constexpr = dims.SK * dims.SE
    down: tl.constexpr = dims.SE * dims.SV
    rows = -load_line(weights.last + place * INNER, last + 1, BB)[:, None]
    keep = 1.0
    if weights.state is not None:
        keep = tl.load(weights.state + place * INNER + last)
    for e in range(0, dims.SE, dims.EB):
        U = load_up(carry.up + own * up, e, dims)
        W = load_down(carry.down + own * down, e, dims)
        leave(states, place, U, W, e, dims)
        z, slope = gelu_slope_as(product(k_j, U, TYPE, "ieee"), TYPE)
        back = product(err, tl.trans(W), TYPE, "ieee") * slope
        U *= keep
        W *= keep
        if carry.s_up is not None:
            S_up = load_up(carry.s_up + own * up, e, dims)
            S_down = load_down(carry.s_down + own * down, e, dims)
            leave(Layers(states.s_up, states.s_down, None, None), place, S_up, S_down, e, dims)
            moved = tl.load(weights.momentum + place * INNER + last)
            U -= moved * S_up
            W -= moved * S_down
            decay = tl.load(weights.decay + place)
            strength = load_line(weights.products + place * INNER, last + 1, BB)[:, None]
            S_up = add_product(tl.trans(k_j), strength * back, S_up * decay, TYPE, "ieee")
            S_down = add_product(tl.trans(z), strength * err, S_down * decay, TYPE, "ieee")
            store_up(carry.s_up + own * up, e, S_up, dims)
            store_down(carry.s_down + own * down, e, S_down, dims)
        U = add_product(tl.trans(k_j), rows * back, U, TYPE, "ieee")
        W = add_product(tl.trans(z), rows * err, W, TYPE, "ieee")
        leave(carry, own, U, W, e, dims)
        if ends is not None:
            if closes:
                leave(ends, end_place, U, W, e, dims)


@triton.jit(do_not_specialize=["T", "H", "N", "P"])
def rewrite_lanes_kernel(
    k, v, initial, known, carry, states, ends, errors, weights, chunks, seg_last, T, H, N, P, ADDS: tl.constexpr,
    dims: tl.constexpr, INNER: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """One program: a lane of a head."""
    TYPE: tl.constexpr = k.dtype.element_ty
    up: tl.constexpr = dims.SK * dims.SE
    down: tl.constexpr = dims.SE * dims.SV
    bh = tl.program_id(1).to(tl.int64)
    own = bh * tl.num_programs(0) + tl.program_id(0)
    k += (bh // H * T * H + bh % H) * dims.DK
    v += (bh // H * T * H + bh % H) * dims.DV
    first = tl.load(chunks.lanes + tl.program_id(0) * 2)
    open_lane(initial, known, carry, chunks, first, own, bh, H, N, dims)
    # One stage: no load of a state may go ahead of the store before it.
    for chunk in tl.range(first, tl.load(chunks.lanes + tl.program_id(0) * 2 + 1), num_stages=1):
        # What is read now other threads may have written.
        tl.debug_barrier()
        place = bh * P + chunk
        j0 = tl.load(chunks.begin + chunk)
        stop = tl.load(chunks.end + chunk)
        k_j = load_rows(k, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
        v_j = load_rows(v, j0, stop, H * dims.DV, 0, dims.DV, BB, dims.PV)
        err = residuals(k_j, v_j, carry.up + own * up, carry.down + own * down, TYPE, ADDS, dims)
        # What was read now is overwritten.
        tl.debug_barrier()
        store_rows(errors + bh * T * dims.SV, err, j0, stop, dims.SV, 0, dims.SV, BB, dims.PV)
        segment = tl.load(chunks.segment + chunk)
        closes = tl.load(seg_last + segment) == chunk
        write_chunk(
            k_j, err, carry, states, ends, weights, own, place, closes, bh * N + segment, stop - j0 - 1, TYPE, dims,
            INNER, BB,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "N"])
def key_means_kernel(k, seg_begin, seg_end, means, T, H, N, dims: tl.constexpr, BT: tl.constexpr):
    """One program: the mean key of a segment of a head."""
    PK: tl.constexpr = dims.PK
    segment = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    begin = tl.load(seg_begin + segment)
    end = tl.load(seg_end + segment)
    k += (bh // H * T * H + bh % H) * dims.DK
    total = tl.zeros([PK], tl.float32)
    for t0 in range(begin, end, BT):
        total += tl.sum(load_rows(k, t0, end, H * dims.DK, 0, dims.DK, BT, dims.PK).to(tl.float32), 0)
    cols = tl.arange(0, dims.PK)
    tl.store(means + (bh * N + segment) * dims.SK + cols, total / (end - begin), mask=cols < dims.SK)


def key_means(k: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Mean keys of segments ``[B*H, N, SK]``, float32; k [B, T, H, DK]."""
    (B, T, H, _), N = k.shape, tables.seg_begin.shape[0]
    means = k.new_empty((B * H, N, SK), dtype=torch.float32)
    key_means_kernel[(N, B * H)](
        k=k, seg_begin=tables.seg_begin, seg_end=tables.seg_end, means=means, T=T, H=H, N=N,
        dims=Dims(DK, DK, PK, PK, SK, SK, 16, 16), BT=32, num_warps=4,
    )  # fmt: skip
    return means


def _layers(like: torch.Tensor, count: int, SK: int, SV: int, SE: int, momentum: bool, dtype: torch.dtype) -> Layers:
    """Room for ``count`` states, and their momentum."""
    up, down = (like.new_empty((count, *shape), dtype=dtype) for shape in ((SK, SE), (SE, SV)))
    return Layers(up, down, *((torch.empty_like(up), torch.empty_like(down)) if momentum else ()))


def deep_replay(
    k: torch.Tensor, v: torch.Tensor, initial: Layers, known: Layers | None, weights: Weights, lanes: torch.Tensor,
    tables: Tables, adds: bool, ended: bool,
) -> tuple[Layers, torch.Tensor | None, Layers | None]:  # fmt: skip
    """The states that enter the inner chunks, their errors, and end states.

    Args:
        k [B, T, H, DK], v [B, T, H, DV]: of one dtype.
        initial: up [H, SK, SE], down [H, SE, SV], float32.
        known: end states [B*H * N, ..], float32, where they are known.
        weights: of :class:`Weights`.
        lanes [L, 2]: the first chunk of each lane, and one past its last.
        adds: whether the memory adds its input.
        ended: whether end states are wanted.

    Returns:
        Layers [B*H * P, ..] in k's dtype; errors [B*H, T, SV] in k's dtype, None where they are -v; Layers
        [B*H * N, ..], float32, or None.
    """
    B, T, H, _ = k.shape
    P, N, L = tables.begin.shape[0], tables.seg_begin.shape[0], lanes.shape[0]
    momentum = weights.momentum is not None
    states = _layers(k, B * H * P, SK, SV, SE, momentum, k.dtype)
    ends = None if not ended else _layers(k, B * H * N, SK, SV, SE, False, torch.float32)
    chunks = Chunks(tables.begin, tables.end, tables.segment, tables.entering, lanes)
    bb, errors = max(16, triton.next_power_of_2(INNER)), None
    carry = _layers(k, B * H * L, SK, SV, SE, momentum, torch.float32)
    errors = k.new_empty((B * H, T, SV))
    rewrite_lanes_kernel[(L, B * H)](
        k=k, v=v, initial=initial, known=known, carry=carry, states=states, ends=ends, errors=errors, weights=weights,
        chunks=chunks, seg_last=tables.seg_last, T=T, H=H, N=N, P=P, ADDS=adds,
        dims=Dims(DK, DV, PK, PV, SK, SV, SE, EB), INNER=INNER, BB=bb, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return states, errors, ends
