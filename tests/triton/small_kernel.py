"""x_t . x_j for the tokens of a tile and of every tile, summed: one product in a loop."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def gram_kernel(x, y, T, D: tl.constexpr, BT: tl.constexpr):
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    columns = tl.arange(0, D)
    tile = tl.load(x + rows[:, None] * D + columns[None, :], mask=rows[:, None] < T, other=0.0)
    total = tl.zeros([BT, BT], tl.float32)
    for begin in range(0, T, BT):
        others = begin + tl.arange(0, BT)
        total += tl.dot(tile, tl.trans(tl.load(x + others[:, None] * D + columns[None, :])))
    tl.store(y + rows[:, None] * BT + tl.arange(0, BT)[None, :], total)


def gram(x: torch.Tensor, y: torch.Tensor, BT: int, num_warps: int, num_stages: int) -> None:
    """y [T, BT] from x [T, D]; T a multiple of BT."""
    T, D = x.shape
    gram_kernel[(T // BT,)](x=x, y=y, T=T, D=D, BT=BT, num_warps=num_warps, num_stages=num_stages)


@triton.jit
def weighted_kernel(x, w, z, y, T, D: tl.constexpr, BT: tl.constexpr):
    rows = tl.arange(0, D)
    total = tl.zeros([D, D], tl.float32)
    for begin in range(0, T, BT):
        tokens = begin + tl.arange(0, BT)
        left = tl.load(x + tokens[:, None] * D + rows[None, :])
        right = tl.load(z + tokens[:, None] * D + rows[None, :])
        factor = tl.trans(left).to(tl.float32) * tl.load(w + tokens)[None, :]
        total = tl.dot(factor.to(left.dtype), right, total)
    tl.store(y + rows[:, None] * D + rows[None, :], total)


def weighted(
    x: torch.Tensor, w: torch.Tensor, z: torch.Tensor, y: torch.Tensor, BT: int, num_warps: int, num_stages: int
) -> None:
    """y [D, D], the sum of w_t x_t z_t^T over x, z [T, D]; T a multiple of BT. Its left factors are in registers."""
    T, D = x.shape
    weighted_kernel[(1,)](x=x, w=w, z=z, y=y, T=T, D=D, BT=BT, num_warps=num_warps, num_stages=num_stages)


class Three(NamedTuple):
    read: torch.Tensor
    idle: torch.Tensor
    absent: torch.Tensor | None


@triton.jit
def copy_kernel(idle_too, three, y, T, BT: tl.constexpr):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    x = tl.load(three.read + t, mask=t < T, other=0.0)
    if three.absent is not None:
        x += tl.load(three.absent + t, mask=t < T, other=0.0)
    tl.store(y + t, x, mask=t < T)


def copy(x: torch.Tensor, y: torch.Tensor, BT: int) -> None:
    """y = x [T], with tensors beside it that the kernel has no use for."""
    copy_kernel[(triton.cdiv(x.numel(), BT),)](idle_too=x, three=Three(x, x, None), y=y, T=x.numel(), BT=BT)
