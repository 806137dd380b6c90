"""How far a result is from the oracle's: one number."""

from __future__ import annotations

import math

import torch


def error_ratio(x: torch.Tensor, ref: torch.Tensor) -> float:
    """RMS(ref - x) / (RMS(ref) + 1e-8), computed in float64.

    Infinite, so above every tolerance, when the shapes differ or when either side holds a NaN or an infinity.
    """
    if x.shape != ref.shape:
        return math.inf
    wanted = ref.detach().to(torch.float64)
    found = x.detach().to(wanted)
    ratio = float((wanted - found).square().mean().sqrt() / (wanted.square().mean().sqrt() + 1e-8))
    return ratio if math.isfinite(ratio) else math.inf
