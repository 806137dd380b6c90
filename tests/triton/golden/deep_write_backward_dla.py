"""Gradients of a deep memory's writes: the reverse walk over inner chunks (Eq. 30-31, 34-36).

A lane's last chunk comes first. Where errors are -v, a program has EB hidden units of a lane, their gradients in
registers, and leaves parts of what is added up over hidden units; else it has a lane, whose gradients are in memory.
Given the gradients aU, aW of the states that a chunk leaves and bU, bW of its momentum, with l, s the coefficients of
its last row and of the momentum, dh, z, dy of the online reads with gates, A = c_tj, P = x K^T, G = dy err^T:

    dback = -(A P)^T dh - l (K aU) + s (K bU)          dZ = -(A G)^T z - l err aW^T + s err bW^T
    dR = dback gelu'(H)                                dH = dback R gelu''(H) + dZ gelu'(H)
    derr = -l (Z aW) + s (Z bW) + dR W                 dK = dH U^T - l back aU^T + s back bU^T
    dU = c aU + x^T (c dh) + K^T dH                    dW = c aW + z^T (c dy) + dR^T err
    dS_U = p bU - d aU - x^T (d dh)                    dS_W = p bW - d aW - z^T (d dy)
    dV = -derr (dla), and for titans dV = -dO, dO = 2 derr, and once more over all hidden units:
    dZ += dO W^T, whose dH is added to dK and dU; dW += Z^T dO

:mod:`deep_online_backward` has the rest of derr and dK. Gradients of coefficients are sums of the same terms. Keys also
have a gradient through the segments' mean keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .deep_backward_common import (
    Chunks,
    Dims,
    Layers,
    Made,
    Rows,
    Saved,
    Shares,
    Tables,
    Weights,
    add_product,
    gate_of,
    load_chunk,
    load_down,
    load_line,
    load_up,
    product,
    store_down,
    store_up,
)
from .deep_common import gelu_curve, load_rows, store_rows

INNER = 16
DK = 64
PK = 64
SK = 64
DV = 64
PV = 64
SV = 64
SE = 256
EB = 32
num_stages = 1
num_warps = 4


class Keys(NamedTuple):
    """Of the gates' gradients, float32: pull ``[B*H, T]`` and dmeans ``[B*H, N, SK]``."""

    pull: torch.Tensor
    dmeans: torch.Tensor


class Ends(NamedTuple):
    """Of a chunk's last row -c_j, and of the momentum s_j, ``[BB, 1]``; the last row's c and d, the momentum's p."""

    last: tl.tensor
    strength: tl.tensor
    keep: tl.tensor
    moved: tl.tensor
    decay: tl.tensor


class Sums(NamedTuple):
    """What is added up over hidden units.

    derr [BB, PV]; dk [BB, PK]; ended, ended_s [BB, PV]: Z aW and Z bW. Gradients of coefficients [BB]: of the last
    row's c_j, of s_j; and at every place the same number, of the last row's c and d and of p.
    """

    derr: tl.tensor
    dk: tl.tensor
    ended: tl.tensor
    ended_s: tl.tensor
    dlast: tl.tensor
    dproducts: tl.tensor
    dkeep: tl.tensor
    dmoved: tl.tensor
    ddecay: tl.tensor


@triton.jit
def no_sums(dims: tl.constexpr, BB: tl.constexpr):
    """Sums of nothing."""
    PK: tl.constexpr = dims.PK
    PV: tl.constexpr = dims.PV
    values = tl.zeros([BB, PV], tl.float32)
    line = tl.zeros([BB], tl.float32)
    return Sums(values, tl.zeros([BB, PK], tl.float32), values, values, line, line, line, line, line)


@triton.jit
def load_ends(weights, place, count, INNER: tl.constexpr, BB: tl.constexpr):
    """The coefficients of what a chunk of ``count`` tokens leaves."""
    last = -load_line(weights.last + place * INNER, count, BB)[:, None]
    strength = last
    keep = 1.0
    moved = 0.0
    decay = 0.0
    if weights.state is not None:
        keep = tl.load(weights.state + place * INNER + count - 1)
    if weights.momentum is not None:
        strength = load_line(weights.products + place * INNER, count, BB)[:, None]
        moved = tl.load(weights.momentum + place * INNER + count - 1)
        decay = tl.load(weights.decay + place)
    return Ends(last, strength, keep, moved, decay)


@triton.jit
def add_units(
    sums, b, by, U, W, aU, aW, z, dh, weights, scale, place, INNER: tl.constexpr, BB: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Sums with those of a block of hidden units; dU and dW; and dback ``[BB, EB]``, dz, and what they go through."""
    h, slope, bend = gelu_curve(product(b.k, U, TYPE, "ieee"))
    R = product(b.err, tl.trans(W), TYPE, "ieee")
    back = R * slope
    ended = add_product(h, aW, sums.ended, TYPE, "ieee")
    left = product(b.k, aU, TYPE, "ieee")
    dback = by.last * left - product(tl.trans(b.rows * b.scores), dh, TYPE, "ieee")
    # Factors of rows are of the result, for operands take more registers.
    dz = by.last * product(b.err, tl.trans(aW), TYPE, "ieee")
    dz = add_product(-tl.trans(b.rows * b.pulls), z, dz, TYPE, "ieee")
    dk = add_product(by.last * back, tl.trans(aU), sums.dk, TYPE, "ieee")
    dlast = sums.dlast - tl.sum(left * back, 1)
    dkeep = sums.dkeep
    if weights.state is not None:
        keep = load_line(weights.state + place * INNER, INNER, BB)[:, None]
        dkeep += tl.sum(tl.sum(U * aU, 1), 0) + tl.sum(tl.sum(W * aW, 1), 0)
        dU = add_product(tl.trans(b.q), keep * dh * scale, by.keep * aU, TYPE, "ieee")
        dW = add_product(tl.trans(z), keep * b.dy, by.keep * aW, TYPE, "ieee")
    else:
        dU = add_product(tl.trans(b.q), dh * scale, aU, TYPE, "ieee")
        dW = add_product(tl.trans(z), b.dy, aW, TYPE, "ieee")
    made = Sums(
        sums.derr, dk, ended, sums.ended_s, dlast, sums.dproducts, dkeep, sums.dmoved, sums.ddecay
    )  # fmt: skip
    return made, dU, dW, dback, dz, h, slope, bend, R


@triton.jit
def add_layers(sums, b, U, W, dU, dW, dback, dz, slope, bend, R, TYPE: tl.constexpr):
    """Sums, dU and dW with what comes through dback and dz of a block of hidden units."""
    dR = dback * slope
    dH = dback * R * bend + dz * slope
    derr = add_product(dR, W, sums.derr, TYPE, "ieee")
    dk = add_product(dH, tl.trans(U), sums.dk, TYPE, "ieee")
    dU = add_product(tl.trans(b.k), dH, dU, TYPE, "ieee")
    dW = add_product(tl.trans(dR), b.err, dW, TYPE, "ieee")
    made = Sums(
        derr, dk, sums.ended, sums.ended_s, sums.dlast, sums.dproducts, sums.dkeep, sums.dmoved, sums.ddecay
    )  # fmt: skip
    return made, dU, dW


@triton.jit
def store_coefficients(sums, b, weights, made, place, last, dlast, INNER: tl.constexpr, BB: tl.constexpr):
    """The gradients of the coefficients of what a chunk leaves; those of its last row's c and d are added to others."""
    t = tl.arange(0, BB)
    tl.store(made.last + place * INNER + t, dlast, mask=t < INNER)
    if weights.state is not None:
        line = made.state + place * INNER + last
        tl.store(line, tl.load(line) + tl.max(sums.dkeep, 0))
    if weights.momentum is not None:
        line = made.momentum + place * INNER + last
        tl.store(line, tl.load(line) + tl.max(sums.dmoved, 0))
        products = sums.dproducts + tl.sum(sums.ended_s * b.err, 1)
        tl.store(made.products + place * INNER + t, products, mask=t < INNER)
        tl.store(made.decay + place, tl.max(sums.ddecay, 0))


@triton.jit
def pull_keys(dk, rest, u, keys, bh, j0, stop, T, H, dims: tl.constexpr, BB: tl.constexpr):
    """dk with what comes through the mean keys; ``rest`` of the tokens after the chunk, and with the chunk's own."""
    t = j0 + tl.arange(0, BB)
    u_t = load_rows(
        u + (bh // H * T * H + bh % H) * dims.DK, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK
    ).to(tl.float32)  # fmt: skip
    pull = tl.load(keys.pull + bh * T + t, mask=t < stop, other=0.0)
    pulled = tl.where(t[None, :] >= t[:, None], pull[None, :], 0.0)
    dk = tl.dot(pulled, u_t, dk + rest[None, :], input_precision="ieee")
    return dk, rest + tl.sum(u_t * pull[:, None], 0)


@triton.jit
def mean_pull(keys, seg_last, segment, chunk, rest, bh, N, dims: tl.constexpr):
    """``rest``, or at a segment's end what its mean key says of every key."""
    if tl.load(seg_last + segment) == chunk:
        cols = tl.arange(0, dims.PK)
        rest = tl.load(keys.dmeans + (bh * N + segment) * dims.SK + cols, mask=cols < dims.SK, other=0.0)
    return rest


@triton.jit(do_not_specialize=["T", "H", "N", "P"])
def walk_slices_kernel(
    rows, saved, shares, keys, weights, dweights, states, dends, chunks, seg_last, made, scale, T, H, N, P,
    dims: tl.constexpr, INNER: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """One program: EB hidden units of a lane of a head, from its last chunk to its first, where errors are -v.

    ``made`` and ``dweights`` are parts, to be added up over blocks of hidden units; the first has what mean keys say.
    """
    TYPE: tl.constexpr = rows.k.dtype.element_ty
    PK: tl.constexpr = dims.PK
    BLOCKS: tl.constexpr = (dims.SE + dims.EB - 1) // dims.EB
    up: tl.constexpr = dims.SK * dims.SE
    down: tl.constexpr = dims.SE * dims.SV
    block = tl.program_id(0) % BLOCKS
    e = block * dims.EB
    lane = chunks.lanes + tl.program_id(0) // BLOCKS * 2
    bh = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1).to(tl.int64)
    token = block * heads * T + bh // H * T * H + bh % H
    first = tl.load(lane)
    past = tl.load(lane + 1)
    final = bh * N + tl.load(chunks.segment + past - 1)
    aU = load_up(dends.up + final * up, e, dims)
    aW = load_down(dends.down + final * down, e, dims)
    rest = tl.zeros([PK], tl.float32)
    for m in range(0, past - first):
        chunk = past - 1 - m
        place = bh * P + chunk
        j0 = tl.load(chunks.begin + chunk)
        stop = tl.load(chunks.end + chunk)
        segment = tl.load(chunks.segment + chunk)
        before = tl.load(chunks.entering + chunk)
        b = load_chunk(
            rows, None, shares, weights, bh, segment, place, j0, stop, scale, T, H, N, "ieee", dims, INNER, BB
        )
        by = load_ends(weights, place, stop - j0, INNER, BB)
        t = j0 + tl.arange(0, BB)
        gate = gate_of(shares, bh, segment, t, t < stop, T, N)[:, None]
        U = load_up(states.up + place * up, e, dims)
        W = load_down(states.down + place * down, e, dims)
        z = load_rows(saved.z + bh * T * dims.SE, j0, stop, dims.SE, e, dims.SE, BB, dims.EB)
        dh = load_rows(saved.dhidden + bh * T * dims.SE, j0, stop, dims.SE, e, dims.SE, BB, dims.EB) * gate
        sums, dU, dW, dback, dz, _, slope, bend, R = add_units(
            no_sums(dims, BB), b, by, U, W, aU, aW, z, dh, weights, scale, place, INNER, BB, TYPE
        )
        sums, aU, aW = add_layers(sums, b, U, W, dU, dW, dback, dz, slope, bend, R, TYPE)
        derr = sums.derr + by.last * sums.ended
        dk = sums.dk
        dlast = sums.dlast - tl.sum(sums.ended * b.err, 1)
        store_coefficients(sums, b, weights, dweights, block * heads * P + place, stop - j0 - 1, dlast, INNER, BB)
        if block == 0:
            rest = mean_pull(keys, seg_last, segment, chunk, rest, bh, N, dims)
            dk, rest = pull_keys(dk, rest, rows.u, keys, bh, j0, stop, T, H, dims, BB)
        store_rows(made.dk + token * dims.DK, dk, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
        store_rows(made.dv + token * dims.DV, -derr, j0, stop, H * dims.DV, 0, dims.DV, BB, dims.PV)
        if before >= 0:
            earlier = tl.load(chunks.segment + before)
            if earlier != segment:
                # The state that enters is the end state of a segment, which later tokens read.
                aU += load_up(dends.up + (bh * N + earlier) * up, e, dims)
                aW += load_down(dends.down + (bh * N + earlier) * down, e, dims)
    opened = bh * N + tl.load(chunks.segment + first)
    # Other threads may still read it.
    tl.debug_barrier()
    store_up(dends.up + opened * up, e, aU, dims)
    store_down(dends.down + opened * down, e, aW, dims)


def _sliced(
    rows: Rows, saved: Saved, shares: Shares, keys: Keys | None, weights: Weights, states: Layers, dends: Layers,
    made: Made, chunks: Chunks, seg_last: torch.Tensor, scale: float, dims: Dims, INNER: int, bb: int, num_warps: int,
    num_stages: int,
) -> torch.Tensor:  # fmt: skip
    """The walk where errors are -v: parts of all gradients, added up; those of the last rows' c_j."""
    B, T, H, _ = rows.k.shape
    blocks, P, N = triton.cdiv(dims.SE, dims.EB), chunks.begin.shape[0], dends.up.shape[0] // (B * H)
    dk, dv = (x.new_empty((blocks, *x.shape)) for x in (made.dk, made.dv))
    last = weights.last.new_empty((blocks, *weights.last.shape))
    walk_slices_kernel[(blocks * chunks.lanes.shape[0], B * H)](
        rows=rows, saved=saved, shares=shares, keys=keys, weights=weights, dweights=Weights(None, last), states=states,
        dends=dends, chunks=chunks, seg_last=seg_last, made=Made(None, dk, dv), scale=scale, T=T, H=H, N=N, P=P,
        dims=dims, INNER=INNER, BB=bb, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    made.dk.add_(dk.sum(0))
    made.dv.add_(dv.sum(0))
    return last.sum(0)


def deep_write_backward(
    rows: Rows, saved: Saved, shares: Shares, keys: Keys | None, weights: Weights, dweights: Weights, states: Layers,
    dends: Layers, made: Made, lanes: torch.Tensor, tables: Tables, scale: float, adds: bool,
) -> Weights:  # fmt: skip
    """dk and dv, and the gradients of all coefficients.

    Args:
        saved: of :mod:`deep_online_backward`, or of the mixture; dweights, made: what the online reads say.
        keys: of the gates' gradients; None where they are not learned.
        states, weights: of :mod:`deep_replay`.
        dends: gradients of end states [B*H * N, ..], float32; they are overwritten, and those of a lane's first
            segment end up as the gradients of what the lane starts from.
        lanes [L, 2]: the first chunk of each lane, and one past its last.
        adds: whether the memory adds its input.
    """
    B, T, H, _ = rows.k.shape
    P, N, L = tables.begin.shape[0], tables.seg_begin.shape[0], lanes.shape[0]
    chunks = Chunks(tables.begin, tables.end, tables.segment, tables.entering, lanes)
    dims, bb = Dims(DK, DV, PK, PV, SK, SV, SE, EB), max(16, triton.next_power_of_2(INNER))
    last = _sliced(
        rows, saved, shares, keys, weights, states, dends, made, chunks, tables.seg_last, scale, dims, INNER, bb,
        num_warps, num_stages,
    )  # fmt: skip
    return dweights._replace(last=last)
