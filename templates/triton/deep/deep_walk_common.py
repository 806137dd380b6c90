"""What the walks back over inner chunks share (:mod:`deep_write_backward`). No flag is in here: it is copied whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .deep_backward_common import add_product, load_line, product
from .deep_common import gelu_curve, load_rows


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
    sums, b, by, U, W, aU, aW, z, dh, weights, scale, place, INNER: tl.constexpr, BB: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums with those of a block of hidden units; dU and dW; and dback ``[BB, EB]``, dz, and what they go through."""
    h, slope, bend = gelu_curve(product(b.k, U, TYPE, PRECISION))
    R = product(b.err, tl.trans(W), TYPE, PRECISION)
    back = R * slope
    ended = add_product(h, aW, sums.ended, TYPE, PRECISION)
    left = product(b.k, aU, TYPE, PRECISION)
    dback = by.last * left - product(tl.trans(b.rows * b.scores), dh, TYPE, PRECISION)
    # Factors of rows are of the result, for operands take more registers.
    dz = by.last * product(b.err, tl.trans(aW), TYPE, PRECISION)
    dz = add_product(-tl.trans(b.rows * b.pulls), z, dz, TYPE, PRECISION)
    dk = add_product(by.last * back, tl.trans(aU), sums.dk, TYPE, PRECISION)
    dlast = sums.dlast - tl.sum(left * back, 1)
    dkeep = sums.dkeep
    if weights.state is not None:
        keep = load_line(weights.state + place * INNER, INNER, BB)[:, None]
        dkeep += tl.sum(tl.sum(U * aU, 1), 0) + tl.sum(tl.sum(W * aW, 1), 0)
        dU = add_product(tl.trans(b.q), keep * dh * scale, by.keep * aU, TYPE, PRECISION)
        dW = add_product(tl.trans(z), keep * b.dy, by.keep * aW, TYPE, PRECISION)
    else:
        dU = add_product(tl.trans(b.q), dh * scale, aU, TYPE, PRECISION)
        dW = add_product(tl.trans(z), b.dy, aW, TYPE, PRECISION)
    made = Sums(
        sums.derr, dk, ended, sums.ended_s, dlast, sums.dproducts, dkeep, sums.dmoved, sums.ddecay
    )  # fmt: skip
    return made, dU, dW, dback, dz, h, slope, bend, R


@triton.jit
def add_layers(sums, b, U, W, dU, dW, dback, dz, slope, bend, R, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Sums, dU and dW with what comes through dback and dz of a block of hidden units."""
    dR = dback * slope
    dH = dback * R * bend + dz * slope
    derr = add_product(dR, W, sums.derr, TYPE, PRECISION)
    dk = add_product(dH, tl.trans(U), sums.dk, TYPE, PRECISION)
    dU = add_product(tl.trans(b.k), dH, dU, TYPE, PRECISION)
    dW = add_product(tl.trans(dR), b.err, dW, TYPE, PRECISION)
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
def pull_keys(dk, rest, u, keys, bh, j0, stop, T, H, PRECISION: tl.constexpr, dims: tl.constexpr, BB: tl.constexpr):
    """dk with what comes through the mean keys; ``rest`` of the tokens after the chunk, and with the chunk's own."""
    t = j0 + tl.arange(0, BB)
    u_t = load_rows(
        u + (bh // H * T * H + bh % H) * dims.DK, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK
    ).to(tl.float32)  # fmt: skip
    pull = tl.load(keys.pull + bh * T + t, mask=t < stop, other=0.0)
    pulled = tl.where(t[None, :] >= t[:, None], pull[None, :], 0.0)
    dk = tl.dot(pulled, u_t, dk + rest[None, :], input_precision=PRECISION)
    return dk, rest + tl.sum(u_t * pull[:, None], 0)


@triton.jit
def mean_pull(keys, seg_last, segment, chunk, rest, bh, N, dims: tl.constexpr):
    """``rest``, or at a segment's end what its mean key says of every key."""
    if tl.load(seg_last + segment) == chunk:
        cols = tl.arange(0, dims.PK)
        rest = tl.load(keys.dmeans + (bh * N + segment) * dims.SK + cols, mask=cols < dims.SK, other=0.0)
    return rest
