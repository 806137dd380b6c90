"""The writes of a deep memory once more: the state that enters every inner chunk (Eq. 30-31, 34-36).

With all gradients of a chunk at its first state, K, V its keys and values, U, W the layers and S_U, S_W their momentum:

    H = K U    Z = gelu(H)    err = -V (dla) or 2 (Z W (+ K) - V) (titans)    back = (err W^T) gelu'(H)
    U' = c U - d S_U - K^T (c_j back_j)        S_U' = p S_U + K^T (s_j back_j)
    W' = c W - d S_W - Z^T (c_j err_j)         S_W' = p S_W + Z^T (s_j err_j)

A program walks through a lane (a segment; under checkpoint a sequence), EB hidden units at a time: only the sum Z W of
titans goes over all of them. States are in memory, where the chunk's gradients find them.
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
from .deep_common import gelu_slope, load_rows, store_rows


@triton.jit
def residuals(k_j, v_j, up, down, TYPE: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr):
    """``[BB, PV]``: 2 (M(k) - v) of a chunk's tokens, over all hidden units."""
    PV: tl.constexpr = dims.PV
    o = tl.zeros([k_j.shape[0], PV], tl.float32)
    for e in range(0, dims.SE, dims.EB):
        z, _ = gelu_slope(product(k_j, load_up(up, e, dims), TYPE, PRECISION))
        o = add_product(z, load_down(down, e, dims), o, TYPE, PRECISION)
    if ADDS:
        o += k_j.to(tl.float32)
    return 2.0 * (o - v_j.to(tl.float32))


@triton.jit
def open_lane(initial, states, h, place, dims: tl.constexpr):
    """The state that a lane starts from, of head h, and no momentum."""
    PK: tl.constexpr = dims.PK
    EB: tl.constexpr = dims.EB
    PV: tl.constexpr = dims.PV
    up: tl.constexpr = dims.SK * dims.SE
    down: tl.constexpr = dims.SE * dims.SV
    for e in range(0, dims.SE, dims.EB):
        store_up(states.up + place * up, e, load_up(initial.up + h * up, e, dims), dims)
        store_down(states.down + place * down, e, load_down(initial.down + h * down, e, dims), dims)
        if states.s_up is not None:
            store_up(states.s_up + place * up, e, tl.zeros([PK, EB], tl.float32), dims)
            store_down(states.s_down + place * down, e, tl.zeros([EB, PV], tl.float32), dims)


@triton.jit
def write_chunk(
    k_j, err, states, ends, weights, place, goes_on, closes, end_place, last,
    TYPE: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, INNER: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """What a chunk leaves: to the next one of its lane, and at a segment's end to ``ends``, where that is not None."""
    up: tl.constexpr = dims.SK * dims.SE
    down: tl.constexpr = dims.SE * dims.SV
    rows = -load_line(weights.rows + (place * INNER + last) * INNER, last + 1, BB)[:, None]
    keep = 1.0
    if weights.state is not None:
        keep = tl.load(weights.state + place * INNER + last)
    for e in range(0, dims.SE, dims.EB):
        U = load_up(states.up + place * up, e, dims)
        W = load_down(states.down + place * down, e, dims)
        z, slope = gelu_slope(product(k_j, U, TYPE, PRECISION))
        back = product(err, tl.trans(W), TYPE, PRECISION) * slope
        U_next = add_product(tl.trans(k_j), rows * back, U * keep, TYPE, PRECISION)
        W_next = add_product(tl.trans(z), rows * err, W * keep, TYPE, PRECISION)
        if states.s_up is not None:
            S_up = load_up(states.s_up + place * up, e, dims)
            S_down = load_down(states.s_down + place * down, e, dims)
            moved = tl.load(weights.momentum + place * INNER + last)
            U_next -= moved * S_up
            W_next -= moved * S_down
            if goes_on:
                decay = tl.load(weights.decay + place)
                strength = load_line(weights.products + place * INNER, last + 1, BB)[:, None]
                S_up = add_product(tl.trans(k_j), strength * back, S_up * decay, TYPE, PRECISION)
                S_down = add_product(tl.trans(z), strength * err, S_down * decay, TYPE, PRECISION)
                store_up(states.s_up + (place + 1) * up, e, S_up, dims)
                store_down(states.s_down + (place + 1) * down, e, S_down, dims)
        if goes_on:
            store_up(states.up + (place + 1) * up, e, U_next, dims)
            store_down(states.down + (place + 1) * down, e, W_next, dims)
        if ends is not None:
            if closes:
                store_up(ends.up + end_place * up, e, U_next, dims)
                store_down(ends.down + end_place * down, e, W_next, dims)


@triton.jit(do_not_specialize=["T", "H", "N", "P"])
def rewrite_kernel(
    k, v, initial, states, ends, errors, weights, chunks, seg_last, T, H, N, P,
    SQUARED: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, INNER: tl.constexpr,
    BB: tl.constexpr,
):  # fmt: skip
    """One program: a lane of a head."""
    TYPE: tl.constexpr = k.dtype.element_ty
    up: tl.constexpr = dims.SK * dims.SE
    down: tl.constexpr = dims.SE * dims.SV
    bh = tl.program_id(1).to(tl.int64)
    k += (bh // H * T * H + bh % H) * dims.DK
    v += (bh // H * T * H + bh % H) * dims.DV
    first = tl.load(chunks.lanes + tl.program_id(0) * 2)
    past = tl.load(chunks.lanes + tl.program_id(0) * 2 + 1)
    open_lane(initial, states, bh % H, bh * P + first, dims)
    # One stage: no load of a state may go ahead of the store before it.
    for chunk in tl.range(first, past, num_stages=1):
        # What is read now other threads may have written.
        tl.debug_barrier()
        place = bh * P + chunk
        j0 = tl.load(chunks.begin + chunk)
        stop = tl.load(chunks.end + chunk)
        k_j = load_rows(k, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
        v_j = load_rows(v, j0, stop, H * dims.DV, 0, dims.DV, BB, dims.PV)
        if SQUARED:
            err = residuals(k_j, v_j, states.up + place * up, states.down + place * down, TYPE, ADDS, PRECISION, dims)
            store_rows(errors + bh * T * dims.SV, err, j0, stop, dims.SV, 0, dims.SV, BB, dims.PV)
        else:
            err = -v_j.to(tl.float32)
        segment = tl.load(chunks.segment + chunk)
        closes = tl.load(seg_last + segment) == chunk
        write_chunk(
            k_j, err, states, ends, weights, place, chunk + 1 < past, closes, bh * N + segment, stop - j0 - 1,
            TYPE, PRECISION, dims, INNER, BB,
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


def key_means(k: torch.Tensor, tables: Tables, DK: int, PK: int, SK: int) -> torch.Tensor:
    """Mean keys of segments ``[B*H, N, SK]``, float32; k [B, T, H, DK]."""
    (B, T, H, _), N = k.shape, tables.seg_begin.shape[0]
    means = k.new_empty((B * H, N, SK), dtype=torch.float32)
    key_means_kernel[(N, B * H)](
        k=k, seg_begin=tables.seg_begin, seg_end=tables.seg_end, means=means, T=T, H=H, N=N,
        dims=Dims(DK, DK, PK, PK, SK, SK, 16, 16), BT=32, num_warps=4,
    )  # fmt: skip
    return means


def deep_replay(
    k: torch.Tensor,
    v: torch.Tensor,
    initial: Layers,
    weights: Weights,
    lanes: torch.Tensor,
    tables: Tables,
    adds: bool,
    ended: bool,
    SQUARED: bool, PRECISION: str, DK: int, DV: int, PK: int, PV: int, SK: int, SV: int, SE: int, INNER: int,
    EB: int, num_warps: int, num_stages: int,
) -> tuple[Layers, torch.Tensor | None, Layers | None]:  # fmt: skip
    """The states that enter the inner chunks their errors, and end states.

    Args:
        k [B, T, H, DK], v [B, T, H, DV]: of one dtype.
        initial: up [H, SK, SE], down [H, SE, SV].
        weights: of :class:`Weights`.
        lanes [L, 2]: the first chunk of each lane, and one past its last.
        adds: whether the memory adds its input.
        ended: whether end states of segments are wanted.

    Returns:
        Layers [heads, P, ..]; errors [heads, T, SV], None where they are -v; Layers [heads, N, ..] or None.
    """
    B, T, H, _ = k.shape
    heads, P, N = B * H, tables.begin.shape[0], tables.seg_begin.shape[0]

    def layers(count: int, momentum: bool) -> Layers:
        up, down = (k.new_empty((heads, count, *shape), dtype=torch.float32) for shape in ((SK, SE), (SE, SV)))
        return Layers(up, down, *((torch.empty_like(up), torch.empty_like(down)) if momentum else ()))

    states = layers(P, weights.momentum is not None)
    ends = layers(N, False) if ended else None
    errors = k.new_empty((heads, T, SV), dtype=torch.float32) if SQUARED else None
    rewrite_kernel[(lanes.shape[0], heads)](
        k=k, v=v, initial=initial, states=states, ends=ends, errors=errors, weights=weights,
        chunks=Chunks(tables.begin, tables.end, tables.segment, lanes=lanes), seg_last=tables.seg_last, T=T,
        H=H, N=N, P=P, SQUARED=SQUARED, ADDS=adds, PRECISION=PRECISION, dims=Dims(DK, DV, PK, PV, SK, SV, SE, EB),
        INNER=INNER, BB=max(16, triton.next_power_of_2(INNER)), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return states, errors, ends
