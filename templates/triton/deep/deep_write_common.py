"""What the writes of deep memories leave, and what their templates share. No flag: copied as it stands.

A lane is what must go in sequence: a segment where states start afresh, a sequence where they are carried over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .deep_common import Dims, Spans, Tables, load_rows, store_block


class Written(NamedTuple):
    """What the writes leave, N segments and PARTS of the hidden units; None what is not wanted.

    Attributes:
        up, down [B*H, N, SK, SE], [B*H, N, SE, SV]: end states, float32.
        up_operand, down_operand: the same in k's dtype, as operands of products.
        means [B*H, N, SK]: mean keys, float32.
        partials [PARTS, B, T, H, DV]: parts of the online reads, float32, without the input that a memory adds.
        hidden [B*H, T, SE]: where parameters are mixed, x U_t of the online memory in k's dtype.
        z [B*H, T, SE], error [B*H, T, SV]: where parameters are mixed, rows of the second layer's writes in k's dtype;
            the errors negative, and left out where they are v.
    """

    up: torch.Tensor | None
    down: torch.Tensor | None
    up_operand: torch.Tensor | None
    down_operand: torch.Tensor | None
    means: torch.Tensor | None = None
    partials: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    z: torch.Tensor | None = None
    error: torch.Tensor | None = None


@triton.jit
def segments_of(spans, lane):
    """The first segment of a lane, and one past its last."""
    if spans.lane_begin is not None:
        return tl.load(spans.lane_begin + lane), tl.load(spans.lane_end + lane)
    else:
        return lane, lane + 1


@triton.jit
def leave(made, up, down, place, column, dims: tl.constexpr, EB: tl.constexpr):
    """Store a block of EB hidden units of the end state of the segment at ``place``."""
    SIZE_UP: tl.constexpr = dims.SK * dims.SE
    SIZE_DOWN: tl.constexpr = dims.SE * dims.SV
    if made.up is not None:
        store_block(made.up + place * SIZE_UP, up, 0, column, dims.SK, dims.SE, dims.PK, EB)
        store_block(made.down + place * SIZE_DOWN, down, column, 0, dims.SE, dims.SV, EB, dims.PV)
    if made.up_operand is not None:
        store_block(made.up_operand + place * SIZE_UP, up, 0, column, dims.SK, dims.SE, dims.PK, EB)
        store_block(made.down_operand + place * SIZE_DOWN, down, column, 0, dims.SE, dims.SV, EB, dims.PV)


@triton.jit(do_not_specialize=["T", "H", "N"])
def key_means_kernel(k, seg_begin, seg_end, means, T, H, N, dims: tl.constexpr, BT: tl.constexpr):
    """One program: the mean key of a segment of a head."""
    segment = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    begin = tl.load(seg_begin + segment)
    end = tl.load(seg_end + segment)
    k += (bh // H * T * H + bh % H) * dims.DK
    PK: tl.constexpr = dims.PK
    total = tl.zeros([PK], tl.float32)
    for t0 in range(begin, end, BT):
        total += tl.sum(load_rows(k, t0, end, H * dims.DK, 0, dims.DK, BT, dims.PK).to(tl.float32), 0)
    cols = tl.arange(0, PK)
    tl.store(means + (bh * N + segment) * dims.SK + cols, total / (end - begin), mask=cols < dims.SK)


def lanes_of(tables: Tables, independent: bool) -> tuple[int, Spans]:
    """The number of lanes, and where they find their segments."""
    spans = Spans(tables.seg_begin, tables.seg_end)
    if independent:
        return tables.seg_begin.shape[0], spans
    return tables.seq_begin.shape[0], spans._replace(lane_begin=tables.seq_begin, lane_end=tables.seq_end)


def room_for(k: torch.Tensor, tables: Tables, dims: Dims, states: bool, operands: bool, means: bool) -> Written:
    """Room for end states in float32 and as operands in k's dtype; and the mean keys, made."""
    (B, T, H, _), N = k.shape, tables.seg_begin.shape[0]
    layers, float32 = ((B * H, N, dims.SK, dims.SE), (B * H, N, dims.SE, dims.SV)), torch.float32
    up, down = (k.new_empty(layer, dtype=float32) if states else None for layer in layers)
    up_operand, down_operand = (k.new_empty(layer) if operands else None for layer in layers)
    made = Written(up, down, up_operand, down_operand)
    if not means:
        return made
    made = made._replace(means=k.new_empty((B * H, N, dims.SK), dtype=float32))
    key_means_kernel[(N, B * H)](
        k=k, seg_begin=tables.seg_begin, seg_end=tables.seg_end, means=made.means, T=T, H=H, N=N, dims=dims,
        BT=min(128, 8192 // dims.PK), num_warps=4,
    )  # fmt: skip
    return made


def as_operands(made: Written) -> Written:
    """The end states themselves are operands where these have no room of their own."""
    if made.up_operand is not None:
        return made
    return made._replace(up_operand=made.up, down_operand=made.down)
