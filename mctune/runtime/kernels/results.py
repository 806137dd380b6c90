"""What launchers of every backend return, and the widths that kernels are compiled for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

LANES = 16
"""Kernels are compiled for widths that are multiples of this many floats; others are padded with zeros here."""


def padded(width: int) -> int:
    """The width that a kernel is compiled for."""
    return -(-width // LANES) * LANES


class Forward(NamedTuple):
    """y ``[B, T, H, Dv]``; and for a backward or a cache the arrays that were to be kept (:mod:`kept`)."""

    y: torch.Tensor
    kept: Mapping[str, torch.Tensor]


class Gradients(NamedTuple):
    """Gradients of q, k, v, u, the gates and a deep memory's layers, float32, in the shapes of the inputs.

    q's is that of the read alone: u's, which stands by itself, is added to it where u is q. What the recurrence does
    not have is ``None``, and so may be u's where gates are not learned: it is zero.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    u: torch.Tensor | None
    g: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    lam: torch.Tensor | None = None
    eta: torch.Tensor | None = None
    mu: torch.Tensor | None = None
    W_up: torch.Tensor | None = None
    W_down: torch.Tensor | None = None
