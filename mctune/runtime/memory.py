"""What one layer remembers of B sequences between two calls: the storage under ``MemoryCache``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(eq=False)
class LayerMemory:
    """The cache of one layer, float32, one row a sequence; sequences may be at different places.

    Attributes:
        states: cached end states of segments (Eq. 4): ``(M,)`` with M [B, H, capacity, Dk, Dv] for a matrix memory,
            ``(W_up, W_down)``, [B, H, capacity, Dk, E] and [B, H, capacity, E, Dv], for a deep one.
        descriptors: mean key of each cached segment, [B, H, capacity, Dk] (Eq. 10).
        online: the state of the segment under way, shaped as ``states`` without the capacity axis.
        key_sum: sum of the keys of the segment under way, [B, H, Dk].
        last_key, last_value: of the newest token, [B, H, Dk] and [B, H, Dv] (swla, Eq. 26-27); zero before a first one,
            and at an independent segment's start.
        start, momentum: of a deep memory, shaped as ``online``: the state that entered the inner chunk under way, and S
            (Eq. 34); empty for a matrix memory.
        cached: int32 [B] on the CPU, states in use of each sequence.
        filled: int32 [B] on the CPU, tokens of the segment under way, less than the segment length.
    """

    states: tuple[Tensor, ...]
    descriptors: Tensor
    online: tuple[Tensor, ...]
    key_sum: Tensor
    last_key: Tensor
    last_value: Tensor
    start: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    cached: Tensor
    filled: Tensor

    @property
    def capacity(self) -> int:
        """States that there is room for."""
        return self.descriptors.shape[2]

    def advance(self, tokens: int, segment_length: int) -> None:
        """Count ``tokens`` more tokens of every sequence."""
        total = self.filled + tokens
        self.cached += total // segment_length
        self.filled = total % segment_length
