"""Arrays that kernels of one call pass on to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Decays(NamedTuple):
    """Of SWLA's writes: cum, now and after ``[B*H, T]``, before ``[B*H, P]``, float32."""

    cum: Tensor
    now: Tensor
    after: Tensor
    before: Tensor


class States(NamedTuple):
    """``[B*H, P, SK, SV]``: ends float32, operand; past ``[B*H, N, SK, SV]``; means and sums of keys, float32."""

    ends: Tensor | None
    operand: Tensor
    past: Tensor | None
    means: Tensor
    sums: Tensor | None


class Gates(NamedTuple):
    """Learned gates: logits ``[B*H, N, T]`` and lse ``[B*H, T]``, float32."""

    logits: Tensor
    lse: Tensor
