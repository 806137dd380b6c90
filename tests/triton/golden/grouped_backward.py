"""Gradients of the read of the cached states that ssc chose, grouped by state (Eq. 16-17): as top_k costs, not as N.

A pair is a token t and one of its chosen segments i. Pairs in the order of their segments are rows of products:

    P_t^(i) = dy_t M^(i)T        dgamma_t^(i) = scale <q_t, P_t^(i)>        and of dq_t / scale: gamma_t^(i) P_t^(i)
    dS_i = scale sum_t gamma_t^(i) q_t^T dy_t                               over the pairs of segment i

:mod:`read_backward` adds up the parts of dq.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .backward_common import Gates, Tables, last_pieces
from .common import Dims, load_state

DK = 128
PK = 128
SK = 128
DV = 128
PV = 128
SV = 128
BK = 128
BT = 64
num_stages = 3
num_warps = 8


@triton.jit(do_not_specialize=["heads", "top_k", "T", "H", "N", "P"])
def chosen_kernel(
    q, dy, states, gates, seg_last, partial, dgamma, dends, scale, heads, top_k, T, H, N, P, dims: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: all pairs of a segment of a head, BK key columns."""
    KEYS: tl.constexpr = (dims.DK + BK - 1) // BK
    PV: tl.constexpr = dims.PV
    # The first segments, with the most pairs, come first, of all heads: few programs are left for the end.
    bh = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads % KEYS
    i = tl.program_id(0) // heads // KEYS
    key = block * BK
    starts = gates.starts + bh * (N + 2) + i
    first = tl.load(starts)
    stop = tl.load(starts + 1)
    order = gates.order + bh * (T * top_k)
    picked = gates.picked + bh * (T * top_k)
    dgamma += (block * heads + bh) * (T * top_k)
    partial += bh * (T * top_k) * dims.DK
    keys = key + tl.arange(0, BK)
    values = tl.arange(0, PV)
    last = i
    if seg_last is not None:
        last = tl.load(seg_last + i)
    state = load_state(states + (bh * P + last) * (dims.SK * dims.SV), key, 0, dims.SK, dims.SV, BK, PV)
    grad = tl.zeros([PV, BK], tl.float32)
    for p0 in range(first, stop, BT):
        pair = p0 + tl.arange(0, BT)
        valid = pair < stop
        place = tl.load(order + pair, mask=valid, other=0)
        t = place // top_k
        row = ((bh // H * T + t) * H + bh % H)[:, None]
        inside = valid[:, None] & (keys < dims.DK)[None, :]
        q_t = tl.load(q + row * dims.DK + keys[None, :], mask=inside, other=0.0)
        dy_t = tl.load(
            dy + row * dims.DV + values[None, :], mask=valid[:, None] & (values < dims.DV)[None, :], other=0.0
        )
        total = tl.load(gates.lse + bh * T + t, mask=valid, other=0.0)
        gamma = tl.exp(tl.load(picked + place, mask=valid, other=float("-inf")) - total)
        read = tl.dot(dy_t, tl.trans(state), input_precision="tf32x3")
        tl.store(dgamma + place, tl.sum(q_t.to(tl.float32) * read, 1) * scale, mask=valid)
        out = partial + place.to(tl.int64)[:, None] * dims.DK + keys[None, :]
        tl.store(out, (read * gamma[:, None]).to(partial.dtype.element_ty), mask=inside)
        weighted = (q_t.to(tl.float32) * gamma[:, None]).to(dy_t.dtype)
        grad = tl.dot(tl.trans(dy_t), weighted, grad, input_precision="tf32x3")
    grad = tl.trans(grad)
    out = dends + (bh * P + last) * (dims.SK * dims.SV) + keys[:, None] * dims.SV + values[None, :]
    tl.store(
        out, (grad * scale).to(dends.dtype.element_ty), mask=(keys < dims.SK)[:, None] & (values < dims.SV)[None, :]
    )


def grouped_backward(
    q: torch.Tensor, dy: torch.Tensor, states: torch.Tensor, gates: Gates, tables: Tables, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """partial ``[B*H, T, top_k, DK]``, of q's dtype; dgamma ``[B*H, T, top_k]``, float32; dends ``[B*H, P, SK, SV]``.

    Args:
        q [B, T, H, DK], dy [B, T, H, DV], states [B*H, P, SK, SV]: of one dtype.
        OPERAND: where gated rows wait for their product, "registers" (a left operand) or "shared" memory (a right one).

    Returns:
        Of every pair, its part of dq without ``scale``, and the gradient of its gate, where it has a segment; the
        gradient of every segment's state, at its last piece: float32 where it is carried on, else of q's dtype.
    """
    B, T, H, _ = q.shape
    N, top_k = tables.seg_first.shape[0], gates.picked.shape[-1]
    bk = min(BK, PK)
    blocks = triton.cdiv(DK, bk)
    partial = q.new_empty((B * H, T, top_k, DK))
    dgamma = q.new_empty((blocks, *gates.picked.shape), dtype=torch.float32)
    dends = q.new_empty(states.shape, dtype=torch.float32 if tables.crosses else q.dtype)
    chosen_kernel[(blocks * N * B * H,)](
        q=q, dy=dy, states=states,
        gates=Gates(lse=gates.lse, picked=gates.picked, order=gates.order, starts=gates.starts),
        seg_last=last_pieces(tables), partial=partial, dgamma=dgamma, dends=dends, scale=scale, heads=B * H,
        top_k=top_k, T=T, H=H, N=N, P=states.shape[1], dims=Dims(DK, DV, PK, PV, SK, SV), BT=BT, BK=bk,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return partial, dgamma[0] if blocks == 1 else dgamma.sum(0), dends
