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
    gate_of,
    load_chunk,
    load_down,
    load_up,
    store_down,
    store_up,
)
from .deep_common import load_rows, store_rows
from .deep_walk_common import (
    Keys,
    add_layers,
    add_units,
    load_ends,
    mean_pull,
    no_sums,
    pull_keys,
    store_coefficients,
)

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
            no_sums(dims, BB), b, by, U, W, aU, aW, z, dh, weights, scale, place, INNER, BB, TYPE, "ieee"
        )
        sums, aU, aW = add_layers(sums, b, U, W, dU, dW, dback, dz, slope, bend, R, TYPE, "ieee")
        derr = sums.derr + by.last * sums.ended
        dk = sums.dk
        dlast = sums.dlast - tl.sum(sums.ended * b.err, 1)
        store_coefficients(sums, b, weights, dweights, block * heads * P + place, stop - j0 - 1, dlast, INNER, BB)
        if block == 0:
            rest = mean_pull(keys, seg_last, segment, chunk, rest, bh, N, dims)
            dk, rest = pull_keys(dk, rest, rows.u, keys, bh, j0, stop, T, H, "ieee", dims, BB)
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
