"""For decoding with deep memories: groups of pointers, and jit helpers. None has a flag: it is copied as it stands."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .deep_common import load_block


class Widths(NamedTuple):
    """Widths of keys, values and hidden units: D as they are, P as blocks hold them; EB: hidden units of a block."""

    DK: int
    DV: int
    DE: int
    PK: int
    PV: int
    EB: int


class Tokens(NamedTuple):
    """In one dtype: q, k, u ``[B, T, H, DK]``, v, y ``[B, T, H, DV]``; in a kernel, from a head's token on."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    u: torch.Tensor
    y: torch.Tensor


class Strengths(NamedTuple):
    """g, eta, mu ``[B, T, H]``, float32; None for 0, 1 and 0."""

    g: torch.Tensor | None
    eta: torch.Tensor | None
    mu: torch.Tensor | None


class Memory(NamedTuple):
    """A layer's: up ``[B, H, capacity, DK, DE]``, down ``[B, H, capacity, DE, DV]``, cached states; the rest float32.

    Attributes:
        online, start, momentum: pairs of ``[B, H, DK, DE]`` and ``[B, H, DE, DV]``; initial: of ``[H, ..]``.
        descriptors ``[B, H, capacity, DK]``, key_sum ``[B, H, DK]``.
        cached, filled: int32 ``[B]``, states and tokens of the segment under way; None where all sequences are alike.
    """

    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    online_up: torch.Tensor | None = None
    online_down: torch.Tensor | None = None
    start_up: torch.Tensor | None = None
    start_down: torch.Tensor | None = None
    momentum_up: torch.Tensor | None = None
    momentum_down: torch.Tensor | None = None
    initial_up: torch.Tensor | None = None
    initial_down: torch.Tensor | None = None
    descriptors: torch.Tensor | None = None
    key_sum: torch.Tensor | None = None
    cached: torch.Tensor | None = None
    filled: torch.Tensor | None = None


class Shares(NamedTuple):
    """gammas ``[B*H, MOST]``, float32, of cached states, and own ``[B*H]``; chosen ``[B*H, MOST]``, int32, under ssc.

    None where gates are not learned, and chosen where all states are read.
    """

    gammas: torch.Tensor | None = None
    own: torch.Tensor | None = None
    chosen: torch.Tensor | None = None


class Parts(NamedTuple):
    """Sums over blocks of hidden units, or states, float32: outputs ``[B*H, BLOCKS, DV]`` of the write, reads
    ``[B*H, PARTS, DV]``; hidden ``[B*H, PARTS, DE]`` where parameters are mixed. None what there is not."""

    outputs: torch.Tensor | None = None
    reads: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


@triton.jit
def load_place(memory, cached_all, filled_all, b, first, length):
    """States cached and tokens of the segment under way, of sequence b before token ``first`` of the call."""
    if memory.cached is not None:
        used = tl.load(memory.cached + b)
        begun = tl.load(memory.filled + b)
    else:
        used = cached_all
        begun = filled_all
    begun += first
    return used + begun // length, begun % length


@triton.jit
def tokens_of(tokens, row, widths: tl.constexpr):
    """The tokens from ``row`` on, a number of rows of heads."""
    return Tokens(
        tokens.q + row * widths.DK, tokens.k + row * widths.DK, tokens.v + row * widths.DV, tokens.u + row * widths.DK,
        tokens.y + row * widths.DV,
    )  # fmt: skip


@triton.jit
def load_row(x, width, D: tl.constexpr):
    """A row of ``width`` numbers as float32 [D], the rest 0."""
    d = tl.arange(0, D)
    return tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)


@triton.jit
def load_upper(x, e, widths: tl.constexpr):
    """``[PK, EB]``, float32: hidden units from e of an upper layer."""
    return load_block(x, 0, e, widths.DK, widths.DE, widths.PK, widths.EB).to(tl.float32)


@triton.jit
def load_lower(x, e, widths: tl.constexpr):
    """``[EB, PV]``, float32: hidden units from e of a lower layer."""
    return load_block(x, e, 0, widths.DE, widths.DV, widths.EB, widths.PV).to(tl.float32)


@triton.jit
def even_share(used, AVERAGES: tl.constexpr):
    """What each of the states weighs, ``used`` of them cached, where gates are not learned."""
    if AVERAGES:
        return 1.0 / (used + 1).to(tl.float32)
    else:
        return 1.0
