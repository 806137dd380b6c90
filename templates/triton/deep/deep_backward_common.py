"""What the backward kernels of deep memories take, in groups, and jit helpers. No flag is in here: it is copied whole.

A member that a layer does not have is None, which Triton compiles away: c without g; d, p and s without mu.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl

from .deep_common import load_block, store_block


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
        state, momentum [.., P, b]: c_t and d_t; rows [.., P, b, b]: c_tj.
        decay [.., P], products [.., P, b]: the momentum's own p and s_j.
    """

    rows: torch.Tensor
    state: torch.Tensor | None = None
    momentum: torch.Tensor | None = None
    decay: torch.Tensor | None = None
    products: torch.Tensor | None = None


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
