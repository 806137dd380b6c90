"""The operators under torch.func.vmap: the mapped axis joins B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ArgumentError

Tensor = torch.Tensor
Dims = tuple[int | None, ...]
_ROWS = 9
"""q to mu, which have B in front; W_up, W_down and cu_seqlens follow."""


def batch_forward(op: Callable[..., Any], info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
    """The rule of the forward ``op``: y and what is kept, with the mapped axis in front."""
    _check(in_dims, arguments)
    size: int = info.batch_size
    rows = [_fold(x, dim, size) for x, dim in zip(arguments[:_ROWS], in_dims[:_ROWS], strict=True)]
    y, kept = op(*rows, *arguments[_ROWS:])
    return (y.unflatten(0, (size, -1)), [x.unflatten(0, (size, -1)) for x in kept]), (0, [0] * len(kept))


def batch_backward(op: Callable[..., Any], info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
    """The rule of the backward ``op``: the gradients with the mapped axis in front."""
    _check(in_dims[1:], arguments[1:])
    size: int = info.batch_size
    tensors, kept, options = arguments[: _ROWS + 4], arguments[_ROWS + 4], arguments[_ROWS + 5 :]
    dims = in_dims[: len(tensors)]
    kept_dims: Any = in_dims[len(tensors)] or [None] * len(kept)
    if tensors[_ROWS + 1] is not None:  # the gradients of W_up and W_down are summed over B, not over the mapped axis
        runs = [op(*_one(tensors, dims, i), _one(kept, kept_dims, i), *options) for i in range(size)]
        return tuple(torch.stack(gradients) for gradients in zip(*runs, strict=True)), (0,) * len(runs[0])
    at = _ROWS + 1
    rows = [_fold(x, dim, size) for x, dim in zip(tensors[:at], dims[:at], strict=True)]
    kept = [_fold(x, dim, size) for x, dim in zip(kept, kept_dims, strict=True)]
    gradients = op(*rows, *tensors[at:], kept, *options)
    present = [x is not None for x in tensors[1 : len(gradients) + 1]]
    return (
        tuple(dx.unflatten(0, (size, -1)) if x else dx for dx, x in zip(gradients, present, strict=True)),
        tuple(0 if x else None for x in present),
    )


def _one(tensors: Sequence[Tensor], dims: Sequence[int | None], i: int) -> list[Tensor]:
    return [x if dim is None else x.select(dim, i) for x, dim in zip(tensors, dims, strict=True)]


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if x is None:
        return None
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _check(in_dims: Dims, arguments: tuple[Any, ...]) -> None:
    """Check the mapped axes of q and the arguments after it.

    Raises:
        ArgumentError: if a batch cannot join B.
    """
    remedy = 'loop over the mapped axis, or pass backend="eager"'
    for name, dim in zip(("W_up", "W_down", "cu_seqlens"), in_dims[_ROWS:], strict=False):
        if dim is not None:
            raise ArgumentError(f"torch.func.vmap maps {name}, which all rows share; {remedy}")
    if "packed" in arguments:
        raise ArgumentError(f"torch.func.vmap with segmentation='packed', where B is 1; {remedy}")
