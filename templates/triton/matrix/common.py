"""Jit helpers and groups of pointers that the templates share. None has a flag: this module is copied as it stands."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl


class Tables(Protocol):
    """The runtime's int32 tables of P pieces, N segments and Q sequences, which launchers give to host functions."""

    begin: torch.Tensor
    end: torch.Tensor
    segment: torch.Tensor
    entering: torch.Tensor
    seg_begin: torch.Tensor
    seg_end: torch.Tensor
    seg_first: torch.Tensor
    seg_piece: torch.Tensor
    seg_last: torch.Tensor
    seq_begin: torch.Tensor
    seq_end: torch.Tensor
    crosses: bool
    """Whether any piece is entered."""


class Dims(NamedTuple):
    """Widths of keys and values: D as they are, P as blocks hold them (powers of two), S as states are stored."""

    DK: int
    DV: int
    PK: int
    PV: int
    SK: int
    SV: int


class Spans(NamedTuple):
    """int32: begin, end, segment and entering ``[P]`` of pieces, the others ``[N]`` of segments; None where not read.

    seg_last is also None where every segment is one piece.
    """

    begin: torch.Tensor
    end: torch.Tensor
    segment: torch.Tensor | None = None
    entering: torch.Tensor | None = None
    seg_begin: torch.Tensor | None = None
    seg_first: torch.Tensor | None = None
    seg_piece: torch.Tensor | None = None
    seg_last: torch.Tensor | None = None


class Tile(NamedTuple):
    """Tokens ``first`` to ``stop`` of a piece that begins at ``start``; its segment, and the sequence's ``oldest``."""

    piece: tl.tensor
    first: tl.tensor
    start: tl.tensor
    stop: tl.tensor
    segment: tl.tensor
    oldest: tl.tensor


class Rows(NamedTuple):
    """q and k ``[B, T, H, DK]``, v ``[B, T, H, DV]``, of one dtype; in a kernel, from a head's first row on."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class States(NamedTuple):
    """``[B*H, P, SK, SV]``: ends float32, operand; past ``[B*H, N, SK, SV]``; means and sums of keys, float32."""

    ends: torch.Tensor | None
    operand: torch.Tensor | None
    past: torch.Tensor | None
    means: torch.Tensor | None
    sums: torch.Tensor | None


class Keys(NamedTuple):
    """Float32: means ``[B*H, N, SK]`` of segments' keys; sums ``[B*H, P, SK]`` of pieces', None where each is whole."""

    means: torch.Tensor
    sums: torch.Tensor | None


class Gates(NamedTuple):
    """Of :mod:`gates`: logits ``[B*H, N, T]`` and lse ``[B*H, T]``; of pairs own ``[B*H, T]``, chosen and picked."""

    logits: torch.Tensor | None
    lse: torch.Tensor
    own: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    picked: torch.Tensor | None = None


class Pairs(NamedTuple):
    """Of :mod:`pair_order`: order ``[B*H, T * top_k]``; starts and runs of blocks of tokens, runs None where one."""

    order: torch.Tensor
    starts: torch.Tensor
    runs: torch.Tensor | None


class Decays(NamedTuple):
    """Of SWLA's writes, float32: cum, now and after ``[B*H, T]``, before ``[B*H, P]``; None for linear."""

    cum: torch.Tensor | None
    now: torch.Tensor | None
    after: torch.Tensor | None
    before: torch.Tensor | None = None


@triton.jit
def load_rows(x, first, end, stride, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``[ROWS, COLS]``: rows from ``first``, ``stride`` apart, columns from ``column``; 0 beyond ``end`` and WIDTH."""
    rows = first + tl.arange(0, ROWS)
    cols = column + tl.arange(0, COLS)
    # Rows beyond 2^31 elements: the first one's place takes 64 bits, the others are near it.
    ptr = x + tl.cast(first, tl.int64) * stride + tl.arange(0, ROWS)[:, None] * stride + cols[None, :]
    if WIDTH % COLS == 0:
        return tl.load(ptr, mask=(rows < end)[:, None], other=0.0)
    else:
        return tl.load(ptr, mask=(rows < end)[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def load_state(x, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``[ROWS, COLS]`` of a matrix ``[HEIGHT, WIDTH]``, 0 outside it."""
    rows = row + tl.arange(0, ROWS)
    cols = column + tl.arange(0, COLS)
    ptr = x + rows[:, None] * WIDTH + cols[None, :]
    if HEIGHT % ROWS == 0 and WIDTH % COLS == 0:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=(rows < HEIGHT)[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def block_and_head(together):
    """The block and the head of a program, where blocks of a head are in order and ``together`` heads take turns.

    The longest come first of all these heads, so that few programs are left for the end.
    """
    return tl.program_id(0) // together, (tl.program_id(1) * together + tl.program_id(0) % together).to(tl.int64)


@triton.jit
def load_tile(tile, spans, ROWS: tl.constexpr):
    """The tokens of the tile of at most ROWS of them that ``tile`` names: its piece and its first token."""
    piece = tl.load(tile)
    first = tl.load(tile + 1)
    start = tl.load(spans.begin + piece)
    stop = tl.minimum(first + ROWS, tl.load(spans.end + piece))
    segment = tl.load(spans.segment + piece)
    return Tile(piece, first, start, stop, segment, tl.load(spans.seg_first + segment))


@triton.jit
def last_piece(seg_last, i):
    """The last piece of segment i, whose end state is the segment's."""
    if seg_last is not None:
        return tl.load(seg_last + i)
    else:
        return i


@triton.jit
def decay_scores(scores, t, j, cum_t, now_t, cum, after, stop):
    """Scores of tokens t times SWLA's weights of the writes j < ``stop`` of their piece (:mod:`segment_states`)."""
    cum_next = tl.load(cum + j + 1, mask=j + 1 < stop, other=0.0)
    after_j = tl.load(after + j, mask=j + 1 < stop, other=0.0)
    left = after_j[None, :] * tl.exp(tl.minimum(cum_t[:, None] - cum_next[None, :], 0.0))
    weights = tl.where(t[:, None] > j[None, :], left, 0.0)
    return scores * tl.where(t[:, None] == j[None, :], now_t[:, None], weights)


@triton.jit
def soften(top, size, score, valid=None):
    """A softmax over columns goes on with ``score``: its largest logit, its size, how much less what came before weighs
    now, and the weights of ``score``, 0 where not ``valid``."""
    higher = tl.maximum(top, tl.max(score, 1))
    keep = tl.exp(top - higher)
    weights = tl.exp(score - higher[:, None])
    if valid is not None:
        weights = tl.where(valid, weights, 0.0)
    return higher, size * keep + tl.sum(weights, 1), keep, weights


@triton.jit
def earlier_logits(u_t, keys, tile, spans, bh, P, dims: tl.constexpr):
    """[BT]: <u_t, k_j> over the pieces of the tile's segment before its own, by the sums of their keys."""
    total = tl.zeros([u_t.shape[0]], tl.float32)
    if keys.sums is not None:
        PK: tl.constexpr = dims.PK
        cols = tl.arange(0, PK)
        earlier = tl.zeros([PK], tl.float32)
        for p in range(tl.load(spans.seg_piece + tile.segment), tile.piece):
            earlier += tl.load(keys.sums + (bh * P + p) * dims.SK + cols, mask=cols < dims.SK, other=0.0)
        total += tl.sum(u_t.to(tl.float32) * earlier[None, :], 1)
    return total


@triton.jit
def mean_logits(u_t, means, i0, stop, dims: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """[BT, BN]: logits of the segments from ``i0`` on, whose mean keys are split into two numbers of 16 bits."""
    mean = load_rows(means, i0, stop, dims.SK, 0, dims.SK, BN, dims.PK)
    if u_t.dtype == tl.float32:
        return tl.dot(u_t, tl.trans(mean), input_precision=PRECISION)
    else:
        high = mean.to(u_t.dtype)
        low = (mean - high.to(tl.float32)).to(u_t.dtype)
        return tl.dot(u_t, tl.trans(high), tl.dot(u_t, tl.trans(low)))
