"""Gradients of the gates to logits, connectors and mean keys (Eq. 8-10, 16-17).

    dr_t^(i) = gamma_t^(i) (dgamma_t^(i) - sum_j gamma_t^(j) dgamma_t^(j))        the logits' gradient
    du_t = sum_{i < s} dr_t^(i) p_i + dr_t^(s) pbar_t          pbar_t: the mean of the segment's keys up to t
    dp_i = sum_t dr_t^(i) u_t                                  over the later tokens of the sequence

Under ssc with FORMULATION "grouped" a token has only the gates of the segments that it chose, by pairs.

Mean keys have much in common while the dr of a token sum to zero, so that their products are of float32 accuracy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .backward_common import GateGradients, Gates, Keys, Pieces, ReadGradients, Segments, Tables
from .common import Dims, load_rows

DK = 128
PK = 128
SK = 128
DV = 128
PV = 128
SV = 128
BT = 64
num_stages = 2
num_warps = 8


@triton.jit
def add_parts(total, x, place, mask, stride, PARTS):
    """``total`` and what stands at ``place`` in each part of x, ``stride`` apart."""
    for p in range(PARTS):
        total += tl.load(x + p * stride + place, mask=mask, other=0.0)
    return total


@triton.jit
def pair_gradients(
    grad, delta, gates, dgamma, chosen_dr, means, total, bh, t, valid, top_k, T, N, dims: tl.constexpr
):  # fmt: skip
    """du ``[BT, PK]`` and delta, to which the segments that ssc chose are added; the dr of pairs are written."""
    cols = tl.arange(0, dims.PK)
    for r in range(0, top_k):
        place = (bh * T + t) * top_k + r
        gamma = tl.exp(tl.load(gates.picked + place, mask=valid, other=float("-inf")) - total)
        # Without a segment nothing was written.
        delta += gamma * tl.load(dgamma + place, mask=valid & (gamma > 0.0), other=0.0)
    for r in range(0, top_k):
        place = (bh * T + t) * top_k + r
        gamma = tl.exp(tl.load(gates.picked + place, mask=valid, other=float("-inf")) - total)
        dr = gamma * (tl.load(dgamma + place, mask=valid & (gamma > 0.0), other=0.0) - delta)
        tl.store(chosen_dr + place, dr, mask=valid)
        i = tl.load(gates.chosen + place, mask=valid, other=0)
        inside = (valid & (i < N))[:, None] & (cols < dims.SK)[None, :]
        grad += dr[:, None] * tl.load(
            means + (bh * N + i)[:, None] * dims.SK + cols[None, :], mask=inside, other=0.0
        )  # fmt: skip
    return grad, delta


@triton.jit
def running_keys(
    k, sums, segments, piece, s, start, t0, stop, bh, H, P, dims: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``[BT, PK]``: the sum of the keys of the tokens' segment up to each of them; k: of the head."""
    PK: tl.constexpr = dims.PK
    cols = tl.arange(0, PK)
    t = t0 + tl.arange(0, BT)
    earlier = tl.zeros([PK], tl.float32)
    if sums is not None:
        for p in range(tl.load(segments.piece + s), piece):
            earlier += tl.load(sums + (bh * P + p) * dims.SK + cols, mask=cols < dims.SK, other=0.0)
    for j0 in range(start, t0, BT):
        earlier += tl.sum(load_rows(k, j0, t0, H * dims.DK, 0, dims.DK, BT, PK).to(tl.float32), 0)
    k_t = load_rows(k, t0, stop, H * dims.DK, 0, dims.DK, BT, PK)
    until = tl.where(t[:, None] >= t[None, :], 1.0, 0.0).to(k_t.dtype)
    # Exact in 16 bits: ones times keys.
    return tl.dot(until, k_t, input_precision="tf32x3") + earlier[None, :]


@triton.jit(do_not_specialize=["top_k", "T", "H", "N", "P"])
def connector_kernel(
    k, keys, gates, reads, chosen_dr, pieces, segments, tiles, made, top_k, T, H, N, P, PARTS, dims: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens of a head. The first part of ``dgamma`` becomes dr, or the pairs' go to ``chosen_dr``.

    The gates of cached segments go to ``gammas``, which may be where their logits are.
    """
    tile = tiles + tl.program_id(0) * 2
    bh = tl.program_id(1).to(tl.int64)
    piece = tl.load(tile)
    t0 = tl.load(tile + 1)
    start = tl.load(pieces.begin + piece)
    stop = tl.minimum(t0 + BT, tl.load(pieces.end + piece))
    s = tl.load(pieces.segment + piece)
    first = tl.load(segments.first + s)
    part = tl.num_programs(1).to(tl.int64) * T
    head = bh // H * T * H + bh % H
    k += head * dims.DK

    t = t0 + tl.arange(0, BT)
    valid = t < stop
    total = tl.load(gates.lse + bh * T + t, mask=valid, other=0.0)
    logit_s = tl.load(gates.own + bh * T + t, mask=valid, other=float("-inf"))
    gamma_s = tl.exp(logit_s - total)
    dgamma_s = add_parts(tl.zeros([BT], tl.float32), reads.own + bh * T, t, valid, part, PARTS)
    PK: tl.constexpr = dims.PK
    grad = tl.zeros([BT, PK], tl.float32)
    cols = tl.arange(0, PK)
    grad, delta = pair_gradients(
        grad, gamma_s * dgamma_s, gates, reads.dgamma, chosen_dr, keys.means, total, bh, t, valid, top_k, T, N, dims
    )

    dr_s = gamma_s * (dgamma_s - delta) / (t - tl.load(segments.begin + s) + 1).to(tl.float32)
    tl.store(made.gate + bh * T + t, gamma_s, mask=valid)
    tl.store(made.pull + bh * T + t, dr_s, mask=valid)
    running = running_keys(k, keys.sums, segments, piece, s, start, t0, stop, bh, H, P, dims, BT)
    grad += dr_s[:, None] * running
    out = made.du + head * dims.DK + t.to(tl.int64)[:, None] * (H * dims.DK) + cols[None, :]
    tl.store(out, grad.to(made.du.dtype.element_ty), mask=valid[:, None] & (cols < dims.DK)[None, :])


@triton.jit(do_not_specialize=["top_k", "T", "H", "N"])
def chosen_descriptor_kernel(
    u,
    chosen_dr,
    order,
    starts,
    seg_begin,
    seg_end,
    dmeans,
    top_k,
    T,
    H,
    N,
    DK: tl.constexpr,
    PK: tl.constexpr,
    SK: tl.constexpr,
    BT: tl.constexpr,
):
    """One program: a segment of a head, and the pairs that chose it."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    starts += bh * (N + 2) + i
    first = tl.load(starts)
    stop = tl.load(starts + 1)
    order += bh * (T * top_k)
    chosen_dr += bh * (T * top_k)
    cols = tl.arange(0, PK)
    total = tl.zeros([BT, PK], tl.float32)
    for p0 in range(first, stop, BT):
        pair = p0 + tl.arange(0, BT)
        place = tl.load(order + pair, mask=pair < stop, other=0)
        row = ((bh // H * T + place // top_k) * H + bh % H)[:, None]
        inside = (pair < stop)[:, None] & (cols < DK)[None, :]
        u_t = tl.load(u + row * DK + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        total += u_t * tl.load(chosen_dr + place, mask=pair < stop, other=0.0)[:, None]
    grad = tl.sum(total, 0) / (tl.load(seg_end + i) - tl.load(seg_begin + i)).to(tl.float32)
    tl.store(dmeans + (bh * N + i) * SK + cols, grad, mask=cols < SK)


@triton.jit(do_not_specialize=["T", "H", "P"])
def pulls_kernel(
    u,
    pull,
    begin,
    end,
    pulls,
    T,
    H,
    P,
    DK: tl.constexpr,
    PK: tl.constexpr,
    SK: tl.constexpr,
    BT: tl.constexpr,
):
    """One program: how the tokens of a piece pull at the keys of earlier pieces of their segment."""
    piece = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    stop = tl.load(end + piece)
    u += (bh // H * T * H + bh % H) * DK
    total = tl.zeros([PK], tl.float32)
    for t0 in range(tl.load(begin + piece), stop, BT):
        t = t0 + tl.arange(0, BT)
        u_t = load_rows(u, t0, stop, H * DK, 0, DK, BT, PK).to(tl.float32)
        total += tl.sum(u_t * tl.load(pull + bh * T + t, mask=t < stop, other=0.0)[:, None], 0)
    cols = tl.arange(0, PK)
    tl.store(pulls + (bh * P + piece) * SK + cols, total, mask=cols < SK)


def gates_backward(
    k: torch.Tensor, u: torch.Tensor, means: torch.Tensor, sums: torch.Tensor | None, gates: Gates,
    dpicked: torch.Tensor | None, reads: ReadGradients, tables: Tables,
) -> GateGradients:  # fmt: skip
    """Gradients of the connectors u and of mean keys, and the gates that other gradients are made of.

    Args:
        k, u [B, T, H, DK]: of one dtype.
        means, sums: of :mod:`segment_states`.
        dpicked [B*H, T, top_k]: of :mod:`grouped_backward`, with FORMULATION "grouped"; else ``reads.dgamma`` is there,
            and is overwritten.
    """
    B, T, H, _ = u.shape
    N, P = tables.seg_first.shape[0], tables.begin.shape[0]
    made = GateGradients(du=torch.empty_like(u), gate=torch.empty_like(gates.lse), pull=torch.empty_like(gates.lse))
    top_k, dgamma, chosen_dr = 0, reads.dgamma, None
    top_k, dgamma, chosen_dr = dpicked.shape[-1], dpicked, torch.empty_like(dpicked)
    tiles = tables.tiles(BT)
    connector_kernel[(tiles.shape[0], B * H)](
        k=k, keys=Keys(means, sums), gates=gates._replace(order=None, starts=None),
        reads=ReadGradients(dgamma=dgamma, own=reads.own, delta=reads.delta), chosen_dr=chosen_dr,
        pieces=Pieces(tables.begin, tables.end, tables.segment),
        segments=Segments(begin=tables.seg_begin, first=tables.seg_first, piece=tables.seg_piece), tiles=tiles,
        made=made, top_k=top_k, T=T, H=H, N=N, P=P, PARTS=reads.own.shape[0], dims=Dims(DK, DV, PK, PV, SK, SV), BT=BT,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    dmeans = torch.empty_like(means)
    chosen_descriptor_kernel[(N, B * H)](
        u=u, chosen_dr=chosen_dr, order=gates.order, starts=gates.starts, seg_begin=tables.seg_begin,
        seg_end=tables.seg_end, dmeans=dmeans, top_k=top_k, T=T, H=H, N=N, DK=DK, PK=PK, SK=SK, BT=BT,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    pulls = _pulls(u, made.pull, means, tables, DK, PK, SK, BT, num_warps) if P > N else None
    return made._replace(dmeans=dmeans, pulls=pulls)


def _pulls(
    u: torch.Tensor, pull: torch.Tensor, means: torch.Tensor, tables: Tables,
    DK: int, PK: int, SK: int, BT: int, num_warps: int,
) -> torch.Tensor:  # fmt: skip
    B, T, H, _ = u.shape
    P = tables.begin.shape[0]
    pulls = means.new_empty((B * H, P, SK))
    pulls_kernel[(P, B * H)](
        u=u, pull=pull, begin=tables.begin, end=tables.end, pulls=pulls, T=T, H=H, P=P, DK=DK, PK=PK, SK=SK, BT=BT,
        num_warps=num_warps,
    )  # fmt: skip
    return pulls
