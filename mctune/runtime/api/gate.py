"""The projection behind a memory's gate: linear in the hidden states, in float32 whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear

from ..modes import without_autocast

Tensor = torch.Tensor


class GateLinear(nn.Linear):
    """A linear layer that computes in float32 (float64 for float64 inputs), also under autocast.

    A decay is applied once a token: rounded to 16 bits, it would be off by as much at every one of them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] of any dtype to float32 [..., out_features]."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with without_autocast(x.device):
            bias = None if self.bias is None else self.bias.to(dtype)
            return linear(x.to(dtype), self.weight.to(dtype), bias)
