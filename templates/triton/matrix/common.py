"""Jit helpers and groups of pointers that the templates share. None has a flag: this module is copied as it stands."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOW = tl.constexpr(-3.0e38)
"""Less than any logit; unlike -inf its difference from itself is a number."""


class Decays(NamedTuple):
    """Of SWLA's writes, float32: cum ``[B*H, T]``, now and after ``[B*H, T]``; None for linear."""

    cum: torch.Tensor | None
    now: torch.Tensor | None
    after: torch.Tensor | None


class Pieces(NamedTuple):
    """int32: end, segment and entering ``[P]`` of pieces, seg_first and seg_last ``[N]`` of segments."""

    end: torch.Tensor
    segment: torch.Tensor
    entering: torch.Tensor
    seg_first: torch.Tensor
    seg_last: torch.Tensor


class Pulls(NamedTuple):
    """At the keys, through the mean keys, float32; of :mod:`gates_backward`, None where gates are not learned."""

    dmeans: torch.Tensor | None
    pull: torch.Tensor | None
    pulls: torch.Tensor | None


class Leads(NamedTuple):
    """Gradients of the row before a piece, float32; of :mod:`state_backward`, None where no piece is entered."""

    dk_lead: torch.Tensor | None
    dv_lead: torch.Tensor | None


class Sums(NamedTuple):
    """``[B*H, T]`` float32, for the gradients of SWLA's gates: D of t = j, D of later t, and E; None for linear."""

    diagonal: torch.Tensor | None
    tail: torch.Tensor | None
    ending: torch.Tensor | None


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
    """Of a program, where blocks of a head are in order and ``together`` heads take turns.

    The longest come first of all these heads, so that few programs are left for the end.
    """
    return tl.program_id(0) // together, (tl.program_id(1) * together + tl.program_id(0) % together).to(tl.int64)


@triton.jit
def load_place(cached, filled, cached_all, filled_all, b, first, length):
    """States cached and tokens of the segment under way, of sequence b before token ``first`` of the call."""
    if cached is not None:
        used = tl.load(cached + b)
        begun = tl.load(filled + b)
    else:
        used = cached_all
        begun = filled_all
    begun += first
    return used + begun // length, begun % length


@triton.jit
def load_row(x, width, D: tl.constexpr):
    """A row of ``width`` numbers as float32 [D], the rest 0."""
    d = tl.arange(0, D)
    return tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)
