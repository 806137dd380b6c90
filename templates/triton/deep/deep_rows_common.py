"""What a segment's tokens leave as rows, and what these weigh. No flag: copied as it stands.

Hidden units are tuples of BLOCKS tensors of EB of them, as products and shared memory hold them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .deep_common import load_block, load_rows


class Left(NamedTuple):
    """Rows of tokens in k's dtype: z = gelu(k U) and back ``[B*H, T, SE]``, error 2 (v - M(k)) ``[B*H, T, SV]``."""

    z: torch.Tensor
    back: torch.Tensor
    error: torch.Tensor


class Weights(NamedTuple):
    """What token t sees: pairs ``[B*H, T, span]``, c_tj for the tokens j of its segment up to t, in k's dtype, NaN or
    anything beyond; state ``[B*H, T]``, c_t, float32. In a kernel, from a token on."""

    pairs: torch.Tensor
    state: torch.Tensor


@triton.jit
def left_of(left, bh, T, dims: tl.constexpr):
    """The rows of one head."""
    wide = bh * T * dims.SE
    return Left(left.z + wide, left.back + wide, left.error + bh * T * dims.SV)


@triton.jit
def weights_of(weights, bh, t, T, span):
    """The weights of token t of a head."""
    place = bh * T + t
    return Weights(weights.pairs + place * span, weights.state + place)


@triton.jit
def load_weights(pairs, column, end, BJ: tl.constexpr):
    """``[1, BJ]``: what a token gives to others of its segment, from ``column`` on; 0 from ``end`` on."""
    j = column + tl.arange(0, BJ)[None, :]
    return tl.load(pairs + j, mask=j < end, other=0.0).to(tl.float32)


@triton.jit
def load_tile_weights(weights, bh, first, stop, begin, column, T, span, BT: tl.constexpr, BJ: tl.constexpr):
    """``[BT, BJ]``: the same of tokens ``first`` to ``stop`` of the segment at ``begin``; 0 for those after each."""
    t = first + tl.arange(0, BT)[:, None]
    j = column + tl.arange(0, BJ)[None, :]
    place = weights_of(weights, bh, first, T, span).pairs + (t - first) * span + j
    return tl.load(place, mask=(t < stop) & (begin + j <= t), other=0.0).to(tl.float32)


@triton.jit
def _up(U, i, KEPT: tl.constexpr, dims: tl.constexpr, EB: tl.constexpr):
    """A block of the first layer: one of those that are KEPT, or loaded."""
    if KEPT:
        return U[i]
    else:
        return load_block(U, 0, i * EB, dims.DK, dims.DE, dims.PK, EB)


@triton.jit
def _down(W, i, KEPT: tl.constexpr, dims: tl.constexpr, EB: tl.constexpr):
    """A block of the second layer."""
    if KEPT:
        return W[i]
    else:
        return load_block(W, i * EB, 0, dims.DE, dims.DV, EB, dims.PV)


@triton.jit
def load_up(up, dims: tl.constexpr, BLOCKS: tl.constexpr, EB: tl.constexpr):
    """The first layer of a memory, ``[PK, EB]`` each."""
    blocks = ()
    for i in tl.static_range(BLOCKS):
        blocks = blocks + (_up(up, i, False, dims, EB),)
    return blocks


@triton.jit
def load_down(down, dims: tl.constexpr, BLOCKS: tl.constexpr, EB: tl.constexpr):
    """The second layer of a memory, ``[EB, PV]`` each."""
    blocks = ()
    for i in tl.static_range(BLOCKS):
        blocks = blocks + (_down(down, i, False, dims, EB),)
    return blocks


@triton.jit
def read_up(state, x, U, KEPT: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, BLOCKS: tl.constexpr,
            EB: tl.constexpr):  # fmt: skip
    """``state`` times x U, of hidden units."""
    blocks = ()
    for i in tl.static_range(BLOCKS):
        blocks = blocks + (state * tl.dot(x, _up(U, i, KEPT, dims, EB), input_precision=PRECISION),)
    return blocks


@triton.jit
def read_down(x, W, KEPT: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, BLOCKS: tl.constexpr,
              EB: tl.constexpr):  # fmt: skip
    """x W, of hidden units x."""
    made = tl.dot(x[0], _down(W, 0, KEPT, dims, EB), input_precision=PRECISION)
    for i in tl.static_range(1, BLOCKS):
        made = tl.dot(x[i], _down(W, i, KEPT, dims, EB), made, input_precision=PRECISION)
    return made


@triton.jit
def read_back(state, error, W, KEPT: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, BLOCKS: tl.constexpr,
              EB: tl.constexpr):  # fmt: skip
    """``state`` times ``error`` W^T, of hidden units."""
    blocks = ()
    for i in tl.static_range(BLOCKS):
        W_i = tl.trans(_down(W, i, KEPT, dims, EB))
        blocks = blocks + (state * tl.dot(error, W_i, input_precision=PRECISION),)
    return blocks


@triton.jit
def alike(x, rows, j, end, PRECISION: tl.constexpr, dims: tl.constexpr, BJ: tl.constexpr, BLOCKS: tl.constexpr,
          EB: tl.constexpr):  # fmt: skip
    """``[.., BJ]``: hidden units x times those of BJ ``rows [T, SE]`` from j on."""
    pairs = tl.dot(x[0], tl.trans(load_rows(rows, j, end, dims.SE, 0, dims.SE, BJ, EB)), input_precision=PRECISION)
    for i in tl.static_range(1, BLOCKS):
        row = load_rows(rows, j, end, dims.SE, i * EB, dims.SE, BJ, EB)
        pairs = tl.dot(x[i], tl.trans(row), pairs, input_precision=PRECISION)
    return pairs


@triton.jit
def add_rows(x, pairs, rows, j, end, PRECISION: tl.constexpr, dims: tl.constexpr, BJ: tl.constexpr,
             BLOCKS: tl.constexpr, EB: tl.constexpr):  # fmt: skip
    """Hidden units x and what ``pairs [.., BJ]`` take of ``rows [T, SE]`` from j on."""
    blocks = ()
    for i in tl.static_range(BLOCKS):
        row = load_rows(rows, j, end, dims.SE, i * EB, dims.SE, BJ, EB)
        blocks = blocks + (tl.dot(pairs, row, x[i], input_precision=PRECISION),)
    return blocks


@triton.jit
def tile_state(weights, bh, tile, T, BT: tl.constexpr):
    """``[BT, 1]``: what is left of the first state at each token of a tile."""
    t = tile.first + tl.arange(0, BT)
    return tl.load(weights.state + bh * T + t, mask=t < tile.stop, other=0.0)[:, None]


@triton.jit
def read_second(state, z, W, left, weights, bh, tile, begin, T, span, PRECISION: tl.constexpr, dims: tl.constexpr,
                BT: tl.constexpr, BJ: tl.constexpr, BLOCKS: tl.constexpr, EB: tl.constexpr):  # fmt: skip
    """z_t W_t of a tile's tokens: what W_0 makes of their hidden units, and the rows of their segment up to each."""
    y = state * read_down(z, W, False, PRECISION, dims, BLOCKS, EB)
    for j in range(begin, tile.stop, BJ):
        pairs = alike(z, left.z, j, tile.stop, PRECISION, dims, BJ, BLOCKS, EB)
        error_j = load_rows(left.error, j, tile.stop, dims.SV, 0, dims.SV, BJ, dims.PV)
        given = load_tile_weights(weights, bh, tile.first, tile.stop, begin, j - begin, T, span, BT, BJ)
        y = tl.dot((given * pairs).to(z[0].dtype), error_j, y, input_precision=PRECISION)
    return y
