"""What the backward kernels of deep memories take, in groups, and jit helpers. No flag is in here: it is copied whole.

A member that a layer does not have is None, which Triton compiles away: c without g; d, p and s without mu.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl

from .deep_common import load_block, load_rows, store_block


class Tables(Protocol):
    """Where the P inner chunks, N segments and lanes of a row of tokens begin and end, int32.

    Attributes:
        begin, end [P]: an inner chunk's first token, and one past its last; segment: that it is part of; entering: the
            chunk before it in its lane, or -1.
        seg_begin, seg_end [N]: tokens; seg_first, seg_past_end: the first segment of the sequence, and one past its
            last; seg_piece, seg_last: first and last inner chunk.
    """

    begin: torch.Tensor
    end: torch.Tensor
    segment: torch.Tensor
    entering: torch.Tensor
    seg_begin: torch.Tensor
    seg_end: torch.Tensor
    seg_first: torch.Tensor
    seg_past_end: torch.Tensor
    seg_piece: torch.Tensor
    seg_last: torch.Tensor

    def tiles(self, rows: int) -> torch.Tensor:
        """int32 ``[tiles, 2]``: piece and first token of every tile of at most ``rows`` tokens."""


class Dims(NamedTuple):
    """Widths of keys, values and hidden units: D as they are, P as blocks hold them, S as states are stored.

    EB: hidden units of a block.
    """

    DK: int
    DV: int
    PK: int
    PV: int
    SK: int
    SV: int
    SE: int
    EB: int


class Layers(NamedTuple):
    """Two layers, up ``[.., SK, SE]`` and down ``[.., SE, SV]``, and their momentum, None where there is none.

    Of the states that enter inner chunks ``[B*H * P, ..]``, operands of products; float32 of end states and their
    gradients ``[B*H * N, ..]``, and of what lanes carry ``[B*H * L, ..]``.
    """

    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    s_up: torch.Tensor | None = None
    s_down: torch.Tensor | None = None


class Weights(NamedTuple):
    """Coefficients of inner chunks, or their gradients, float32.

    Attributes:
        rows [B*H, P, b, b]: c_tj; last [B*H, P, b]: those of a chunk's last row, c_j.
        state, momentum [B*H, P, b]: c_t and d_t.
        decay [B*H, P], products [B*H, P, b]: the momentum's own p and s_j.
    """

    rows: torch.Tensor | None
    last: torch.Tensor | None
    state: torch.Tensor | None = None
    momentum: torch.Tensor | None = None
    decay: torch.Tensor | None = None
    products: torch.Tensor | None = None


class Rows(NamedTuple):
    """q, k, u ``[B, T, H, DK]`` and v, dy ``[B, T, H, DV]``, of one dtype; u is None where gates are not learned."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dy: torch.Tensor
    u: torch.Tensor | None = None


class Made(NamedTuple):
    """Float32: dq, dk ``[B, T, H, DK]``, dv ``[B, T, H, DV]``; where errors are not -v, derr ``[B*H, T, SV]`` of the
    reads."""

    dq: torch.Tensor | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None
    derr: torch.Tensor | None = None


class Block(NamedTuple):
    """A chunk's k and q as loaded, err and dy (with the own gate) float32, c_tj, x K^T and dy err^T ``[BB, BB]``."""

    k: tl.tensor
    q: tl.tensor
    err: tl.tensor
    dy: tl.tensor
    rows: tl.tensor
    scores: tl.tensor
    pulls: tl.tensor


class Chunks(NamedTuple):
    """int32: begin, end, segment and entering ``[P]``; lanes ``[L, 2]``, the first chunk of each, one past the last."""

    begin: torch.Tensor
    end: torch.Tensor
    segment: torch.Tensor | None = None
    entering: torch.Tensor | None = None
    lanes: torch.Tensor | None = None


class Shares(NamedTuple):
    """Gates, float32: logits ``[B*H, N, T]`` and lse ``[B*H, T]`` where they are learned, else what every state that a
    token reads weighs, even ``[T]``, None for 1."""

    logits: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    even: torch.Tensor | None = None


class Saved(NamedTuple):
    """Operands of products: errors ``[B*H, T, SV]``, None where they are -v; z and dhidden ``[B*H, T, SE]``.

    z is what the lower layer reads, dhidden the gradient of what the upper layer gives, without the own gate.
    """

    errors: torch.Tensor | None = None
    z: torch.Tensor | None = None
    dhidden: torch.Tensor | None = None


@triton.jit
def product(a, b, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a b, float32, of operands in TYPE."""
    return tl.dot(a.to(TYPE), b.to(TYPE), input_precision=PRECISION)


@triton.jit
def add_product(a, b, total, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, float32, of operands in TYPE."""
    return tl.dot(a.to(TYPE), b.to(TYPE), total, input_precision=PRECISION)


@triton.jit
def load_up(x, e, dims: tl.constexpr):
    """``[PK, EB]``: hidden units from e of an upper layer."""
    return load_block(x, 0, e, dims.SK, dims.SE, dims.PK, dims.EB)


@triton.jit
def load_down(x, e, dims: tl.constexpr):
    """``[EB, PV]``: hidden units from e of a lower layer."""
    return load_block(x, e, 0, dims.SE, dims.SV, dims.EB, dims.PV)


@triton.jit
def store_up(x, e, value, dims: tl.constexpr):
    """Hidden units from e of an upper layer, ``[PK, EB]``."""
    store_block(x, value, 0, e, dims.SK, dims.SE, dims.PK, dims.EB)


@triton.jit
def store_down(x, e, value, dims: tl.constexpr):
    """Hidden units from e of a lower layer, ``[EB, PV]``."""
    store_block(x, value, e, 0, dims.SE, dims.SV, dims.EB, dims.PV)


@triton.jit
def load_square(x, INNER: tl.constexpr, BB: tl.constexpr):
    """``[BB, BB]``: c_tj of a chunk, 0 for j > t and outside it."""
    t = tl.arange(0, BB)
    inside = (t < INNER)[:, None] & (t[None, :] <= t[:, None])
    return tl.load(x + t[:, None] * INNER + t[None, :], mask=inside, other=0.0)


@triton.jit
def load_line(x, count, BB: tl.constexpr):
    """``[BB]``: ``count`` numbers, then 0."""
    t = tl.arange(0, BB)
    return tl.load(x + t, mask=t < count, other=0.0)


@triton.jit
def gate_of(shares, bh, i, t, valid, T, N):
    """The gate of segment i, the online one or one before it, at tokens t; 0 where not ``valid``."""
    if shares.logits is not None:
        logit = tl.load(shares.logits + (bh * N + i) * T + t, mask=valid, other=float("-inf"))
        return tl.exp(logit - tl.load(shares.lse + bh * T + t, mask=valid, other=0.0))
    else:
        if shares.even is not None:
            return tl.load(shares.even + t, mask=valid, other=0.0)
        else:
            return tl.where(valid, 1.0, 0.0)


@triton.jit
def load_chunk(
    rows, errors, shares, weights, bh, s, place, j0, stop, scale, T, H, N,
    PRECISION: tl.constexpr, dims: tl.constexpr, INNER: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """The rows and coefficients of a chunk of segment s; ``errors`` are None where they are -v."""
    TYPE: tl.constexpr = rows.k.dtype.element_ty
    token = bh // H * T * H + bh % H
    t = j0 + tl.arange(0, BB)
    k = load_rows(rows.k + token * dims.DK, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
    q = load_rows(rows.q + token * dims.DK, j0, stop, H * dims.DK, 0, dims.DK, BB, dims.PK)
    dy = load_rows(rows.dy + token * dims.DV, j0, stop, H * dims.DV, 0, dims.DV, BB, dims.PV).to(tl.float32)
    dy *= gate_of(shares, bh, s, t, t < stop, T, N)[:, None]
    if errors is not None:
        err = load_rows(errors + bh * T * dims.SV, j0, stop, dims.SV, 0, dims.SV, BB, dims.PV).to(tl.float32)
    else:
        err = -load_rows(rows.v + token * dims.DV, j0, stop, H * dims.DV, 0, dims.DV, BB, dims.PV).to(tl.float32)
    scores = product(q, tl.trans(k), TYPE, PRECISION) * scale
    pulls = product(dy, tl.trans(err), TYPE, PRECISION)
    return Block(k, q, err, dy, load_square(weights.rows + place * INNER * INNER, INNER, BB), scores, pulls)
