"""What the reads of the online memory give, and their gradients, one inner chunk at a time (Eq. 6-17, 30-36).

Row t of an inner chunk reads the layers that it has written, with x = scale q and the rows of :mod:`deep_replay`:

    hidden_t = c_t x_t U - d_t x_t S_U - sum_{j <= t} c_tj (x_t . k_j) back_j
    dz_t     = c_t dy_t W^T - d_t dy_t S_W^T - sum_{j <= t} c_tj (dy_t . err_j) z_j

z = gelu(hidden) and dhidden = dz gelu'(hidden) unless the parameters of all states are mixed before (soup, mean); the
own gate is left out of both. <z, dz> is the gradient of the own gate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .deep_backward_common import (
    Chunks,
    Dims,
    Layers,
    Saved,
    Tables,
    Weights,
    add_product,
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
