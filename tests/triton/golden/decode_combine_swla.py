"""The parts of a decode step of several programs, added up (Eq. 6-17), and what the next step needs of the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import Dims
from .decode_common import LOW, Memory, Parts, load_place, load_row

DK = 128
PK = 128
SK = 128
DV = 128
PV = 128
SV = 128
SPLITS = 4


@triton.jit
def _add_up(parts, place, D: tl.constexpr, width, SPLITS: tl.constexpr, BP: tl.constexpr):
    """Size and weighted reads of the softmax over the SPLITS + 1 parts that begin at ``place``, BP at a time."""
    x = tl.arange(0, D)
    top = LOW
    size = 0.0
    acc = tl.zeros([D], tl.float32)
    for p0 in range(0, SPLITS + 1, BP):
        p = p0 + tl.arange(0, BP)
        part = place + p
        tops = tl.load(parts.stats + part * 2, mask=p < SPLITS + 1, other=LOW)
        sizes = tl.load(parts.stats + part * 2 + 1, mask=p < SPLITS + 1, other=0.0)
        inside = (p < SPLITS + 1)[:, None] & (x < width)[None, :]
        some = tl.load(parts.parts + part[:, None] * width + x[None, :], mask=inside, other=0.0)
        new = tl.maximum(top, tl.max(tops, 0))
        weight = tl.exp(tops - new)
        keep = tl.exp(top - new)
        size = size * keep + tl.sum(weight * sizes, 0)
        acc = acc * keep + tl.sum(weight[:, None] * some, 0)
        top = new
    return size, acc


@triton.jit
def _key_sum(k, memory, bh, row, begun, n, H, length, dims: tl.constexpr):
    """The sum of the keys of the segment under way after the last token."""
    # It began with token ``since``, or before the first.
    ends = (begun + n) // length
    since = tl.maximum(ends * length - begun, 0)
    keys = tl.where(ends == 0, load_row(memory.key_sum + bh * dims.DK, dims.DK, dims.PK), 0.0)
    for j in range(since, n):
        keys += load_row(k + (row + j * H) * dims.DK, dims.DK, dims.PK)
    return keys


@triton.jit(do_not_specialize=["cached_all", "filled_all", "first", "total", "H", "length"])
def combine_kernel(
    k, v, y, memory, parts, cached_all, filled_all, first, n, total, H, length, SPLITS: tl.constexpr, BP: tl.constexpr,
    dims: tl.constexpr,
):  # fmt: skip
    """Program t < n of a head adds up the parts of token t; program n writes what the next call needs of the tokens."""
    t = tl.program_id(1)
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    row = (b * total + first) * H + bh % H
    x = tl.arange(0, dims.PV)
    if t < n:
        size, acc = _add_up(parts, (bh * n + t) * (SPLITS + 1), dims.PV, dims.DV, SPLITS, BP)
        acc = acc / size
        tl.store(y + (row + t * H) * dims.DV + x, acc.to(y.dtype.element_ty), mask=x < dims.DV)
    else:
        _, begun = load_place(memory, cached_all, filled_all, b, first, length)
        d = tl.arange(0, dims.PK)
        keys = _key_sum(k, memory, bh, row, begun, n, H, length, dims)
        tl.debug_barrier()
        tl.store(memory.key_sum + bh * dims.DK + d, keys, mask=d < dims.DK)
        key = load_row(k + (row + (n - 1) * H) * dims.DK, dims.DK, dims.PK)
        value = load_row(v + (row + (n - 1) * H) * dims.DV, dims.DV, dims.PV)
        tl.store(memory.last_key + bh * dims.DK + d, key, mask=d < dims.DK)
        tl.store(memory.last_value + bh * dims.DV + x, value, mask=x < dims.DV)


def decode_combine(
    k: torch.Tensor,
    v: torch.Tensor,
    memory: Memory,
    parts: Parts,
    y: torch.Tensor,
    cached_all: int,
    filled_all: int,
    length: int,
    first: int,
    n: int,
) -> None:
    """y of tokens first to first + n, and key_sum, last_key and last_value after them; see :mod:`decode_step`."""
    B, total, H, _ = k.shape
    memory = memory._replace(states=None, descriptors=None, online=None)
    combine_kernel[(B * H, n + 1)](
        k=k, v=v, y=y, memory=memory, parts=parts, cached_all=cached_all, filled_all=filled_all, first=first, n=n,
        total=total, H=H, length=length, SPLITS=SPLITS, BP=min(triton.next_power_of_2(SPLITS + 1), max(1, 8192 // PV)),
        dims=Dims(DK, DV, PK, PV, SK, SV), num_warps=4,
    )  # fmt: skip
