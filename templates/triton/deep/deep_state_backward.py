"""Gradients of cached deep states, by states (Eq. 6-17): a program owns a block of hidden units of one state.

    dU_i = sum_t gamma_t^(i) x_t^T dH_t        dW_i = sum_t gamma_t^(i) gelu(H_t)^T dy_t        t in later segments

with H = x U_i and dH as in :mod:`deep_read_backward`, computed again; where parameters are mixed, z and dh of the
mixture stand for gelu(H) and dH.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .deep_backward_common import (
    Dims,
    Layers,
    Saved,
    Shares,
    Tables,
    add_product,
    gate_of,
    load_down,
    load_up,
    product,
    store_down,
    store_up,
)
from .deep_common import gelu_slope_as, load_rows


@triton.jit
def add_tokens(
    dU, dW, q_t, dy_t, share, U, W, saved, bh, t0, high, e, scale, T, TYPE: tl.constexpr, MIXES: tl.constexpr,
    PRECISION: tl.constexpr, dims: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Both gradients with those of BT tokens; that of U without scale."""
    if MIXES:
        z = load_rows(saved.z + bh * T * dims.SE, t0, high, dims.SE, e, dims.SE, BT, dims.EB)
        dh = load_rows(saved.dhidden + bh * T * dims.SE, t0, high, dims.SE, e, dims.SE, BT, dims.EB)
    else:
        z, slope = gelu_slope_as(product(q_t, U, TYPE, PRECISION) * scale, TYPE)
        dh = product(dy_t, tl.trans(W), TYPE, PRECISION) * slope
    dU = add_product(tl.trans(q_t), share[:, None] * dh, dU, TYPE, PRECISION)
    dW = add_product(tl.trans(share[:, None] * z), dy_t, dW, TYPE, PRECISION)
    return dU, dW


@triton.jit(do_not_specialize=["T", "H", "N"])
def deep_dstate_kernel(
    q, dy, ends, shares, saved, dends, seg_end, seg_past_end, scale, T, H, N,
    SPARSE: tl.constexpr, MIXES: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One program: EB hidden units of a segment's state, of a head."""
    PK: tl.constexpr = dims.PK
    EB: tl.constexpr = dims.EB
    PV: tl.constexpr = dims.PV
    TYPE: tl.constexpr = q.dtype.element_ty
    BLOCKS: tl.constexpr = (dims.SE + dims.EB - 1) // dims.EB
    # The first segments, which most tokens read, come first.
    e = tl.program_id(0) % BLOCKS * dims.EB
    i = tl.program_id(0) // BLOCKS
    bh = tl.program_id(1).to(tl.int64)
    token = bh // H * T * H + bh % H
    low = tl.load(seg_end + i)
    high = tl.load(seg_end + tl.load(seg_past_end + i) - 1)
    place_up = (bh * N + i) * (dims.SK * dims.SE)
    place_down = (bh * N + i) * (dims.SE * dims.SV)
    U = load_up(ends.up + place_up, e, dims)
    W = load_down(ends.down + place_down, e, dims)
    dU = tl.zeros([PK, EB], tl.float32)
    dW = tl.zeros([EB, PV], tl.float32)
    for t0 in range(low, high, BT):
        t = t0 + tl.arange(0, BT)
        share = gate_of(shares, bh, i, t, t < high, T, N)
        q_t = load_rows(q + token * dims.DK, t0, high, H * dims.DK, 0, dims.DK, BT, dims.PK)
        dy_t = load_rows(dy + token * dims.DV, t0, high, H * dims.DV, 0, dims.DV, BT, dims.PV)
        if SPARSE:
            # What no token of the tile has chosen has no gradient.
            if tl.max(share, 0) > 0.0:
                dU, dW = add_tokens(
                    dU, dW, q_t, dy_t, share, U, W, saved, bh, t0, high, e, scale, T, TYPE, MIXES, PRECISION, dims, BT
                )
        else:
            dU, dW = add_tokens(
                dU, dW, q_t, dy_t, share, U, W, saved, bh, t0, high, e, scale, T, TYPE, MIXES, PRECISION, dims, BT
            )
    store_up(dends.up + place_up, e, dU * scale, dims)
    store_down(dends.down + place_down, e, dW, dims)


def deep_state_backward(
    q: torch.Tensor,
    dy: torch.Tensor,
    ends: Layers,
    shares: Shares,
    saved: Saved,
    tables: Tables,
    scale: float,
    SPARSE: bool, MIXES: bool, PRECISION: str, DK: int, DV: int, PK: int, PV: int, SK: int, SV: int, SE: int,
    BT: int, EB: int, num_warps: int, num_stages: int,
) -> Layers:  # fmt: skip
    """The gradients of end states, float32, in their shapes; arguments as those of :mod:`deep_read_backward`."""
    _, T, H, _ = q.shape
    heads, N = q.shape[0] * H, tables.seg_begin.shape[0]
    eb = min(EB, max(16, triton.next_power_of_2(SE)))
    dends = Layers(*(torch.empty_like(x, dtype=torch.float32) for x in (ends.up, ends.down)))
    deep_dstate_kernel[(triton.cdiv(SE, eb) * N, heads)](
        q=q, dy=dy, ends=ends, shares=shares, saved=saved._replace(errors=None), dends=dends, seg_end=tables.seg_end,
        seg_past_end=tables.seg_past_end, scale=scale, T=T, H=H, N=N, SPARSE=SPARSE, MIXES=MIXES,
        PRECISION=PRECISION, dims=Dims(DK, DV, PK, PV, SK, SV, SE, eb), BT=BT, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return dends
