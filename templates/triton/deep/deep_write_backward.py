"""Gradients of a deep memory's writes: the reverse walk over inner chunks (Eq. 30-31, 34-36).

A lane's last chunk comes first. Where errors are -v, a program has EB hidden units of a lane, their gradients in
registers, and leaves parts of what is added up over hidden units; else it has a lane, whose gradients are in memory.
 Given the gradients aU, aW of the states that a chunk leaves and bU, bW of its
momentum, with l, s the coefficients of its last row and of the momentum, dh, z of the online reads, their own gate
included, A = c_tj, P = x K^T, G = dy err^T, Pz = sum z Z^T, Gh = sum dh back^T (over hidden units):

    dback = -(A P)^T dh - l (K aU) + s (K bU)          dZ = -(A G)^T z + (-l err) aW^T + (s err) bW^T
    dR = dback gelu'(H)                                dH = dback R gelu''(H) + dZ gelu'(H)
    derr = -(A Pz)^T dy - l (Z aW) + s (Z bW) + dR W   dK = dH U^T - l back aU^T + s back bU^T - (A Gh)^T x
    dU = c aU + x^T (c dh) + K^T dH                    dW = c aW + z^T (c dy) + dR^T err
    dS_U = p bU - d aU - x^T (d dh)                    dS_W = p bW - d aW - z^T (d dy)
    dV = -derr (dla), and for titans dV = -dO, dO = 2 derr, and once more over all hidden units:
    dZ += dO W^T, whose dH is added to dK and dU; dW += Z^T dO

Gradients of coefficients are sums of the same terms. Keys also have a gradient through the segments' mean keys.
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
    Saved,
    Shares,
    Tables,
    Weights,
    add_product,
    gate_of,
    load_down,
    load_line,
    load_square,
    load_up,
    product,
    store_down,
    store_up,
)
from .deep_common import gelu_curve, gelu_slope_as, load_rows, store_rows


class Rows(NamedTuple):
    """q, k, u ``[B, T, H, DK]`` and v, dy ``[B, T, H, DV]``, of one dtype; u is None where gates are not learned."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dy: torch.Tensor
    u: torch.Tensor | None = None


class Keys(NamedTuple):
    """Of the gates' gradients, float32: pull ``[B*H, T]`` and dmeans ``[B*H, N, SK]``."""

    pull: torch.Tensor
    dmeans: torch.Tensor


class Made(NamedTuple):
    """dq, dk ``[B, T, H, DK]``, dv ``[B, T, H, DV]``, float32; dq has the cached states' part already."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


class Block(NamedTuple):
    """A chunk's rows: k and q as loaded, err and dy (with the own gate) float32, c_tj, x K^T and dy err^T ``[BB, BB]``.

    Of the last row -c_j and of the momentum s_j ``[BB, 1]``; c_t and d_t ``[BB, 1]``, those of the last row, and p.
    """

    k: tl.tensor
    q: tl.tensor
    err: tl.tensor
    dy: tl.tensor
    rows: tl.tensor
    scores: tl.tensor
    pulls: tl.tensor
    last: tl.tensor
    strength: tl.tensor
    keep: tl.tensor
    moved: tl.tensor
    keep_last: tl.tensor
    moved_last: tl.tensor
    decay: tl.tensor


class Sums(NamedTuple):
    """What is added up over hidden units.

    scores, pulls [BB, BB]: Gh and Pz; derr [BB, PV]; dk [BB, PK]; read, read_s [BB, PK]: dh U^T and dh S_U^T; ended,
    ended_s [BB, PV]: Z aW and Z bW. Gradients of coefficients [BB]: of c_t and d_t, of the last row's c_j, of s_j; and
    at every place the same number, of the last row's c and d and of p.
    """

    scores: tl.tensor
    pulls: tl.tensor
    derr: tl.tensor
    dk: tl.tensor
    read: tl.tensor
    read_s: tl.tensor
    ended: tl.tensor
    ended_s: tl.tensor
    dstate: tl.tensor
    dmomentum: tl.tensor
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
    square = tl.zeros([BB, BB], tl.float32)
    keys = tl.zeros([BB, PK], tl.float32)
    values = tl.zeros([BB, PV], tl.float32)
    line = tl.zeros([BB], tl.float32)
    return Sums(square, square, values, keys, keys, keys, values, values, line, line, line, line, line, line, line)


@triton.jit
def load_block(
    rows, saved, shares, weights, bh, s, place, j0, stop, scale, T, H, N,
    SQUARED: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, INNER: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """The rows and coefficients of a chunk."""
    TYPE: tl.constexpr = rows.k.dtype.element_ty
    token = bh // H * T * H + bh % H
    t = j0 + tl.arange(0, BB)
    last = stop - j0 - 1
    k = load_rows(rows.k + token * dims.DK, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
    q = load_rows(rows.q + token * dims.DK, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
    dy = load_rows(rows.dy + token * dims.DV, j0, stop, H * dims.DV, 0, dims.DV, BB, dims.PV).to(tl.float32)
    dy *= gate_of(shares, bh, s, t, t < stop, T, N)[:, None]
    if SQUARED:
        err = load_rows(saved.errors + bh * T * dims.SV, j0, stop, dims.SV, 0, dims.SV, BB, dims.PV)
    else:
        err = -load_rows(rows.v + token * dims.DV, j0, stop, H * dims.DV, 0, dims.DV, BB, dims.PV).to(tl.float32)
    scores = product(q, tl.trans(k), TYPE, PRECISION) * scale
    pulls = product(dy, tl.trans(err), TYPE, PRECISION)
    weigh = load_square(weights.rows + place * INNER * INNER, INNER, BB)
    ended = load_line(weights.rows + (place * INNER + last) * INNER, last + 1, BB)[:, None]
    one = tl.full([BB, 1], 1.0, tl.float32)
    keep = one
    moved = one
    strength = one
    keep_last = 1.0
    moved_last = 0.0
    decay = 0.0
    if weights.state is not None:
        keep = load_line(weights.state + place * INNER, INNER, BB)[:, None]
        keep_last = tl.load(weights.state + place * INNER + last)
    if weights.momentum is not None:
        moved = load_line(weights.momentum + place * INNER, INNER, BB)[:, None]
        strength = load_line(weights.products + place * INNER, last + 1, BB)[:, None]
        moved_last = tl.load(weights.momentum + place * INNER + last)
        decay = tl.load(weights.decay + place)
    return Block(
        k, q, err, dy, weigh, scores, pulls, -ended, strength, keep, moved, keep_last, moved_last, decay
    )  # fmt: skip


@triton.jit
def add_units(
    sums, b, U, W, aU, aW, z, dh, weights, scale, TYPE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Sums with those of a block of hidden units; dU and dW; and what comes of momentum, dback ``[BB, EB]`` and dz."""
    h, slope, bend = gelu_curve(product(b.k, U, TYPE, PRECISION))
    R = product(b.err, tl.trans(W), TYPE, PRECISION)
    back = R * slope
    scores = add_product(dh, tl.trans(back), sums.scores, TYPE, PRECISION)
    pulls = add_product(z, tl.trans(h), sums.pulls, TYPE, PRECISION)
    read = add_product(dh, tl.trans(U), sums.read, TYPE, PRECISION)
    ended = add_product(h, aW, sums.ended, TYPE, PRECISION)
    left = product(b.k, aU, TYPE, PRECISION)
    dback = b.last * left - product(tl.trans(b.rows * b.scores), dh, TYPE, PRECISION)
    # Factors of rows are of the result, for operands take more registers.
    dz = b.last * product(b.err, tl.trans(aW), TYPE, PRECISION)
    dz = add_product(-tl.trans(b.rows * b.pulls), z, dz, TYPE, PRECISION)
    dk = add_product(b.last * back, tl.trans(aU), sums.dk, TYPE, PRECISION)
    dlast = sums.dlast - tl.sum(left * back, 1)
    dU = b.keep_last * aU
    dW = b.keep_last * aW
    dU = add_product(tl.trans(b.q), b.keep * dh * scale, dU, TYPE, PRECISION)
    dW = add_product(tl.trans(z), b.keep * b.dy, dW, TYPE, PRECISION)
    dstate = sums.dstate
    dkeep = sums.dkeep
    if weights.state is not None:
        dstate += tl.sum(z * product(b.dy, tl.trans(W), TYPE, PRECISION), 1)
        dkeep += tl.sum(tl.sum(U * aU, 1), 0) + tl.sum(tl.sum(W * aW, 1), 0)
    made = Sums(
        scores, pulls, sums.derr, dk, read, sums.read_s, ended, sums.ended_s, dstate, sums.dmomentum, dlast,
        sums.dproducts, dkeep, sums.dmoved, sums.ddecay,
    )  # fmt: skip
    return made, dU, dW, dback, dz, h, slope, bend, R


@triton.jit
def add_layers(
    sums, b, U, W, dU, dW, dback, dz, slope, bend, R, TYPE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Sums, dU and dW with what comes through dback and dz of a block of hidden units."""
    dR = dback * slope
    dH = dback * R * bend + dz * slope
    derr = add_product(dR, W, sums.derr, TYPE, PRECISION)
    dk = add_product(dH, tl.trans(U), sums.dk, TYPE, PRECISION)
    dU = add_product(tl.trans(b.k), dH, dU, TYPE, PRECISION)
    dW = add_product(tl.trans(dR), b.err, dW, TYPE, PRECISION)
    made = Sums(
        sums.scores, sums.pulls, derr, dk, sums.read, sums.read_s, sums.ended, sums.ended_s, sums.dstate,
        sums.dmomentum, sums.dlast, sums.dproducts, sums.dkeep, sums.dmoved, sums.ddecay,
    )  # fmt: skip
    return made, dU, dW


@triton.jit
def add_momentum(
    sums, b, dback, dz, h, slope, R, aU, aW, S_up, S_down, bU, bW, z, dh, scale, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums, dback and dz with what the momentum says of a block of hidden units; dS_U and dS_W."""
    back = R * slope
    read_s = add_product(dh, tl.trans(S_up), sums.read_s, TYPE, PRECISION)
    ended_s = add_product(h, bW, sums.ended_s, TYPE, PRECISION)
    left = product(b.k, bU, TYPE, PRECISION)
    dback += b.strength * left
    dz += b.strength * product(b.err, tl.trans(bW), TYPE, PRECISION)
    dk = add_product(b.strength * back, tl.trans(bU), sums.dk, TYPE, PRECISION)
    dproducts = sums.dproducts + tl.sum(left * back, 1)
    dmomentum = sums.dmomentum - tl.sum(z * product(b.dy, tl.trans(S_down), TYPE, PRECISION), 1)
    dmoved = sums.dmoved - tl.sum(tl.sum(S_up * aU, 1), 0) - tl.sum(tl.sum(S_down * aW, 1), 0)
    ddecay = sums.ddecay + tl.sum(tl.sum(S_up * bU, 1), 0) + tl.sum(tl.sum(S_down * bW, 1), 0)
    dS_up = b.decay * bU - b.moved_last * aU
    dS_down = b.decay * bW - b.moved_last * aW
    dS_up = add_product(tl.trans(b.q), -b.moved * dh * scale, dS_up, TYPE, PRECISION)
    dS_down = add_product(tl.trans(z), -b.moved * b.dy, dS_down, TYPE, PRECISION)
    made = Sums(
        sums.scores, sums.pulls, sums.derr, dk, sums.read, read_s, sums.ended, ended_s, sums.dstate, dmomentum,
        sums.dlast, dproducts, sums.dkeep, dmoved, ddecay,
    )  # fmt: skip
    return made, dback, dz, dS_up, dS_down


@triton.jit
def walk_units(
    b, states, dends, moments, saved, weights, shares, bh, s, place, source, target, own_place, j0, stop, scale, T,
    N, TYPE: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """A chunk's sums over all hidden units; the gradients of what enters it go to place ``target`` of ``dends``.

    source, target: of the gradients of what leaves and of what enters; where they differ, one is added to the other.
    """
    up: tl.constexpr = dims.SK * dims.SE
    down: tl.constexpr = dims.SE * dims.SV
    t = j0 + tl.arange(0, BB)
    gate = gate_of(shares, bh, s, t, t < stop, T, N)[:, None]
    sums = no_sums(dims, BB)
    for e in range(0, dims.SE, dims.EB):
        U = load_up(states.up + place * up, e, dims)
        W = load_down(states.down + place * down, e, dims)
        aU = load_up(dends.up + source * up, e, dims)
        aW = load_down(dends.down + source * down, e, dims)
        z = load_rows(saved.z + bh * T * dims.SE, j0, stop, dims.SE, e, dims.SE, BB, dims.EB)
        dh = load_rows(saved.dhidden + bh * T * dims.SE, j0, stop, dims.SE, e, dims.SE, BB, dims.EB) * gate
        sums, dU, dW, dback, dz, h, slope, bend, R = add_units(
            sums, b, U, W, aU, aW, z, dh, weights, scale, TYPE, PRECISION
        )
        if weights.momentum is not None:
            tl.debug_barrier()
            S_up = load_up(states.s_up + place * up, e, dims)
            S_down = load_down(states.s_down + place * down, e, dims)
            bU = load_up(moments.up + own_place * up, e, dims)
            bW = load_down(moments.down + own_place * down, e, dims)
            sums, dback, dz, dS_up, dS_down = add_momentum(
                sums, b, dback, dz, h, slope, R, aU, aW, S_up, S_down, bU, bW, z, dh, scale, TYPE, PRECISION
            )
            store_up(moments.up + own_place * up, e, dS_up, dims)
            store_down(moments.down + own_place * down, e, dS_down, dims)
            tl.debug_barrier()
        sums, dU, dW = add_layers(sums, b, U, W, dU, dW, dback, dz, slope, bend, R, TYPE, PRECISION)
        if source != target:
            dU += load_up(dends.up + target * up, e, dims)
            dW += load_down(dends.down + target * down, e, dims)
        store_up(dends.up + target * up, e, dU, dims)
        store_down(dends.down + target * down, e, dW, dims)
    return sums


@triton.jit
def add_outputs(
    dk, do, k, states, dends, place, target, TYPE: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr
):
    """dk with what the memory's own outputs o = Z W say, whose gradient is ``do``; dU and dW are added to."""
    up: tl.constexpr = dims.SK * dims.SE
    down: tl.constexpr = dims.SE * dims.SV
    for e in range(0, dims.SE, dims.EB):
        U = load_up(states.up + place * up, e, dims)
        W = load_down(states.down + place * down, e, dims)
        z, slope = gelu_slope_as(product(k, U, TYPE, PRECISION), TYPE)
        dH = product(do, tl.trans(W), TYPE, PRECISION) * slope
        dk = add_product(dH, tl.trans(U), dk, TYPE, PRECISION)
        dU = load_up(dends.up + target * up, e, dims)
        dW = load_down(dends.down + target * down, e, dims)
        store_up(dends.up + target * up, e, add_product(tl.trans(k), dH, dU, TYPE, PRECISION), dims)
        store_down(dends.down + target * down, e, add_product(tl.trans(z), do, dW, TYPE, PRECISION), dims)
    return dk


@triton.jit
def store_coefficients(sums, b, weights, made, place, last, dlast, scale, INNER: tl.constexpr, BB: tl.constexpr):
    """The gradients of a chunk's coefficients."""
    t = tl.arange(0, BB)
    x = b.q.to(tl.float32) * scale
    rows = -(b.scores * sums.scores + b.pulls * sums.pulls)
    rows += tl.where((t == last)[:, None], dlast[None, :], 0.0)
    inside = (t < INNER)[:, None] & (t < INNER)[None, :]
    tl.store(made.rows + place * INNER * INNER + t[:, None] * INNER + t[None, :], rows, mask=inside)
    if weights.state is not None:
        line = sums.dstate + tl.sum(x * sums.read, 1) + tl.where(t == last, sums.dkeep, 0.0)
        tl.store(made.state + place * INNER + t, line, mask=t < INNER)
    if weights.momentum is not None:
        line = sums.dmomentum - tl.sum(x * sums.read_s, 1) + tl.where(t == last, sums.dmoved, 0.0)
        tl.store(made.momentum + place * INNER + t, line, mask=t < INNER)
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
def finish(sums, b, weights, scale, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """dq (without its scale), dk, derr and the gradients of the last row's c_j, when all units are in ``sums``."""
    dq = b.keep * sums.read
    dq = add_product(-b.rows * sums.scores, b.k, dq, TYPE, PRECISION)
    dk = add_product(-tl.trans(b.rows * sums.scores) * scale, b.q, sums.dk, TYPE, PRECISION)
    derr = sums.derr + b.last * sums.ended
    derr = add_product(-tl.trans(b.rows * sums.pulls), b.dy, derr, TYPE, PRECISION)
    dlast = sums.dlast - tl.sum(sums.ended * b.err, 1)
    if weights.momentum is not None:
        dq -= b.moved * sums.read_s
        derr += b.strength * sums.ended_s
    return dq, dk, derr, dlast


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
    ROUTED: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, INNER: tl.constexpr, BB: tl.constexpr,
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
        b = load_block(
            rows, saved, shares, weights, bh, segment, place, j0, stop, scale, T, H, N, False, PRECISION, dims, INNER,
            BB,
        )  # fmt: skip
        t = j0 + tl.arange(0, BB)
        gate = gate_of(shares, bh, segment, t, t < stop, T, N)[:, None]
        U = load_up(states.up + place * up, e, dims)
        W = load_down(states.down + place * down, e, dims)
        z = load_rows(saved.z + bh * T * dims.SE, j0, stop, dims.SE, e, dims.SE, BB, dims.EB)
        dh = load_rows(saved.dhidden + bh * T * dims.SE, j0, stop, dims.SE, e, dims.SE, BB, dims.EB) * gate
        sums, dU, dW, dback, dz, _, slope, bend, R = add_units(
            no_sums(dims, BB), b, U, W, aU, aW, z, dh, weights, scale, TYPE, PRECISION
        )
        sums, aU, aW = add_layers(sums, b, U, W, dU, dW, dback, dz, slope, bend, R, TYPE, PRECISION)
        dq, dk, derr, dlast = finish(sums, b, weights, scale, TYPE, PRECISION)
        store_coefficients(
            sums, b, weights, dweights, block * heads * P + place, stop - j0 - 1, dlast, scale, INNER, BB
        )  # fmt: skip
        if ROUTED:
            if block == 0:
                rest = mean_pull(keys, seg_last, segment, chunk, rest, bh, N, dims)
                dk, rest = pull_keys(dk, rest, rows.u, keys, bh, j0, stop, T, H, PRECISION, dims, BB)
        store_rows(made.dq + token * dims.DK, dq * scale, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
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


@triton.jit(do_not_specialize=["T", "H", "N", "P"])
def walk_lanes_kernel(
    rows, saved, shares, keys, weights, dweights, states, dends, moments, chunks, seg_last, made, scale, T, H, N, P,
    ROUTED: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, INNER: tl.constexpr,
    BB: tl.constexpr,
):  # fmt: skip
    """One program: a lane of a head, from its last inner chunk to its first; its gradients are in memory."""
    TYPE: tl.constexpr = rows.k.dtype.element_ty
    PK: tl.constexpr = dims.PK
    bh = tl.program_id(1).to(tl.int64)
    token = bh // H * T * H + bh % H
    first = tl.load(chunks.lanes + tl.program_id(0) * 2)
    past = tl.load(chunks.lanes + tl.program_id(0) * 2 + 1)
    own_place = bh * tl.num_programs(0) + tl.program_id(0)
    rest = tl.zeros([PK], tl.float32)
    # One stage: no load of a state may go ahead of the store before it.
    for m in tl.range(0, past - first, num_stages=1):
        # What is read now other threads may have written.
        tl.debug_barrier()
        chunk = past - 1 - m
        place = bh * P + chunk
        j0 = tl.load(chunks.begin + chunk)
        stop = tl.load(chunks.end + chunk)
        segment = tl.load(chunks.segment + chunk)
        before = tl.load(chunks.entering + chunk)
        source = bh * N + segment
        target = bh * N + tl.load(chunks.segment + tl.where(before >= 0, before, chunk))
        b = load_block(
            rows, saved, shares, weights, bh, segment, place, j0, stop, scale, T, H, N, True, PRECISION, dims, INNER,
            BB,
        )  # fmt: skip
        sums = walk_units(
            b, states, dends, moments, saved, weights, shares, bh, segment, place, source, target, own_place, j0, stop,
            scale, T, N, TYPE, PRECISION, dims, BB,
        )  # fmt: skip
        dq, dk, derr, dlast = finish(sums, b, weights, scale, TYPE, PRECISION)
        store_coefficients(sums, b, weights, dweights, place, stop - j0 - 1, dlast, scale, INNER, BB)
        derr *= 2.0
        # What is read now other threads have written.
        tl.debug_barrier()
        dk = add_outputs(dk, derr, b.k, states, dends, place, target, TYPE, PRECISION, dims)
        if ADDS:
            dk += derr
        if ROUTED:
            rest = mean_pull(keys, seg_last, segment, chunk, rest, bh, N, dims)
            dk, rest = pull_keys(dk, rest, rows.u, keys, bh, j0, stop, T, H, PRECISION, dims, BB)
        dq_place = made.dq + token * dims.DK
        dq = dq * scale + load_rows(dq_place, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
        store_rows(dq_place, dq, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
        store_rows(made.dk + token * dims.DK, dk, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
        store_rows(made.dv + token * dims.DV, -derr, j0, stop, H * dims.DV, 0, dims.DV, BB, dims.PV)


def _sliced(
    rows: Rows, saved: Saved, shares: Shares, keys: Keys | None, weights: Weights, states: Layers, dends: Layers,
    made: Made, chunks: Chunks, seg_last: torch.Tensor, scale: float, ROUTED: bool, PRECISION: str, dims: Dims,
    INNER: int, bb: int, num_warps: int, num_stages: int,
) -> Weights:  # fmt: skip
    """The walk where errors are -v: parts of all gradients, added up."""
    B, T, H, _ = rows.k.shape
    blocks, P, N = triton.cdiv(dims.SE, dims.EB), chunks.begin.shape[0], dends.up.shape[0] // (B * H)
    parts = Made(*(x.new_empty((blocks, *x.shape)) for x in made))
    dweights = Weights(weights.rows.new_empty((blocks, *weights.rows.shape)))
    walk_slices_kernel[(blocks * chunks.lanes.shape[0], B * H)](
        rows=rows, saved=saved, shares=shares, keys=keys, weights=weights, dweights=dweights, states=states,
        dends=dends, chunks=chunks, seg_last=seg_last, made=parts, scale=scale, T=T, H=H, N=N, P=P, ROUTED=ROUTED,
        PRECISION=PRECISION, dims=dims, INNER=INNER, BB=bb, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    made.dq.add_(parts.dq.sum(0))
    torch.sum(parts.dk, 0, out=made.dk)
    torch.sum(parts.dv, 0, out=made.dv)
    return Weights(dweights.rows.sum(0))


def deep_write_backward(
    rows: Rows,
    saved: Saved,
    shares: Shares,
    keys: Keys | None,
    weights: Weights,
    states: Layers,
    dends: Layers,
    made: Made,
    lanes: torch.Tensor,
    tables: Tables,
    scale: float,
    adds: bool,
    SQUARED: bool, ROUTED: bool, PRECISION: str, DK: int, DV: int, PK: int, PV: int, SK: int, SV: int, SE: int,
    INNER: int, EB: int, num_warps: int, num_stages: int,
) -> Weights:  # fmt: skip
    """dk, dv and the rest of dq, and the gradients of the coefficients.

    Args:
        saved: of :mod:`deep_online_backward`, or of the mixture.
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
    if not SQUARED:
        return _sliced(
            rows, saved, shares, keys, weights, states, dends, made, chunks, tables.seg_last, scale, ROUTED, PRECISION,
            dims, INNER, bb, num_warps, num_stages,
        )  # fmt: skip
    dweights = Weights(*(None if x is None else torch.empty_like(x) for x in weights))
    moments = None
    if weights.momentum is not None:
        moments = Layers(dends.up.new_zeros((B * H * L, SK, SE)), dends.up.new_zeros((B * H * L, SE, SV)))
    walk_lanes_kernel[(L, B * H)](
        rows=rows, saved=saved, shares=shares, keys=keys, weights=weights, dweights=dweights, states=states,
        dends=dends, moments=moments, chunks=chunks, seg_last=tables.seg_last, made=made, scale=scale, T=T, H=H, N=N,
        P=P, ROUTED=ROUTED, ADDS=adds, PRECISION=PRECISION, dims=dims, INNER=INNER, BB=bb, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return dweights
