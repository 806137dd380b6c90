"""Layers without state of their own, whose ``forward`` can take the place of another layer's with the same arguments.

This is what the `kernels` library asks of a layer in a repository: no constructor, no other method, and no class
variables but the two below.
"""

from __future__ import annotations

import torch
from torch import nn

from .functional import memory_caching

Tensor = torch.Tensor


class MemoryCachingCore(nn.Module):
    """The operation inside a layer, between its projections: ``forward(q, k, v, u)`` as :func:`memory_caching`.

    Attributes:
        aggregation, segment_length, top_k: options that the layer whose ``forward`` is replaced has as attributes.

    Examples:
        >>> core = MemoryCachingCore()
        >>> core.aggregation, core.segment_length, core.top_k = "grm", 32, None
        >>> core(*torch.randn(4, 2, 96, 4, 16)).shape  # B=2, T=96, H=4, Dk=Dv=16
        torch.Size([2, 96, 4, 16])
    """

    has_backward = True
    can_torch_compile = True

    aggregation: str
    segment_length: int
    top_k: int | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, u: Tensor | None = None) -> Tensor:
        """q, k, u: [B, T, H, Dk], v: [B, T, H, Dv]; y, [B, T, H, Dv]."""
        return memory_caching(
            q, k, v, u, aggregation=self.aggregation, segment_length=self.segment_length, top_k=self.top_k
        )
