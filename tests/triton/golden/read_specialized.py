"""The read of a linear Memory Caching layer under grm and soup, by specialised warps of sm_90 (Eq. 8-10, 14-15).

    y_t = scale [ gamma_t^(s) q_t M_t + sum_{i < s} gamma_t^(i) q_t M^(i) ]

It computes what :mod:`read_forward` does from precomputed gates, for 128 key and 128 value columns of 16 bits. One warp
of a program copies (TMA): q, then the keys and values of the piece, then the states, 128 x 128 numbers at a time,
through a ring of stages in shared memory. Two groups of four warps read, each 128 of the tile's 256 tokens: the
accumulators stay where products are added up, and are multiplied from segment to segment.

    A_i = A_{i-1} exp(g_{i-1} - g_i) + q_t M^(i),   g_i = max(log gamma_t^(i), FLOOR),   y_t = scale A exp(g)

Triton's interpreter has no Gluon: nothing but a GPU can tell whether the compiled kernel is right.
"""

from __future__ import annotations

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .common import Gates, States, Tables

num_stages = 2

# Triton 3.9 calls it async_load.
copy_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
SIDE = gl.constexpr(128)
"""Columns of keys and of values, rows of a stage, and tokens of a group of warps."""
FLOOR = gl.constexpr(-40.0)
"""At most e^40 between two gates: accumulators stay finite where reads are below 1e21, and no gate is off by 5e-18."""


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    """The next stage of the ring, and the parity of its barriers."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _fill(x, row, column, ring, stage, phase, STAGES: gl.constexpr):
    """Copy SIDE rows of ``x`` into a stage once both readers have left it."""
    tiles, full, empty = ring
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), SIDE * SIDE * 2)
    copy_async(x, [row, column], full.index(stage), tiles.index(stage))
    return _advance(stage, phase, STAGES)


@gluon.jit
def _copy(q, k, v, states, seg_last, queries, ring, span, T, H, P, STAGES: gl.constexpr):
    """What the copying warp does."""
    t0, start, stop, enters, first, s = span
    bh = gl.program_id(1)
    row = bh // H * T
    column = bh % H * SIDE
    q_tile, q_full = queries
    mbarrier.expect(q_full, 2 * SIDE * SIDE * 2)
    for part in gl.static_range(4):
        copy_async(q, [row + t0 + part * (SIDE // 2), column], q_full, q_tile.index(part))
    stage = 0
    phase = 0
    for j in range(start, stop, SIDE):
        stage, phase = _fill(k, row + j, column, ring, stage, phase, STAGES)
        stage, phase = _fill(v, row + j, column, ring, stage, phase, STAGES)
    if enters >= 0:
        stage, phase = _fill(states, (bh * P + enters) * SIDE, 0, ring, stage, phase, STAGES)
    for i in range(first, s):
        last = i
        if seg_last is not None:
            last = gl.load(seg_last + i)
        stage, phase = _fill(states, (bh * P + last) * SIDE, 0, ring, stage, phase, STAGES)


@gluon.jit
def _write(q, k, v, acc, t, j0, layout: gl.constexpr):
    """acc + (mask * q k^T) v: what tokens from ``j0`` on have written into the memory that tokens ``t`` read."""
    scores = warpgroup_mma(q, k.permute([1, 0]), gl.zeros([SIDE // 2, SIDE], gl.float32, layout), use_acc=False)
    j = gl.arange(0, SIDE, gl.SliceLayout(0, layout))
    # t >= j0 + j. In two parts, of which one is the same number in every thread: 128 columns would fill the registers.
    seen = (t - j0)[:, None] - (j & 6)[None, :] >= (j & (SIDE - 7))[None, :]
    weights = gl.where(seen, scores, 0.0).to(q.dtype)
    return warpgroup_mma(gl.convert_layout(weights, gl.DotOperandLayout(0, layout, 2)), v, acc)


@gluon.jit
def _online(q_a, q_b, t_a, t_b, ring, span, layout: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr):
    """The read of the online memory: what the piece has written up to t, and the state that entered it."""
    t0, start, stop, enters, _, _ = span
    tiles, full, empty = ring
    acc_a = gl.zeros([SIDE // 2, SIDE], gl.float32, layout)
    acc_b = gl.zeros([SIDE // 2, SIDE], gl.float32, layout)
    stage = 0
    phase = 0
    for j in range(start, stop, SIDE):
        keys = stage
        mbarrier.wait(full.index(keys), phase)
        stage, phase = _advance(stage, phase, STAGES)
        mbarrier.wait(full.index(stage), phase)
        if j < t0 + (GROUP + 1) * SIDE:
            acc_a = _write(q_a, tiles.index(keys), tiles.index(stage), acc_a, t_a, j, layout)
            acc_b = _write(q_b, tiles.index(keys), tiles.index(stage), acc_b, t_b, j, layout)
        mbarrier.arrive(empty.index(keys), count=1)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _advance(stage, phase, STAGES)
    if enters >= 0:
        mbarrier.wait(full.index(stage), phase)
        acc_a = warpgroup_mma(q_a, tiles.index(stage), acc_a)
        acc_b = warpgroup_mma(q_b, tiles.index(stage), acc_b)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _advance(stage, phase, STAGES)
    return acc_a, acc_b, stage, phase


@gluon.jit
def _level(logits, sums, t, stop):
    """g of tokens ``t`` for the segment whose ``logits`` these are."""
    g = gl.load(logits + t, mask=t < stop, other=0.0) - sums
    return gl.maximum(g, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def _store(y, acc, t, stop, stride, layout: gl.constexpr):
    columns = gl.arange(0, SIDE, gl.SliceLayout(0, layout))
    out = y + t.to(gl.int64)[:, None] * stride + columns[None, :]
    gl.store(out, acc.to(y.dtype.element_ty), mask=(t < stop)[:, None])


@gluon.jit
def _read(logits, lse, y, queries, ring, span, scale, T, H, N, STAGES: gl.constexpr, GROUP: gl.constexpr):
    """What a group of four warps does: 128 tokens, in two halves, since an instruction takes 64 rows."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    t0, _, stop, _, first, s = span
    q_tile, q_full = queries
    tiles, full, empty = ring
    t_a = t0 + GROUP * SIDE + gl.arange(0, SIDE // 2, gl.SliceLayout(1, layout))
    t_b = t_a + SIDE // 2
    q_a = q_tile.index(2 * GROUP)
    q_b = q_tile.index(2 * GROUP + 1)
    mbarrier.wait(q_full, 0)
    acc_a, acc_b, stage, phase = _online(q_a, q_b, t_a, t_b, ring, span, layout, STAGES, GROUP)

    # The cached ones. Where the tile ends before its last token, rows hold what is not stored.
    bh = gl.program_id(1).to(gl.int64)
    logits += bh * N * T
    lse += bh * T
    sum_a = gl.load(lse + t_a, mask=t_a < stop, other=0.0)
    sum_b = gl.load(lse + t_b, mask=t_b < stop, other=0.0)
    own = logits + s.to(gl.int64) * T
    g_a = _level(own, sum_a, t_a, stop)
    g_b = _level(own, sum_b, t_b, stop)
    row = logits + first.to(gl.int64) * T
    next_a = _level(row, sum_a, t_a, stop)
    next_b = _level(row, sum_b, t_b, stop)
    for _ in range(first, s):
        mbarrier.wait(full.index(stage), phase)
        acc_a *= gl.exp(g_a - next_a)[:, None]
        read_a = warpgroup_mma(q_a, tiles.index(stage), acc_a, is_async=True)
        acc_b *= gl.exp(g_b - next_b)[:, None]
        read_b = warpgroup_mma(q_b, tiles.index(stage), acc_b, is_async=True)
        g_a = next_a
        g_b = next_b
        # After the last cached segment this is the own one's: loaded for nothing.
        row += T
        next_a = _level(row, sum_a, t_a, stop)
        next_b = _level(row, sum_b, t_b, stop)
        acc_a, acc_b = warpgroup_mma_wait(0, [read_a, read_b])
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _advance(stage, phase, STAGES)
    y += (bh // H * T * H + bh % H) * SIDE
    _store(y, acc_a * (gl.exp(g_a) * scale)[:, None], t_a, stop, H * SIDE, layout)
    _store(y, acc_b * (gl.exp(g_b) * scale)[:, None], t_b, stop, H * SIDE, layout)


@gluon.jit(do_not_specialize=["T", "H", "N", "P"])
def read_specialized_kernel(
    q,
    k,
    v,
    states,
    logits,
    lse,
    begin,
    end,
    segment,
    entering,
    seg_first,
    seg_last,
    tiles,
    y,
    scale,
    T,
    H,
    N,
    P,
    STAGES: gl.constexpr,
):
    """One program: 256 tokens, one head; q, k, v and states are descriptors of tensors."""
    tile = tiles + gl.program_id(0) * 2
    piece = gl.load(tile)
    t0 = gl.load(tile + 1)
    s = gl.load(segment + piece)
    stop = gl.minimum(t0 + 2 * SIDE, gl.load(end + piece))
    span = (t0, gl.load(begin + piece), stop, gl.load(entering + piece), gl.load(seg_first + s), s)

    q_tile = gl.allocate_shared_memory(q.dtype, [4, SIDE // 2, SIDE], q.layout)
    stages = gl.allocate_shared_memory(k.dtype, [STAGES, SIDE, SIDE], k.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(q_full, count=1)
    # Copies are another proxy: they must find the barriers initialised.
    fence_async_shared()

    queries = (q_tile, q_full)
    ring = (stages, full, empty)
    gl.warp_specialize(
        [
            (_read, (logits, lse, y, queries, ring, span, scale, T, H, N, STAGES, 0)),
            (_read, (logits, lse, y, queries, ring, span, scale, T, H, N, STAGES, 1)),
            (_copy, (q, k, v, states, seg_last, queries, ring, span, T, H, P, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of blocks of ``rows`` x 128 of a matrix; TMA takes addresses that are multiples of 16 bytes."""
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, SIDE.value], layout)


def read_specialized(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    states: States,
    gates: Gates,
    tables: Tables,
    tiles: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """y ``[B, T, H, 128]``, of q's dtype.

    Args:
        q, k, v [B, T, H, 128]: of one dtype of 16 bits. Values of the 127 tokens after a piece are multiplied by 0, so
            that they must be finite.
        states: of :mod:`segment_states`, the operands of which are read; gates: of :mod:`gates`.
        tiles: of 256 tokens.
    """
    B, T, H, _ = q.shape
    N, P = tables.seg_first.shape[0], tables.begin.shape[0]
    y = torch.empty_like(v)
    read_specialized_kernel[(tiles.shape[0], B * H)](
        q=_descriptor(q.flatten(2).flatten(0, 1), 64), k=_descriptor(k.flatten(2).flatten(0, 1), 128),
        v=_descriptor(v.flatten(2).flatten(0, 1), 128), states=_descriptor(states.operand.flatten(0, 2), 128),
        logits=gates.logits, lse=gates.lse, begin=tables.begin, end=tables.end, segment=tables.segment,
        entering=tables.entering, seg_first=tables.seg_first, seg_last=tables.seg_last if P > N else None, tiles=tiles,
        y=y, scale=scale, T=T, H=H, N=N, P=P, STAGES=num_stages, num_warps=4,
    )  # fmt: skip
    return y
