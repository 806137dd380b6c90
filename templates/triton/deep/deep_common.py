"""Jit helpers and groups of pointers of deep memories' templates. None has a flag: this module is copied as it stands.

    M(x) = gelu(x U) W (+ x)        U [Dk, E], W [E, Dv]; gelu in its tanh form

All gradients of an inner chunk of b tokens are taken at the state that enters it, so that within a chunk every layer W
obeys (Eq. 30-31, 34-36), with x_j the layer's input, e_j its error row and S_0 the momentum that enters:

    W_t = c_t W_0 - d_t S_0 - sum_{j <= t} c_tj x_j^T e_j        S_t = m_t S_0 + sum_{j <= t} m_tj x_j^T e_j
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl


class Tables(Protocol):
    """The runtime's int32 tables of N segments, each one piece, and Q sequences, which launchers give to hosts."""

    begin: torch.Tensor
    end: torch.Tensor
    segment: torch.Tensor
    seg_begin: torch.Tensor
    seg_end: torch.Tensor
    seg_first: torch.Tensor
    seq_begin: torch.Tensor
    seq_end: torch.Tensor


class Dims(NamedTuple):
    """Widths of keys, values and hidden units: D as they are, P as blocks hold them (powers of two), S as states are
    stored (multiples of 16, zeros beyond D)."""

    DK: int
    DV: int
    DE: int
    PK: int
    PV: int
    SK: int
    SV: int
    SE: int


class Spans(NamedTuple):
    """int32: seg_begin, seg_end and seg_first ``[N]`` of segments; of lanes, where they are sequences, the first
    segment and one past the last; None where not read."""

    seg_begin: torch.Tensor | None
    seg_end: torch.Tensor
    seg_first: torch.Tensor | None = None
    lane_begin: torch.Tensor | None = None
    lane_end: torch.Tensor | None = None


class Rows(NamedTuple):
    """q and k ``[B, T, H, DK]``, v ``[B, T, H, DV]``, of one dtype; in a kernel, from a head's first row on."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class First(NamedTuple):
    """The memory that every lane starts from, float32: ``[H, DK, DE]`` and ``[H, DE, DV]``."""

    W_up: torch.Tensor
    W_down: torch.Tensor


class Layers(NamedTuple):
    """The two matrices of memories, ``[.., SK, SE]`` and ``[.., SE, SV]``; in a kernel also of one of them."""

    up: torch.Tensor
    down: torch.Tensor


class Strengths(NamedTuple):
    """Gates of the write ``[B, T, H]``, float32: g (decay, absent 0), eta (step, absent 1), mu (momentum, absent 0);
    None where absent. In a kernel, from a head's first token on."""

    g: torch.Tensor | None
    eta: torch.Tensor | None
    mu: torch.Tensor | None


class Gates(NamedTuple):
    """Of :mod:`gates`, float32: logits ``[B*H, N, T]`` of segments, and lse ``[B*H, T]``; gamma = exp(logit - lse)."""

    logits: torch.Tensor
    lse: torch.Tensor


class Tile(NamedTuple):
    """Tokens ``first`` to ``stop`` of a segment, and the ``oldest`` segment of its sequence."""

    first: tl.tensor
    stop: tl.tensor
    segment: tl.tensor
    oldest: tl.tensor


class Coefficients(NamedTuple):
    """Of the R tokens of a chunk: c_t ``state [R]``, d_t ``momentum [R]``, c_tj ``rows [R, R]``; of S itself m_t
    ``upto [R]`` and m_tj ``since [R, R]``. Rows past the chunk's end hold nothing to use, columns past it 0."""

    state: tl.tensor
    momentum: tl.tensor
    rows: tl.tensor
    upto: tl.tensor
    since: tl.tensor


# --- gelu


@triton.jit
def _sigmoid(x):
    """s with gelu(x) = x s: 0.5 (1 + tanh y) = 1 / (1 + e^{-2 y}), for y = sqrt(2 / pi) (x + 0.044715 x^3)."""
    # -2 sqrt(2 / pi) / ln 2, and that times 0.044715.
    return 1.0 / (1.0 + tl.exp2(x * (-2.302208198144325 - 0.10294323958002346 * (x * x))))


@triton.jit
def gelu(x):
    """gelu(x), in float32."""
    return x * _sigmoid(x)


@triton.jit
def gelu_slope(x):
    """gelu(x) and gelu'(x)."""
    s = _sigmoid(x)
    # y' of the sigmoid's argument 2 y: 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2).
    inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return x * s, s + x * s * (1.0 - s) * inner


@triton.jit
def gelu_curve(x):
    """gelu(x), gelu'(x) and gelu''(x)."""
    s = _sigmoid(x)
    inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    bend = s * (1.0 - s)
    # The argument's second derivative is 2 sqrt(2 / pi) 6 * 0.044715 x.
    curve = bend * (2.0 * inner + x * ((1.0 - 2.0 * s) * inner * inner + 0.4281288976356015 * x))
    return x * s, s + x * bend * inner, curve


@triton.constexpr_function
def _quick(dtype):
    """Whether tanh is one instruction, 2^-11 off at most: too far for float32 products, not for those of 16 bits."""
    return tl.target_info.is_cuda() and dtype != tl.float32


@triton.jit
def _tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def gelu_as(x, dtype: tl.constexpr):
    """gelu(x), as exact as products of ``dtype`` take it."""
    if _quick(dtype):
        half = 0.5 * x
        # sqrt(2 / pi), and that times 0.044715.
        return half + half * _tanh(x * (0.7978845608028654 + 0.035677408136300125 * (x * x)))
    else:
        return gelu(x)


@triton.jit
def gelu_slope_as(x, dtype: tl.constexpr):
    """gelu(x) and gelu'(x), as exact as products of ``dtype`` take them."""
    if _quick(dtype):
        half = 0.5 * x
        square = x * x
        tanh = _tanh(x * (0.7978845608028654 + 0.035677408136300125 * square))
        inner = 0.7978845608028654 + 0.10703222440890037 * square
        return half + half * tanh, 0.5 + 0.5 * tanh + half * (1.0 - tanh * tanh) * inner
    else:
        return gelu_slope(x)


# --- loading and storing


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
def store_rows(x, value, first, end, stride, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The inverse of :func:`load_rows`, in the dtype of ``x``."""
    rows = first + tl.arange(0, ROWS)
    cols = column + tl.arange(0, COLS)
    ptr = x + tl.cast(first, tl.int64) * stride + tl.arange(0, ROWS)[:, None] * stride + cols[None, :]
    tl.store(ptr, value.to(x.dtype.element_ty), mask=(rows < end)[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def load_block(x, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``[ROWS, COLS]`` of a matrix ``[HEIGHT, WIDTH]`` from (row, column) on, 0 outside it."""
    rows = row + tl.arange(0, ROWS)
    cols = column + tl.arange(0, COLS)
    ptr = x + rows[:, None] * WIDTH + cols[None, :]
    if HEIGHT % ROWS == 0 and WIDTH % COLS == 0:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=(rows < HEIGHT)[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def store_block(
    x, value, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The inverse of :func:`load_block`, in the dtype of ``x``."""
    rows = row + tl.arange(0, ROWS)
    cols = column + tl.arange(0, COLS)
    inside = (rows < HEIGHT)[:, None] & (cols < WIDTH)[None, :]
    tl.store(x + rows[:, None] * WIDTH + cols[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def rows_of(rows, bh, T, H, dims: tl.constexpr):
    """The rows of one head, which are H rows apart."""
    head = bh // H * T * H + bh % H
    return Rows(rows.q + head * dims.DK, rows.k + head * dims.DK, rows.v + head * dims.DV)


@triton.jit
def block_and_head(together):
    """The block and the head of a program, where blocks of a head are in order and ``together`` heads take turns.

    The longest come first of all these heads, so that few programs are left for the end.
    """
    return tl.program_id(0) // together, (tl.program_id(1) * together + tl.program_id(0) % together).to(tl.int64)


@triton.jit
def load_tile(tile, spans, ROWS: tl.constexpr):
    """The tokens of the tile of at most ROWS of them that ``tile`` names: its segment and its first token."""
    segment = tl.load(tile)
    first = tl.load(tile + 1)
    stop = tl.minimum(first + ROWS, tl.load(spans.seg_end + segment))
    return Tile(first, stop, segment, tl.load(spans.seg_first + segment))


# --- the chunk


@triton.jit
def of_head(x, head):
    """A gate's values of one head, None where it is absent."""
    if x is not None:
        return x + head
    else:
        return x


@triton.jit
def strengths_of(strengths, bh, T, H):
    """The gates of one head, whose tokens are H apart."""
    head = bh // H * T * H + bh % H
    return Strengths(of_head(strengths.g, head), of_head(strengths.eta, head), of_head(strengths.mu, head))


@triton.jit
def steps(eta, t0, stop, stride, ROWS: tl.constexpr):
    """eta of the tokens of a chunk ``[ROWS]``, 0 past its end."""
    i = tl.arange(0, ROWS)
    here = t0 + i < stop
    if eta is not None:
        return tl.load(eta + tl.cast(t0, tl.int64) * stride + i * stride, mask=here, other=0.0)
    else:
        return tl.where(here, 1.0, 0.0)


@triton.jit
def coefficients(strengths, t0, stop, stride, ROWS: tl.constexpr):
    """The coefficients of the chunk of tokens t0 to ``stop`` (:class:`Coefficients`)."""
    i = tl.arange(0, ROWS)
    here = t0 + i < stop
    place = tl.cast(t0, tl.int64) * stride + i * stride
    t = i[:, None]
    j = i[None, :]
    eta = steps(strengths.eta, t0, stop, stride, ROWS)
    # e^{g_{j+1} + .. + g_t}: sums that begin at j, for a difference of two long ones would lose digits.
    if strengths.g is not None:
        g = tl.load(strengths.g + place, mask=here, other=0.0)
        span = tl.where(t >= j, tl.exp(tl.cumsum(tl.where(t > j, g[:, None], 0.0), 0)), 0.0)
        state = tl.exp(tl.cumsum(g, 0))
    else:
        span = tl.where(t >= j, 1.0, 0.0)
        state = tl.full([ROWS], 1.0, tl.float32)
    if strengths.mu is not None:
        mu = tl.load(strengths.mu + place, mask=here, other=0.0)
        since = tl.where(t >= j, tl.cumprod(tl.where(t > j, mu[:, None], 1.0), 0), 0.0)
        upto = tl.cumprod(mu, 0)
        momentum = tl.sum(span * upto[None, :], 1)
        rows = tl.dot(span, since, input_precision="ieee") * eta[None, :]
        return Coefficients(state, momentum, rows, upto, since * eta[None, :])
    else:
        nothing = tl.zeros([ROWS], tl.float32)
        return Coefficients(state, nothing, span * eta[None, :], nothing, tl.where(t == j, eta[None, :], 0.0))


@triton.jit
def row_of(x, i):
    """Row i of ``x [R, C]``, or its element of ``x [R]``."""
    rows = tl.arange(0, x.shape[0])
    if len(x.shape) == 2:
        return tl.sum(tl.where(rows[:, None] == i, x, 0.0), 0)
    else:
        return tl.sum(tl.where(rows == i, x, 0.0), 0)
