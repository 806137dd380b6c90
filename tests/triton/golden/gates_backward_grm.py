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
BI = 16
BT = 64
SPLITS = 4
num_stages = 2
num_warps = 8


@triton.jit
def add_parts(total, x, place, mask, stride, PARTS):
    """``total`` and what stands at ``place`` in each part of x, ``stride`` apart."""
    for p in range(PARTS):
        total += tl.load(x + p * stride + place, mask=mask, other=0.0)
    return total


@triton.jit
def segment_gradients(
    grad, delta, gates, dgamma, means, total, bh, t, valid, first, s, part, T, N, PARTS, dims: tl.constexpr,
    BT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """du ``[BT, PK]``, to which the cached segments ``first`` to s are added; their dr and gates are written."""
    for i0 in range(first, s, BI):
        i = i0 + tl.arange(0, BI)
        here = (i < s)[:, None] & valid[None, :]
        place = (bh * N + i)[:, None] * T + t[None, :]
        gamma = tl.exp(tl.load(gates.logits + place, mask=here, other=float("-inf")) - total[None, :])
        dr = add_parts(tl.zeros([BI, BT], tl.float32) - delta[None, :], dgamma, place, here, part * N, PARTS)
        dr *= gamma
        tl.store(dgamma + place, dr, mask=here)
        tl.store(gates.gammas + place, gamma, mask=here)
        mean = load_rows(means + bh * N * dims.SK, i0, s, dims.SK, 0, dims.SK, BI, dims.PK)
        grad = tl.dot(tl.trans(dr), mean, grad, input_precision="tf32x3")
    return grad


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


@triton.jit(do_not_specialize=["T", "H", "N", "P"])
def connector_kernel(
    k, keys, gates, reads, pieces, segments, tiles, made, T, H, N, P, PARTS, dims: tl.constexpr, BT: tl.constexpr,
    BI: tl.constexpr,
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
    logit_s = tl.load(gates.logits + (bh * N + s) * T + t, mask=valid, other=float("-inf"))
    gamma_s = tl.exp(logit_s - total)
    dgamma_s = add_parts(tl.zeros([BT], tl.float32), reads.own + bh * T, t, valid, part, PARTS)
    PK: tl.constexpr = dims.PK
    grad = tl.zeros([BT, PK], tl.float32)
    cols = tl.arange(0, PK)
    delta = add_parts(tl.zeros([BT], tl.float32), reads.delta + bh * T, t, valid, part, PARTS)
    grad = segment_gradients(
        grad, delta, gates, reads.dgamma, keys.means, total, bh, t, valid, first, s, part, T, N, PARTS, dims, BT, BI,
    )  # fmt: skip

    dr_s = gamma_s * (dgamma_s - delta) / (t - tl.load(segments.begin + s) + 1).to(tl.float32)
    tl.store(made.gate + bh * T + t, gamma_s, mask=valid)
    tl.store(made.pull + bh * T + t, dr_s, mask=valid)
    running = running_keys(k, keys.sums, segments, piece, s, start, t0, stop, bh, H, P, dims, BT)
    grad += dr_s[:, None] * running
    out = made.du + head * dims.DK + t.to(tl.int64)[:, None] * (H * dims.DK) + cols[None, :]
    tl.store(out, grad.to(made.du.dtype.element_ty), mask=valid[:, None] & (cols < dims.DK)[None, :])


@triton.jit(do_not_specialize=["T", "H", "N"])
def descriptor_kernel(
    u,
    dr,
    seg_begin,
    seg_end,
    seg_past_end,
    dmeans,
    T,
    H,
    N,
    DK: tl.constexpr,
    PK: tl.constexpr,
    SK: tl.constexpr,
    BT: tl.constexpr,
    BI: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program: BI segments of a head and one of SPLITS parts of the tokens after them."""
    split = tl.program_id(0) % SPLITS
    i0 = tl.program_id(0) // SPLITS * BI
    bh = tl.program_id(1).to(tl.int64)
    i = i0 + tl.arange(0, BI)
    there = i < N
    # Gates that read segment i are those of the tokens from its end to the end of its sequence.
    left = tl.load(seg_end + i, mask=there, other=0)
    right = tl.load(seg_end + tl.load(seg_past_end + i, mask=there, other=1) - 1, mask=there, other=0)
    low = tl.load(seg_end + i0)
    span = tl.cdiv(tl.cdiv(tl.max(right, 0) - low, SPLITS), BT) * BT
    low += split * span
    high = tl.minimum(low + span, tl.max(right, 0))
    head = bh // H * T * H + bh % H
    u += head * DK
    grad = tl.zeros([BI, PK], tl.float32)
    for t0 in range(low, high, BT):
        t = t0 + tl.arange(0, BT)
        here = (t[None, :] >= left[:, None]) & (t[None, :] < right[:, None])
        dr_t = tl.load(dr + (bh * N + i)[:, None] * T + t[None, :], mask=here, other=0.0)
        u_t = load_rows(u, t0, high, H * DK, 0, DK, BT, PK).to(tl.float32)
        grad = tl.dot(dr_t, u_t, grad, input_precision="tf32x3")
    grad /= (left - tl.load(seg_begin + i, mask=there, other=-1))[:, None].to(tl.float32)
    cols = tl.arange(0, PK)
    out = dmeans + ((split * tl.num_programs(1) + bh) * N + i)[:, None] * SK + cols[None, :]
    tl.store(out, grad, mask=there[:, None] & (cols < SK)[None, :])


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
    tiles = tables.tiles(BT)
    connector_kernel[(tiles.shape[0], B * H)](
        k=k, keys=Keys(means, sums), gates=gates._replace(order=None, starts=None),
        reads=ReadGradients(dgamma=dgamma, own=reads.own, delta=reads.delta),
        pieces=Pieces(tables.begin, tables.end, tables.segment),
        segments=Segments(begin=tables.seg_begin, first=tables.seg_first, piece=tables.seg_piece), tiles=tiles,
        made=made, T=T, H=H, N=N, P=P, PARTS=reads.own.shape[0], dims=Dims(DK, DV, PK, PV, SK, SV), BT=BT, BI=BI,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    parts = means.new_empty((SPLITS, B * H, N, SK))
    descriptor_kernel[(SPLITS * triton.cdiv(N, BI), B * H)](
        u=u, dr=dgamma, seg_begin=tables.seg_begin, seg_end=tables.seg_end, seg_past_end=tables.seg_past_end,
        dmeans=parts, T=T, H=H, N=N, DK=DK, PK=PK, SK=SK, BT=BT, BI=BI, SPLITS=SPLITS, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    dmeans = parts.sum(0)
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
