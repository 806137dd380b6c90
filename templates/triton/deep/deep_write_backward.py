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
from .deep_common import gelu_slope_as, load_rows, store_rows
from .deep_walk_common import (
    Keys,
    Sums,
    add_layers,
    add_units,
    load_ends,
    mean_pull,
    no_sums,
    pull_keys,
    store_coefficients,
)


@triton.jit
def add_momentum(
    sums, b, by, dback, dz, h, slope, R, aU, aW, S_up, S_down, bU, bW, z, dh, scale, moved, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums, dback and dz with what the momentum says of a block of hidden units; dS_U and dS_W.

    ``moved`` [BB, 1]: d_t.
    """
    back = R * slope
    ended_s = add_product(h, bW, sums.ended_s, TYPE, PRECISION)
    left = product(b.k, bU, TYPE, PRECISION)
    dback += by.strength * left
    dz += by.strength * product(b.err, tl.trans(bW), TYPE, PRECISION)
    dk = add_product(by.strength * back, tl.trans(bU), sums.dk, TYPE, PRECISION)
    dproducts = sums.dproducts + tl.sum(left * back, 1)
    dmoved = sums.dmoved - tl.sum(tl.sum(S_up * aU, 1), 0) - tl.sum(tl.sum(S_down * aW, 1), 0)
    ddecay = sums.ddecay + tl.sum(tl.sum(S_up * bU, 1), 0) + tl.sum(tl.sum(S_down * bW, 1), 0)
    dS_up = by.decay * bU - by.moved * aU
    dS_down = by.decay * bW - by.moved * aW
    dS_up = add_product(tl.trans(b.q), -moved * dh * scale, dS_up, TYPE, PRECISION)
    dS_down = add_product(tl.trans(z), -moved * b.dy, dS_down, TYPE, PRECISION)
    made = Sums(sums.derr, dk, sums.ended, ended_s, sums.dlast, dproducts, sums.dkeep, dmoved, ddecay)
    return made, dback, dz, dS_up, dS_down


@triton.jit
def walk_units(
    b, by, states, dends, moments, saved, weights, shares, bh, s, place, source, target, own_place, j0, stop, scale, T,
    N, TYPE: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, INNER: tl.constexpr, BB: tl.constexpr,
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
            sums, b, by, U, W, aU, aW, z, dh, weights, scale, place, INNER, BB, TYPE, PRECISION
        )
        if weights.momentum is not None:
            S_up = load_up(states.s_up + place * up, e, dims)
            S_down = load_down(states.s_down + place * down, e, dims)
            moved = load_line(weights.momentum + place * INNER, INNER, BB)[:, None]
            bU = load_up(moments.up + own_place * up, e, dims)
            bW = load_down(moments.down + own_place * down, e, dims)
            sums, dback, dz, dS_up, dS_down = add_momentum(
                sums, b, by, dback, dz, h, slope, R, aU, aW, S_up, S_down, bU, bW, z, dh, scale, moved, TYPE,
                PRECISION,
            )  # fmt: skip
            store_up(moments.up + own_place * up, e, dS_up, dims)
            store_down(moments.down + own_place * down, e, dS_down, dims)
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
        b = load_chunk(
            rows, None, shares, weights, bh, segment, place, j0, stop, scale, T, H, N, PRECISION, dims, INNER, BB
        )
        by = load_ends(weights, place, stop - j0, INNER, BB)
        t = j0 + tl.arange(0, BB)
        gate = gate_of(shares, bh, segment, t, t < stop, T, N)[:, None]
        U = load_up(states.up + place * up, e, dims)
        W = load_down(states.down + place * down, e, dims)
        z = load_rows(saved.z + bh * T * dims.SE, j0, stop, dims.SE, e, dims.SE, BB, dims.EB)
        dh = load_rows(saved.dhidden + bh * T * dims.SE, j0, stop, dims.SE, e, dims.SE, BB, dims.EB) * gate
        sums, dU, dW, dback, dz, _, slope, bend, R = add_units(
            no_sums(dims, BB), b, by, U, W, aU, aW, z, dh, weights, scale, place, INNER, BB, TYPE, PRECISION
        )
        sums, aU, aW = add_layers(sums, b, U, W, dU, dW, dback, dz, slope, bend, R, TYPE, PRECISION)
        derr = sums.derr + by.last * sums.ended
        dk = sums.dk
        dlast = sums.dlast - tl.sum(sums.ended * b.err, 1)
        store_coefficients(sums, b, weights, dweights, block * heads * P + place, stop - j0 - 1, dlast, INNER, BB)
        if ROUTED:
            if block == 0:
                rest = mean_pull(keys, seg_last, segment, chunk, rest, bh, N, dims)
                dk, rest = pull_keys(dk, rest, rows.u, keys, bh, j0, stop, T, H, PRECISION, dims, BB)
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
        b = load_chunk(
            rows, saved.errors, shares, weights, bh, segment, place, j0, stop, scale, T, H, N, PRECISION, dims,
            INNER, BB,
        )  # fmt: skip
        by = load_ends(weights, place, stop - j0, INNER, BB)
        sums = walk_units(
            b, by, states, dends, moments, saved, weights, shares, bh, segment, place, source, target, own_place, j0,
            stop, scale, T, N, TYPE, PRECISION, dims, INNER, BB,
        )  # fmt: skip
        dk = sums.dk + load_rows(made.dk + token * dims.DK, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
        derr = load_rows(made.derr + bh * T * dims.SV, j0, stop, dims.SV, 0, dims.SV, BB, dims.PV)
        derr += sums.derr + by.last * sums.ended
        if weights.momentum is not None:
            derr += by.strength * sums.ended_s
        dlast = sums.dlast - tl.sum(sums.ended * b.err, 1)
        store_coefficients(sums, b, weights, dweights, place, stop - j0 - 1, dlast, INNER, BB)
        derr *= 2.0
        # What is read now other threads have written.
        tl.debug_barrier()
        dk = add_outputs(dk, derr, b.k, states, dends, place, target, TYPE, PRECISION, dims)
        if ADDS:
            dk += derr
        if ROUTED:
            rest = mean_pull(keys, seg_last, segment, chunk, rest, bh, N, dims)
            dk, rest = pull_keys(dk, rest, rows.u, keys, bh, j0, stop, T, H, PRECISION, dims, BB)
        store_rows(made.dk + token * dims.DK, dk, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
        store_rows(made.dv + token * dims.DV, -derr, j0, stop, H * dims.DV, 0, dims.DV, BB, dims.PV)


def _sliced(
    rows: Rows, saved: Saved, shares: Shares, keys: Keys | None, weights: Weights, states: Layers, dends: Layers,
    made: Made, chunks: Chunks, seg_last: torch.Tensor, scale: float, ROUTED: bool, PRECISION: str, dims: Dims,
    INNER: int, bb: int, num_warps: int, num_stages: int,
) -> torch.Tensor:  # fmt: skip
    """The walk where errors are -v: parts of all gradients, added up; those of the last rows' c_j."""
    B, T, H, _ = rows.k.shape
    blocks, P, N = triton.cdiv(dims.SE, dims.EB), chunks.begin.shape[0], dends.up.shape[0] // (B * H)
    dk, dv = (x.new_empty((blocks, *x.shape)) for x in (made.dk, made.dv))
    last = weights.last.new_empty((blocks, *weights.last.shape))
    walk_slices_kernel[(blocks * chunks.lanes.shape[0], B * H)](
        rows=rows, saved=saved, shares=shares, keys=keys, weights=weights, dweights=Weights(None, last), states=states,
        dends=dends, chunks=chunks, seg_last=seg_last, made=Made(None, dk, dv), scale=scale, T=T, H=H, N=N, P=P,
        ROUTED=ROUTED, PRECISION=PRECISION, dims=dims, INNER=INNER, BB=bb, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    made.dk.add_(dk.sum(0))
    made.dv.add_(dv.sum(0))
    return last.sum(0)


def deep_write_backward(
    rows: Rows,
    saved: Saved,
    shares: Shares,
    keys: Keys | None,
    weights: Weights,
    dweights: Weights,
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
    if not SQUARED:
        last = _sliced(
            rows, saved, shares, keys, weights, states, dends, made, chunks, tables.seg_last, scale, ROUTED, PRECISION,
            dims, INNER, bb, num_warps, num_stages,
        )  # fmt: skip
        return dweights._replace(last=last)
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
