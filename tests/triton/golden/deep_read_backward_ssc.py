"""Gradients of the read of cached states to q and to the gates, by tokens (Eq. 6-17); nothing [T, N E] is stored.

With x = scale q, for every cached state (U_i, W_i) that a token reads:

    H = x U_i    D = dy W_i^T    dH = D gelu'(H)    dgamma_i = <gelu(H), D>    dx += gamma_i dH U_i^T

Where parameters are mixed (soup, mean), z and dh are those of the mixture, and

    h = gamma_s h_s + sum_i gamma_i x U_i    dz = gamma_s dz_s + sum_i gamma_i dy W_i^T    dh = dz gelu'(h)
    dgamma_i = <z, dy W_i^T> + <x U_i, dh>   dx += gamma_i dh U_i^T

What a memory adds of its input is the same in all states: it is left out of the gates' gradients, which a softmax takes
differences of.
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
)
from .deep_common import gelu_slope_as, load_rows, store_rows

DK = 64
PK = 64
SK = 64
DV = 64
PV = 64
SV = 64
SE = 256
BT = 128
EB = 64
num_stages = 2
num_warps = 8


@triton.jit(do_not_specialize=["T", "H", "N"])
def mix_backward_kernel(
    q, dy, ends, shares, saved, own, seg_first, segment, end, tiles, scale, T, H, N, dims: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens and EB hidden units of a head; ``saved`` comes as what the online memory gives."""
    EB: tl.constexpr = dims.EB
    TYPE: tl.constexpr = q.dtype.element_ty
    BLOCKS: tl.constexpr = (dims.SE + dims.EB - 1) // dims.EB
    block = tl.program_id(0) % BLOCKS
    tile = tiles + tl.program_id(0) // BLOCKS * 2
    e = block * dims.EB
    bh = tl.program_id(1).to(tl.int64)
    token = bh // H * T * H + bh % H
    piece = tl.load(tile)
    t0 = tl.load(tile + 1)
    stop = tl.minimum(t0 + BT, tl.load(end + piece))
    s = tl.load(segment + piece)
    t = t0 + tl.arange(0, BT)
    q_t = load_rows(q + token * dims.DK, t0, stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
    dy_t = load_rows(dy + token * dims.DV, t0, stop, H * dims.DV, 0, dims.DV, BT, dims.PV)
    online = load_rows(saved.z + bh * T * dims.SE, t0, stop, dims.SE, e, dims.SE, BT, dims.EB).to(tl.float32)
    donline = load_rows(saved.dhidden + bh * T * dims.SE, t0, stop, dims.SE, e, dims.SE, BT, dims.EB)
    donline = donline.to(tl.float32)
    gate = gate_of(shares, bh, s, t, t < stop, T, N)[:, None]
    hidden = tl.zeros([BT, EB], tl.float32)
    dz = tl.zeros([BT, EB], tl.float32)
    for i in range(tl.load(seg_first + s), s):
        share = gate_of(shares, bh, i, t, t < stop, T, N)[:, None]
        U = load_up(ends.up + (bh * N + i) * (dims.SK * dims.SE), e, dims)
        W = load_down(ends.down + (bh * N + i) * (dims.SE * dims.SV), e, dims)
        hidden += share * product(q_t, U, TYPE, "ieee")
        dz += share * product(dy_t, tl.trans(W), TYPE, "ieee")
    z, slope = gelu_slope_as(hidden * scale + gate * online, TYPE)
    dhidden = (dz + gate * donline) * slope
    tl.store(own + (block * tl.num_programs(1) + bh) * T + t, tl.sum(online * dhidden + z * donline, 1), mask=t < stop)
    store_rows(saved.z + bh * T * dims.SE, z, t0, stop, dims.SE, e, dims.SE, BT, dims.EB)
    store_rows(saved.dhidden + bh * T * dims.SE, dhidden, t0, stop, dims.SE, e, dims.SE, BT, dims.EB)


@triton.jit
def read_state(
    dq_t, dgamma, q_t, dy_t, share, up, down, scale, TYPE: tl.constexpr, dims: tl.constexpr,
):  # fmt: skip
    """dq (without its scale) and the gate's gradient, to which one cached state is added."""
    for e in range(0, dims.SE, dims.EB):
        U = load_up(up, e, dims)
        z_t, slope = gelu_slope_as(product(q_t, U, TYPE, "ieee") * scale, TYPE)
        dz = product(dy_t, tl.trans(load_down(down, e, dims)), TYPE, "ieee")
        dgamma += tl.sum(z_t * dz, 1)
        dh = dz * slope
        dq_t = add_product(share[:, None] * dh, tl.trans(U), dq_t, TYPE, "ieee")
    return dq_t, dgamma


@triton.jit(do_not_specialize=["T", "H", "N"])
def deep_dq_kernel(
    q, dy, ends, shares, saved, own, dgamma, delta, dq, seg_first, segment, end, tiles, scale, T, H, N,
    ADDS: tl.constexpr, dims: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens of a head. ``own`` [B*H, T] is the gradient of the own gate."""
    PK: tl.constexpr = dims.PK
    TYPE: tl.constexpr = q.dtype.element_ty
    tile = tiles + tl.program_id(0) * 2
    bh = tl.program_id(1).to(tl.int64)
    token = bh // H * T * H + bh % H
    piece = tl.load(tile)
    t0 = tl.load(tile + 1)
    stop = tl.minimum(t0 + BT, tl.load(end + piece))
    s = tl.load(segment + piece)
    first = tl.load(seg_first + s)
    t = t0 + tl.arange(0, BT)
    valid = t < stop
    q_t = load_rows(q + token * dims.DK, t0, stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
    dy_t = load_rows(dy + token * dims.DV, t0, stop, H * dims.DV, 0, dims.DV, BT, dims.PV)
    dq_t = tl.zeros([BT, PK], tl.float32)
    total = gate_of(shares, bh, s, t, valid, T, N) * tl.load(own + bh * T + t, mask=valid, other=0.0)
    for i in range(first, s):
        share = gate_of(shares, bh, i, t, valid, T, N)
        gradient = tl.zeros([BT], tl.float32)
        up = ends.up + (bh * N + i) * (dims.SK * dims.SE)
        down = ends.down + (bh * N + i) * (dims.SE * dims.SV)
        z = saved.z + bh * T * dims.SE
        dhidden = saved.dhidden + bh * T * dims.SE
        # What no token of the tile has chosen has no gradient.
        if tl.max(share, 0) > 0.0:
            dq_t, gradient = read_state(
                dq_t, gradient, q_t, dy_t, share, up, down, scale, TYPE, dims,
            )  # fmt: skip
        total += share * gradient
        tl.store(dgamma + (bh * N + i) * T + t, gradient, mask=valid)
    tl.store(delta + bh * T + t, total, mask=valid)
    if ADDS:
        # Gates sum to 1, and where there are none a memory's input is added once a state.
        count = 1.0
        dq_t += count * dy_t.to(tl.float32)
    store_rows(dq + token * dims.DK, dq_t * scale, t0, stop, H * dims.DK, 0, dims.DK, BT, dims.PK)


def mix_backward(
    q: torch.Tensor, dy: torch.Tensor, ends: Layers, shares: Shares, saved: Saved, tables: Tables, scale: float,
) -> torch.Tensor:  # fmt: skip
    """The mixture's z and dh in place of ``saved``, and the gradients of the own gate [blocks, B*H, T], to be added.

    Arguments as those of :func:`deep_read_backward`; ``saved`` has what :mod:`deep_online_backward` gives.
    """
    _, T, H, _ = q.shape
    heads, N = q.shape[0] * H, tables.seg_begin.shape[0]
    eb = min(EB, max(16, triton.next_power_of_2(SE)))
    tiles, blocks = tables.tiles(BT), triton.cdiv(SE, eb)
    own = q.new_empty((blocks, heads, T), dtype=torch.float32)
    mix_backward_kernel[(blocks * tiles.shape[0], heads)](
        q=q, dy=dy, ends=ends, shares=shares, saved=saved._replace(errors=None), own=own, seg_first=tables.seg_first,
        segment=tables.segment, end=tables.end, tiles=tiles, scale=scale, T=T, H=H, N=N,
        dims=Dims(DK, DV, PK, PV, SK, SV, SE, eb), BT=BT, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return own


def deep_read_backward(
    q: torch.Tensor, dy: torch.Tensor, ends: Layers, shares: Shares, saved: Saved, own: torch.Tensor,
    dgamma: torch.Tensor | None, delta: torch.Tensor | None, dq: torch.Tensor, tables: Tables, scale: float, adds: bool,
) -> None:  # fmt: skip
    """dq of the cached states, and of what a memory adds; dgamma and delta.

    Args:
        q [B, T, H, DK], dy [B, T, H, DV]: of one dtype.
        ends: end states [B*H * N, ..], as operands of products.
        saved: z and dh of the mixture [B*H, T, SE], where parameters are mixed.
        own [B*H, T]: the gradient of the own gate.
        dgamma [B*H, N, T], delta [B*H, T]: written; None where gates are not learned.
        dq [B, T, H, DK]: float32, written.
        tables: whose pieces are whole segments.
        adds: whether the memory adds its input.
    """
    _, T, H, _ = q.shape
    heads, N = q.shape[0] * H, tables.seg_begin.shape[0]
    eb = min(EB, max(16, triton.next_power_of_2(SE)))
    tiles = tables.tiles(BT)
    deep_dq_kernel[(tiles.shape[0], heads)](
        q=q, dy=dy, ends=ends, shares=shares, saved=saved._replace(errors=None), own=own, dgamma=dgamma, delta=delta,
        dq=dq, seg_first=tables.seg_first, segment=tables.segment, end=tables.end, tiles=tiles, scale=scale, T=T, H=H,
        N=N, ADDS=adds, dims=Dims(DK, DV, PK, PV, SK, SV, SE, eb), BT=BT, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
