"""The parts of a decode step of several programs, added up (Eq. 6-17), and what the next step needs of the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import LOW, load_place, load_row


@triton.jit(do_not_specialize=["cached_all", "filled_all", "first", "total", "H", "length"])
def combine_kernel(
    k, v, key_sum, last_key, last_value, cached, filled, parts, stats, y,
    cached_all, filled_all, first, n, total, H, length,
    SWLA: tl.constexpr, AGGREGATION: tl.constexpr, INDEPENDENT: tl.constexpr, SPLITS: tl.constexpr,
    BP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PK: tl.constexpr, PV: tl.constexpr,
):  # fmt: skip
    """Program t < n of a head adds up the parts of token t; program n writes what the next call needs of the tokens."""
    t = tl.program_id(1)
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    row = (b * total + first) * H + bh % H
    x = tl.arange(0, PV)
    if t < n:
        top = LOW
        size = 0.0
        acc = tl.zeros([PV], tl.float32)
        for p0 in range(0, SPLITS + 1, BP):
            p = p0 + tl.arange(0, BP)
            part = (bh * n + t) * (SPLITS + 1) + p
            tops = tl.load(stats + part * 2, mask=p < SPLITS + 1, other=LOW)
            sizes = tl.load(stats + part * 2 + 1, mask=p < SPLITS + 1, other=0.0)
            inside = (p < SPLITS + 1)[:, None] & (x < DV)[None, :]
            some = tl.load(parts + part[:, None] * DV + x[None, :], mask=inside, other=0.0)
            new = tl.maximum(top, tl.max(tops, 0))
            weight = tl.exp(tops - new)
            keep = tl.exp(top - new)
            size = size * keep + tl.sum(weight * sizes, 0)
            acc = acc * keep + tl.sum(weight[:, None] * some, 0)
            top = new
        if AGGREGATION != "residual":
            acc = acc / size
        tl.store(y + (row + t * H) * DV + x, acc.to(y.dtype.element_ty), mask=x < DV)
    else:
        _, begun = load_place(cached, filled, cached_all, filled_all, b, first, length)
        d = tl.arange(0, PK)
        # The segment under way after the last token began with token ``since``, or before the first.
        ends = (begun + n) // length
        since = tl.maximum(ends * length - begun, 0)
        keys = tl.where(ends == 0, load_row(key_sum + bh * DK, DK, PK), 0.0)
        for j in range(since, n):
            keys += load_row(k + (row + j * H) * DK, DK, PK)
        tl.debug_barrier()
        tl.store(key_sum + bh * DK + d, keys, mask=d < DK)
        if SWLA:
            key = load_row(k + (row + (n - 1) * H) * DK, DK, PK)
            value = load_row(v + (row + (n - 1) * H) * DV, DV, PV)
            if INDEPENDENT:
                goes_on = (begun + n) % length > 0
                key = tl.where(goes_on, key, 0.0)
                value = tl.where(goes_on, value, 0.0)
            tl.store(last_key + bh * DK + d, key, mask=d < DK)
            tl.store(last_value + bh * DV + x, value, mask=x < DV)


def decode_combine(
    k: torch.Tensor,
    v: torch.Tensor,
    key_sum: torch.Tensor,
    last_key: torch.Tensor,
    last_value: torch.Tensor,
    cached: torch.Tensor | None,
    filled: torch.Tensor | None,
    parts: torch.Tensor,
    stats: torch.Tensor,
    y: torch.Tensor,
    cached_all: int,
    filled_all: int,
    length: int,
    first: int,
    n: int,
    SWLA: tl.constexpr,
    AGGREGATION: tl.constexpr,
    INDEPENDENT: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PK: tl.constexpr,
    PV: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """y of tokens first to first + n, and key_sum, last_key and last_value after them; see :mod:`decode_step`."""
    B, total, H, _ = k.shape
    combine_kernel[(B * H, n + 1)](
        k=k, v=v, key_sum=key_sum, last_key=last_key, last_value=last_value, cached=cached, filled=filled,
        parts=parts, stats=stats, y=y, cached_all=cached_all, filled_all=filled_all, first=first, n=n, total=total, H=H,
        length=length, SWLA=SWLA, AGGREGATION=AGGREGATION, INDEPENDENT=INDEPENDENT, SPLITS=SPLITS,
        BP=min(triton.next_power_of_2(SPLITS + 1), max(1, 8192 // PV)), DK=DK, DV=DV, PK=PK, PV=PV, num_warps=4,
    )  # fmt: skip
