"""What the reads of the online memory give, and their gradients, one inner chunk at a time (Eq. 6-17, 30-36).

Row t of an inner chunk reads the layers that it has written, with x = scale q and the rows of :mod:`deep_replay`:

    hidden_t = c_t x_t U - d_t x_t S_U - sum_{j <= t} c_tj (x_t . k_j) back_j
    dz_t     = c_t dy_t W^T - d_t dy_t S_W^T - sum_{j <= t} c_tj (dy_t . err_j) z_j

z = gelu(hidden) and dhidden = dz gelu'(hidden) unless the parameters of all states are mixed before (soup, mean); the
own gate is left out of both. <z, dz> is the gradient of the own gate.

From z and dhidden, of the online read or of the mixture, with gates, A = c_tj, P = x K^T and G = dy err^T:

    dx = c dh U^T - d dh S_U^T - (A Gh) K      Gh = sum dh back^T over hidden units
    dK = -(A Gh)^T x                           Pz = sum z Z^T over hidden units
    derr = -(A Pz)^T dy                        dc_tj = -(P Gh + Pz G)
    dc_t = <x U, dh> + <z W, dy>               dd_t = -<x S_U, dh> - <z S_W, dy>
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
    load_square,
    load_up,
    product,
)
from .deep_common import gelu_slope_as, load_rows, store_rows


@triton.jit(do_not_specialize=["T", "H", "P"])
def online_backward_kernel(
    q, k, v, dy, states, weights, saved, own, chunks, scale, T, H, P,
    SQUARED: tl.constexpr, MIXES: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, INNER: tl.constexpr,
    BB: tl.constexpr,
):  # fmt: skip
    """One program: EB hidden units of an inner chunk of a head."""
    TYPE: tl.constexpr = k.dtype.element_ty
    BLOCKS: tl.constexpr = (dims.SE + dims.EB - 1) // dims.EB
    block = tl.program_id(0) % BLOCKS
    chunk = tl.program_id(0) // BLOCKS
    e = block * dims.EB
    bh = tl.program_id(1).to(tl.int64)
    token = bh // H * T * H + bh % H
    place = bh * P + chunk
    j0 = tl.load(chunks.begin + chunk)
    stop = tl.load(chunks.end + chunk)
    t = j0 + tl.arange(0, BB)
    k_j = load_rows(k + token * dims.DK, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
    q_j = load_rows(q + token * dims.DK, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
    dy_j = load_rows(dy + token * dims.DV, j0, stop, H * dims.DV, 0, dims.DV, BB, dims.PV)
    if SQUARED:
        err = load_rows(saved.errors + bh * T * dims.SV, j0, stop, dims.SV, 0, dims.SV, BB, dims.PV)
    else:
        err = -load_rows(v + token * dims.DV, j0, stop, H * dims.DV, 0, dims.DV, BB, dims.PV).to(tl.float32)
    rows = load_square(weights.rows + place * INNER * INNER, INNER, BB)
    U = load_up(states.up + place * (dims.SK * dims.SE), e, dims)
    W = load_down(states.down + place * (dims.SE * dims.SV), e, dims)
    z_j, slope = gelu_slope_as(product(k_j, U, TYPE, PRECISION), TYPE)
    back = product(err, tl.trans(W), TYPE, PRECISION) * slope

    hidden = product(q_j, U, TYPE, PRECISION)
    dz = product(dy_j, tl.trans(W), TYPE, PRECISION)
    if weights.state is not None:
        keep = load_line(weights.state + place * INNER, INNER, BB)[:, None]
        hidden *= keep
        dz *= keep
    if weights.momentum is not None:
        moved = load_line(weights.momentum + place * INNER, INNER, BB)[:, None]
        S_up = load_up(states.s_up + place * (dims.SK * dims.SE), e, dims)
        S_down = load_down(states.s_down + place * (dims.SE * dims.SV), e, dims)
        hidden -= moved * product(q_j, S_up, TYPE, PRECISION)
        dz -= moved * product(dy_j, tl.trans(S_down), TYPE, PRECISION)
    hidden = add_product(-rows * product(q_j, tl.trans(k_j), TYPE, PRECISION), back, hidden, TYPE, PRECISION) * scale
    dz = add_product(-rows * product(dy_j, tl.trans(err), TYPE, PRECISION), z_j, dz, TYPE, PRECISION)
    if not MIXES:
        hidden, slope = gelu_slope_as(hidden, TYPE)
        part = (block * tl.num_programs(1) + bh) * T
        tl.store(own + part + t, tl.sum(hidden * dz, 1), mask=t < stop)
        dz *= slope
    store_rows(saved.z + bh * T * dims.SE, hidden, j0, stop, dims.SE, e, dims.SE, BB, dims.EB)
    store_rows(saved.dhidden + bh * T * dims.SE, dz, j0, stop, dims.SE, e, dims.SE, BB, dims.EB)


@triton.jit
def add_reads(
    z, dh, h, back, b, U, W, sums, weights, states, place, e, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    dims: tl.constexpr,
):  # fmt: skip
    """``sums``, Gh, Pz, dh U^T, dh S_U^T, and those of dc_t and dd_t, with those of a block of hidden units."""
    scores, pulls, read, read_s, dstate, dmoved = sums
    scores = add_product(dh, tl.trans(back), scores, TYPE, PRECISION)
    pulls = add_product(z, tl.trans(h), pulls, TYPE, PRECISION)
    read = add_product(dh, tl.trans(U), read, TYPE, PRECISION)
    if weights.state is not None:
        dstate += tl.sum(z * product(b.dy, tl.trans(W), TYPE, PRECISION), 1)
    if weights.momentum is not None:
        S_up = load_up(states.s_up + place * (dims.SK * dims.SE), e, dims)
        S_down = load_down(states.s_down + place * (dims.SE * dims.SV), e, dims)
        read_s = add_product(dh, tl.trans(S_up), read_s, TYPE, PRECISION)
        dmoved -= tl.sum(z * product(b.dy, tl.trans(S_down), TYPE, PRECISION), 1)
    return scores, pulls, read, read_s, dstate, dmoved


@triton.jit(do_not_specialize=["T", "H", "N", "P"])
def online_sums_kernel(
    rows, saved, shares, weights, dweights, states, chunks, made, scale, T, H, N, P,
    SQUARED: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, INNER: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """One program: an inner chunk of a head."""
    TYPE: tl.constexpr = rows.k.dtype.element_ty
    PK: tl.constexpr = dims.PK
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    token = bh // H * T * H + bh % H
    place = bh * P + chunk
    j0 = tl.load(chunks.begin + chunk)
    stop = tl.load(chunks.end + chunk)
    s = tl.load(chunks.segment + chunk)
    b = load_chunk(
        rows, saved.errors, shares, weights, bh, s, place, j0, stop, scale, T, H, N, PRECISION, dims, INNER, BB
    )
    i = tl.arange(0, BB)
    gate = gate_of(shares, bh, s, j0 + i, j0 + i < stop, T, N)[:, None]
    square = tl.zeros([BB, BB], tl.float32)
    keys = tl.zeros([BB, PK], tl.float32)
    line = tl.zeros([BB], tl.float32)
    sums = (square, square, keys, keys, line, line)
    for e in range(0, dims.SE, dims.EB):
        U = load_up(states.up + place * (dims.SK * dims.SE), e, dims)
        W = load_down(states.down + place * (dims.SE * dims.SV), e, dims)
        z = load_rows(saved.z + bh * T * dims.SE, j0, stop, dims.SE, e, dims.SE, BB, dims.EB)
        dh = load_rows(saved.dhidden + bh * T * dims.SE, j0, stop, dims.SE, e, dims.SE, BB, dims.EB) * gate
        h, slope = gelu_slope_as(product(b.k, U, TYPE, PRECISION), TYPE)
        back = product(b.err, tl.trans(W), TYPE, PRECISION) * slope
        sums = add_reads(z, dh, h, back, b, U, W, sums, weights, states, place, e, TYPE, PRECISION, dims)
    scores, pulls, read, read_s, dstate, dmoved = sums
    x = b.q.to(tl.float32) * scale
    inside = (i < INNER)[:, None] & (i < INNER)[None, :]
    drows = -(b.scores * scores + b.pulls * pulls)
    tl.store(dweights.rows + place * INNER * INNER + i[:, None] * INNER + i[None, :], drows, mask=inside)
    dq = read
    if weights.state is not None:
        dq *= load_line(weights.state + place * INNER, INNER, BB)[:, None]
        tl.store(dweights.state + place * INNER + i, dstate + tl.sum(x * read, 1), mask=i < INNER)
    if weights.momentum is not None:
        dq -= load_line(weights.momentum + place * INNER, INNER, BB)[:, None] * read_s
        tl.store(dweights.momentum + place * INNER + i, dmoved - tl.sum(x * read_s, 1), mask=i < INNER)
    dq = add_product(-b.rows * scores, b.k, dq, TYPE, PRECISION) * scale
    dk = product(-tl.trans(b.rows * scores), b.q, TYPE, PRECISION) * scale
    derr = product(-tl.trans(b.rows * pulls), b.dy, TYPE, PRECISION)
    dq += load_rows(made.dq + token * dims.DK, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
    store_rows(made.dq + token * dims.DK, dq, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
    store_rows(made.dk + token * dims.DK, dk, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
    if SQUARED:
        store_rows(made.derr + bh * T * dims.SV, derr, j0, stop, dims.SV, 0, dims.SV, BB, dims.PV)
    else:
        store_rows(made.dv + token * dims.DV, -derr, j0, stop, H * dims.DV, 0, dims.DV, BB, dims.PV)


def deep_online_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dy: torch.Tensor,
    states: Layers,
    errors: torch.Tensor | None,
    weights: Weights,
    tables: Tables,
    scale: float,
    SQUARED: bool, MIXES: bool, PRECISION: str, DK: int, DV: int, PK: int, PV: int, SK: int, SV: int, SE: int,
    INNER: int, EB: int, num_warps: int, num_stages: int,
) -> tuple[Saved, torch.Tensor | None]:  # fmt: skip
    """Hidden units and their gradients at every token, and the own gate's gradient.

    Args:
        q, k [B, T, H, DK], v, dy [B, T, H, DV]: of one dtype.
        states, errors: of :mod:`deep_replay`.

    Returns:
        Saved z and dhidden [B*H, T, SE] in q's dtype, hidden and dz where parameters are mixed; and, where not, the
        gradients of the own gate [blocks, B*H, T], float32, to be added up.
    """
    _, T, H, _ = q.shape
    heads, P = q.shape[0] * H, tables.begin.shape[0]
    eb = min(EB, max(16, triton.next_power_of_2(SE)))
    blocks = triton.cdiv(SE, eb)
    z = q.new_empty((heads, T, SE))
    saved = Saved(errors, z, torch.empty_like(z))
    own = None if MIXES else q.new_empty((blocks, heads, T), dtype=torch.float32)
    online_backward_kernel[(blocks * P, heads)](
        q=q, k=k, v=v, dy=dy, states=states, weights=weights, saved=saved, own=own,
        chunks=Chunks(tables.begin, tables.end), scale=scale, T=T, H=H, P=P, SQUARED=SQUARED, MIXES=MIXES,
        PRECISION=PRECISION, dims=Dims(DK, DV, PK, PV, SK, SV, SE, eb), INNER=INNER,
        BB=max(16, triton.next_power_of_2(INNER)), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return saved, own


def online_sums(
    rows: Rows,
    saved: Saved,
    shares: Shares,
    weights: Weights,
    states: Layers,
    made: Made,
    tables: Tables,
    scale: float,
    SQUARED: bool, PRECISION: str, DK: int, DV: int, PK: int, PV: int, SK: int, SV: int, SE: int, INNER: int, EB: int,
    num_warps: int, num_stages: int,
) -> tuple[Weights, Made]:  # fmt: skip
    """The online reads' share of the gradients of coefficients, of dk, dv or derr; that of dq is added to ``made``.

    Args:
        saved: as :func:`deep_online_backward` gives it, or of the mixture.
        made: dq [B, T, H, DK] is there; dk, dv or derr are written.

    Returns:
        The gradients of coefficients, of which those of the last rows, of p and of s_j are not written; ``made`` with
        derr.
    """
    B, T, H, _ = rows.k.shape
    P, N = tables.begin.shape[0], tables.seg_begin.shape[0]
    dweights = Weights(*(None if x is None else torch.empty_like(x) for x in weights))
    if SQUARED:
        made = made._replace(derr=made.dq.new_empty((B * H, T, SV)))
    eb = min(EB, max(16, triton.next_power_of_2(SE)))
    online_sums_kernel[(P, B * H)](
        rows=rows._replace(u=None), saved=saved, shares=shares, weights=weights, dweights=dweights, states=states,
        chunks=Chunks(tables.begin, tables.end, tables.segment), made=made, scale=scale, T=T, H=H, N=N, P=P,
        SQUARED=SQUARED, PRECISION=PRECISION, dims=Dims(DK, DV, PK, PV, SK, SV, SE, eb), INNER=INNER,
        BB=max(16, triton.next_power_of_2(INNER)), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return dweights, made
