"""A memory, how it is read, and the gradient that writes a deep one. Rows are vectors: a linear memory reads x M."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu

Memory = tuple[Tensor, ...]
"""A linear memory is ``(M,)``, M [..., Dk, Dv]; a deep one ``(W_up, W_down)``, [..., Dk, E] and [..., E, Dv]."""


def rows(x: Tensor, matrix: Tensor) -> Tensor:
    """x W for one row a matrix: x [..., m], W [..., m, n] -> [..., n]; leading dimensions broadcast."""
    return (x.unsqueeze(-2) @ matrix).squeeze(-2)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b for rows a [..., m] and b [..., n] -> [..., m, n]."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU: x (1 + tanh φ(x)) / 2 with φ(x) = sqrt(2/π) (x + 0.044715 x³)."""
    return gelu(x, approximate="tanh")


def gelu_tanh_slope(x: Tensor) -> Tensor:
    """The derivative of :func:`gelu_tanh`."""
    root = math.sqrt(2 / math.pi)
    tanh = torch.tanh(root * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * root * (1 + 3 * 0.044715 * x**2)


def read(memory: Memory, x: Tensor, residual: bool) -> Tensor:
    """M(x): x M for a linear memory, gelu_tanh(x W_up) W_down for a deep one, plus x where ``residual``."""
    if len(memory) == 1:
        (M,) = memory
        return rows(x, M)
    W_up, W_down = memory
    y = rows(gelu_tanh(rows(x, W_up)), W_down)
    return y + x if residual else y


def gradient(memory: Memory, k: Tensor, error: Tensor) -> Memory:
    """∇L of a deep memory at key k [..., Dk], given error = ∂L/∂M(k) [..., Dv]; one tensor a parameter."""
    W_up, W_down = memory
    hidden = rows(k, W_up)
    return outer(k, rows(error, W_down.mT) * gelu_tanh_slope(hidden)), outer(gelu_tanh(hidden), error)
