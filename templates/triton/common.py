"""Jit helpers that the templates share. None has a flag: this module is copied as it stands."""

from __future__ import annotations

import triton
import triton.language as tl

LOW = tl.constexpr(-3.0e38)
"""Less than any logit; unlike -inf its difference from itself is a number."""


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
