"""Gradients of the writes to k and v, and under SWLA to the strengths and decays of the writes (Eq. 2, 10, 26-27).

    dv_j = scale sum_t w_tj gamma_t <q_t, k_j> dy_t + we_j k_j dEnd            t >= j in the piece, gamma the online one
    dk_j = scale sum_t w_tj gamma_t <dy_t, v_j> q_t + we_j v_j dEnd^T
           + dp_i / len_i + sum_{t >= j} pull_t u_t                            through the mean keys (gates_backward)

w_tj is the weight of token j in the memory at t, we_j that in the piece's end state. SWLA's gates have gradients made
of sums of D_tj = scale gamma_t <q_t, k_j> <dy_t, v_j> and of E_j = k_j dEnd v_j^T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .backward_common import GateGradients, Pieces, Rows, Segments, StateGradients, Tables, last_pieces
from .common import Decays, Dims, load_rows, load_state


class WriteGradients(NamedTuple):
    """dk ``[B, T, H, DK]`` and dv ``[B, T, H, DV]`` in k's dtype; None where others have them, or need none.

    diagonal, tail, ending [B*H, T]: float32, of SWLA, the sums of D_tj of t = j and of later t, and E_j.
    """

    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    diagonal: torch.Tensor | None = None
    tail: torch.Tensor | None = None
    ending: torch.Tensor | None = None


class StrengthGradients(NamedTuple):
    """Of SWLA's gates ``[B, T, H]``, float32; None for linear."""

    dg: torch.Tensor | None = None
    dbeta: torch.Tensor | None = None
    dlam: torch.Tensor | None = None


@triton.jit
def read_end(k, v, dends, j0, stop, H, PRECISION: tl.constexpr, dims: tl.constexpr, BJ: tl.constexpr, BS: tl.constexpr):
    """k_j dEnd ``[BJ, PV]`` and v_j dEnd^T ``[BJ, PK]``, BS rows or columns of dEnd at a time.

    Where these are all of them, dEnd is loaded once.
    """
    PK: tl.constexpr = dims.PK
    PV: tl.constexpr = dims.PV
    KEYS: tl.constexpr = BS if BS < PK else PK
    VALUES: tl.constexpr = BS if BS < PV else PV
    dv_j = tl.zeros([BJ, PV], tl.float32)
    for c in range(0, dims.SK, KEYS):
        k_c = load_rows(k, j0, stop, H * dims.DK, c, dims.DK, BJ, KEYS)
        state = load_state(dends, c, 0, dims.SK, dims.SV, KEYS, PV)
        dv_j = tl.dot(k_c, state, dv_j, input_precision=PRECISION)
    dk_j = tl.zeros([BJ, PK], tl.float32)
    for c in range(0, dims.SV, VALUES):
        v_c = load_rows(v, j0, stop, H * dims.DV, c, dims.DV, BJ, VALUES)
        state = load_state(dends, 0, c, dims.SK, dims.SV, PK, VALUES)
        dk_j = tl.dot(v_c, tl.trans(state), dk_j, input_precision=PRECISION)
    return dv_j, dk_j


@triton.jit
def add_later(
    dv_j, dk_j, k_j, v_j, q, dy, gates, decays, strength, weight, j, j0, stop, bh, T, H,
    SWLA: tl.constexpr, ROUTED: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr,
    BJ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dv_j and dk_j, and what tokens from ``j0`` on say of them; and under SWLA the sums of D_tj of t = j and t > j.

    ``strength``: under SWLA cum_{j+1}, after_j and now_j.
    """
    own = tl.zeros([BJ], tl.float32)
    others = tl.zeros([BJ], tl.float32)
    if SWLA:
        cum = decays.cum + bh * T
        cum_next, after_j, now_j = strength
    for t0 in range(j0, stop, BT):
        t = t0 + tl.arange(0, BT)
        q_t = load_rows(q, t0, stop, H * dims.DK, 0, dims.DK, BT, dims.PK)
        dy_t = load_rows(dy, t0, stop, H * dims.DV, 0, dims.DV, BT, dims.PV)
        for_values = tl.dot(k_j, tl.trans(q_t), input_precision=PRECISION)
        for_keys = tl.dot(v_j, tl.trans(dy_t), input_precision=PRECISION)
        if ROUTED:
            weight_t = weight * tl.load(gates.gate + bh * T + t, mask=t < stop, other=0.0)[None, :]
        else:
            weight_t = weight
        if SWLA:
            cum_t = tl.load(cum + t, mask=t < stop, other=0.0)
            decay = tl.exp(tl.minimum(cum_t[None, :] - cum_next[:, None], 0.0))
            decay = tl.where(t[None, :] > j[:, None], decay, 0.0)
            both = for_values * for_keys * weight_t
            own += tl.sum(tl.where(t[None, :] == j[:, None], both, 0.0), 1)
            others += tl.sum(both * decay, 1)
            weights = tl.where(t[None, :] == j[:, None], now_j[:, None], after_j[:, None] * decay) * weight_t
        else:
            weights = tl.where(t[None, :] >= j[:, None], weight_t, 0.0)
        dv_j = tl.dot((for_values * weights).to(dy_t.dtype), dy_t, dv_j, input_precision=PRECISION)
        dk_j = tl.dot((for_keys * weights).to(q_t.dtype), q_t, dk_j, input_precision=PRECISION)
    return dv_j, dk_j, own, others


@triton.jit
def add_lead(dv_j, dk_j, states, j, stop, place, dims: tl.constexpr):
    """The piece's last token writes once more in the next piece, whose gradients of it stand at ``place``."""
    keys = tl.arange(0, dims.PK)
    cols = tl.arange(0, dims.PV)
    last = (j == stop - 1)[:, None]
    lead = tl.load(states.dv_lead + place * dims.SV + cols, mask=cols < dims.DV, other=0.0)
    dv_j += tl.where(last, lead[None, :], 0.0)
    lead = tl.load(states.dk_lead + place * 2 * dims.SK + keys, mask=keys < dims.DK, other=0.0)
    lead += tl.load(states.dk_lead + (place * 2 + 1) * dims.SK + keys, mask=keys < dims.DK, other=0.0)
    dk_j += tl.where(last, lead[None, :], 0.0)
    return dv_j, dk_j


@triton.jit
def add_pulls(
    dk_j, u, gates, segments, piece, s, j, j0, stop, bh, T, H, N, P,
    HALF: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dk_j and what comes through the mean keys: of the segment, of its later pieces, and of tokens from j on."""
    keys = tl.arange(0, dims.PK)
    pull = gates.pull + bh * T
    rest = tl.load(gates.dmeans + (bh * N + s) * dims.SK + keys, mask=keys < dims.DK, other=0.0)
    if gates.pulls is not None:
        for p in range(piece + 1, tl.load(segments.last + s) + 1):
            rest += tl.load(gates.pulls + (bh * P + p) * dims.SK + keys, mask=keys < dims.DK, other=0.0)
    aside: tl.constexpr = (BJ + BT - 1) // BT * BT
    for t0 in range(j0, tl.minimum(j0 + aside, stop), BT):
        t = t0 + tl.arange(0, BT)
        u_t = load_rows(u, t0, stop, H * dims.DK, 0, dims.DK, BT, dims.PK).to(tl.float32)
        pull_t = tl.load(pull + t, mask=t < stop, other=0.0)
        pulled = tl.where(t[None, :] >= j[:, None], pull_t[None, :], 0.0)
        if HALF and PRECISION == "tf32x3":
            # u is exact in TF32, and the pulls have more bits than the result.
            dk_j = tl.dot(pulled, u_t, dk_j, input_precision="tf32")
        else:
            dk_j = tl.dot(pulled, u_t, dk_j, input_precision=PRECISION)
    for t0 in range(j0 + aside, stop, BT):
        u_t = load_rows(u, t0, stop, H * dims.DK, 0, dims.DK, BT, dims.PK).to(tl.float32)
        t = t0 + tl.arange(0, BT)
        rest += tl.sum(u_t * tl.load(pull + t, mask=t < stop, other=0.0)[:, None], 0)
    return dk_j + rest[None, :]


@triton.jit(do_not_specialize=["T", "H", "N", "P"])
def write_kernel(
    rows, gates, decays, states, pieces, segments, tiles, made, scale, T, H, N, P,
    SWLA: tl.constexpr, ROUTED: tl.constexpr, AVERAGES: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    dims: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BJ tokens of a head, and under SWLA what their gates' gradients add up."""
    tile = tiles + tl.program_id(0) * 2
    bh = tl.program_id(1).to(tl.int64)
    piece = tl.load(tile)
    j0 = tl.load(tile + 1)
    stop = tl.load(pieces.end + piece)
    s = tl.load(pieces.segment + piece)
    head = bh // H * T * H + bh % H
    q = rows.q + head * dims.DK
    k = rows.k + head * dims.DK
    v = rows.v + head * dims.DV
    dy = rows.dy + head * dims.DV
    j = j0 + tl.arange(0, BJ)
    k_j = load_rows(k, j0, stop, H * dims.DK, 0, dims.DK, BJ, dims.PK)
    v_j = load_rows(v, j0, stop, H * dims.DV, 0, dims.DV, BJ, dims.PV)
    dv_j, dk_j = read_end(
        k, v, states.dends + (bh * P + piece) * (dims.SK * dims.SV), j0, stop, H, PRECISION, dims, BJ, BS
    )
    weight = scale
    if AVERAGES:
        weight = scale / (s - tl.load(segments.first + s) + 1)
    strength = None
    if SWLA:
        cum = decays.cum + bh * T
        cum_next = tl.load(cum + j + 1, mask=j + 1 < stop, other=0.0)
        after_j = tl.load(decays.after + bh * T + j, mask=j + 1 < stop, other=0.0)
        now_j = tl.load(decays.now + bh * T + j, mask=j < stop, other=0.0)
        tl.store(made.ending + bh * T + j, tl.sum(k_j.to(tl.float32) * dk_j, 1), mask=j < stop)
        left = tl.where(j + 1 < stop, after_j * tl.exp(tl.load(cum + stop - 1) - cum_next), now_j)
        dv_j *= left[:, None]
        dk_j *= left[:, None]
        strength = (cum_next, after_j, now_j)
    dv_j, dk_j, own, others = add_later(
        dv_j, dk_j, k_j, v_j, q, dy, gates, decays, strength, weight, j, j0, stop, bh, T, H,
        SWLA, ROUTED, PRECISION, dims, BJ, BT,
    )  # fmt: skip
    if states.dv_lead is not None:
        # If the piece's memory goes on in the next one.
        if piece + 1 < P:
            if tl.load(pieces.entering + piece + 1) >= 0:
                dv_j, dk_j = add_lead(dv_j, dk_j, states, j, stop, bh * P + piece + 1, dims)
    keys = tl.arange(0, dims.PK)
    cols = tl.arange(0, dims.PV)
    out = made.dv + head * dims.DV + j.to(tl.int64)[:, None] * (H * dims.DV) + cols[None, :]
    tl.store(out, dv_j.to(made.dv.dtype.element_ty), mask=(j < stop)[:, None] & (cols < dims.DV)[None, :])
    if SWLA:
        tl.store(made.diagonal + bh * T + j, own, mask=j < stop)
        tl.store(made.tail + bh * T + j, others, mask=j < stop)
    if ROUTED:
        u = rows.u + head * dims.DK
        dk_j = add_pulls(dk_j, u, gates, segments, piece, s, j, j0, stop, bh, T, H, N, P, HALF, PRECISION, dims, BJ, BT)
    out = made.dk + head * dims.DK + j.to(tl.int64)[:, None] * (H * dims.DK) + keys[None, :]
    tl.store(out, dk_j.to(made.dk.dtype.element_ty), mask=(j < stop)[:, None] & (keys < dims.DK)[None, :])


@triton.jit(do_not_specialize=["T", "H", "P"])
def strength_kernel(
    gate, own, g, lam, decays, made, states, pieces, segments, strengths, T, H, P,
    ROUTED: tl.constexpr, AVERAGES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One program: the gates' gradients of a piece."""
    piece = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    start = tl.load(pieces.begin + piece)
    stop = tl.load(pieces.end + piece)
    enters = tl.load(pieces.entering + piece) >= 0
    t = start + tl.arange(0, PIECE)
    here = t < stop
    inner = here & (t > start)
    more = t + 1 < stop
    line = bh * T + t
    place = (bh // H * T + t) * H + bh % H
    cum_t = tl.load(decays.cum + line, mask=here, other=0.0)
    cum_end = tl.load(decays.cum + bh * T + stop - 1)
    # For the token before t in the piece, or the row before the piece.
    left = tl.exp(tl.minimum(cum_end - cum_t, 0.0))
    ended = left * tl.load(made.ending + line - 1, mask=inner, other=0.0)
    strong = tl.load(decays.after + line - 1, mask=inner, other=0.0)
    last = tl.sum(strong * ended, 0)
    dstrong = ended + tl.load(made.tail + line - 1, mask=inner, other=0.0)
    if states.dbefore is not None:
        at_start = (t == start) & enters
        dstrong += tl.where(at_start, tl.load(states.dbefore + bh * P + piece, mask=enters, other=0.0), 0.0)
        strong += tl.where(at_start, tl.load(decays.before + bh * P + piece, mask=enters, other=0.0), 0.0)
        last += tl.load(states.crossing + bh * P + piece, mask=enters, other=0.0)
    tl.store(strengths.dbeta + place, dstrong, mask=here)
    own_t = tl.load(own + line, mask=here, other=0.0)
    if ROUTED:
        own_t *= tl.load(gate + line, mask=here, other=0.0)
    if AVERAGES:
        s = tl.load(pieces.segment + piece)
        own_t /= s - tl.load(segments.first + s) + 1
    dnow = tl.load(made.diagonal + line, mask=here, other=0.0)
    dcum = own_t - tl.load(decays.now + line, mask=here, other=0.0) * dnow - strong * dstrong
    dcum += tl.where(t == stop - 1, last, 0.0)
    written = tl.load(lam + place - H, mask=inner, other=0.0)
    decay = tl.exp(tl.load(g + place, mask=here, other=0.0))
    total = tl.cumsum(dcum, 0, reverse=True) + written * decay * dstrong
    # What nothing enters does not decay; only rounding would say that it does.
    tl.store(strengths.dg + place, tl.where((t > start) | enters, total, 0.0), mask=here)
    e_t = tl.load(made.ending + line, mask=here, other=0.0)
    later = tl.exp(tl.minimum(cum_end - tl.load(decays.cum + line + 1, mask=more, other=0.0), 0.0)) * e_t
    later += tl.load(made.tail + line, mask=more, other=0.0)
    later *= tl.exp(tl.load(g + place + H, mask=more, other=0.0))
    tl.store(strengths.dlam + place, dnow + tl.where(more, later, tl.where(t == stop - 1, e_t, 0.0)), mask=here)


def write_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    dy: torch.Tensor,
    g: torch.Tensor | None,
    lam: torch.Tensor | None,
    own: torch.Tensor,
    decays: Decays,
    gates: GateGradients | None,
    states: StateGradients,
    tables: Tables,
    scale: float,
    SWLA: bool, ROUTED: bool, AVERAGES: bool, HALF: bool, PRECISION: str, PIECE: int,
    DK: int, DV: int, PK: int, PV: int, SK: int, SV: int, BJ: int, BT: int, BS: int, num_warps: int, num_stages: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """dk ``[B, T, H, DK]``, dv ``[B, T, H, DV]``, dg, dbeta and dlam ``[B, T, H]`` (None for linear).

    Args:
        q, k, u [B, T, H, DK], v, dy [B, T, H, DV]: of one dtype; g, lam [B, T, H]: float32, None for linear.
        own [blocks, B*H, T]: of :mod:`read_backward`.
        gates: None where they are equal.

    Returns:
        dk and dv in k's dtype, the others float32.
    """
    B, T, H, _ = k.shape
    N, P = tables.seg_first.shape[0], tables.begin.shape[0]
    gates = gates or GateGradients()
    pieces = Pieces(tables.begin, tables.end, tables.segment, tables.entering)
    segments = Segments(first=tables.seg_first if AVERAGES else None, last=last_pieces(tables))
    sums = tuple(own.new_empty((B * H, T)) if SWLA else None for _ in range(3))
    made, strengths = WriteGradients(torch.empty_like(k), torch.empty_like(v), *sums), StrengthGradients()
    tiles = tables.tiles(BJ)
    write_kernel[(tiles.shape[0], B * H)](
        rows=Rows(q, k, v, u if ROUTED else None, dy), gates=gates._replace(du=None),
        decays=decays._replace(before=None), states=states._replace(crossing=None, dbefore=None),
        pieces=pieces._replace(begin=None), segments=segments, tiles=tiles, made=made, scale=scale, T=T, H=H, N=N, P=P,
        SWLA=SWLA, ROUTED=ROUTED, AVERAGES=AVERAGES, HALF=HALF, PRECISION=PRECISION, dims=Dims(DK, DV, PK, PV, SK, SV),
        BJ=BJ, BT=BT, BS=BS, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if SWLA:
        strengths = StrengthGradients(*(torch.empty_like(g) for _ in range(3)))
        strength_kernel[(P, B * H)](
            gate=gates.gate, own=own.sum(0), g=g, lam=lam, decays=decays, made=made._replace(dk=None, dv=None),
            states=StateGradients(crossing=states.crossing, dbefore=states.dbefore), pieces=pieces,
            segments=segments._replace(last=None), strengths=strengths, T=T, H=H, P=P, ROUTED=ROUTED, AVERAGES=AVERAGES,
            PIECE=PIECE, num_warps=4,
        )  # fmt: skip
    return made.dk, made.dv, *strengths
