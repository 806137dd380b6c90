"""A short causal convolution of each channel, for rows, packed rows and tokens that go on from a cache."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import conv1d, silu

Tensor = torch.Tensor


class ShortConv(nn.Module):
    """y_t = silu(sum_j weight_j * x_{t - j}) over the newest ``size`` tokens of the sequence, each channel by itself.

    Args:
        width: channels D.
        size: tokens that an output sees, its own included.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        # Oldest token first, the order in which conv1d reads it.
        self.weight = nn.Parameter(torch.empty(width, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights again, uniform with variance 1 / (3 size)."""
        nn.init.uniform_(self.weight, -(self.size**-0.5), self.size**-0.5)

    def forward(
        self, x: Tensor, past: Tensor | None = None, cu_seqlens: Tensor | None = None, keep: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """y like x, [B, T, D], and the newest inputs of every sequence, [S, K, D], zeros before its first.

        Args:
            x: [B, T, D].
            past: what an earlier call has left of each row; ``None`` where the sequences start.
            cu_seqlens: bounds of the S sequences of a packed row, from 0 to T, which start here; otherwise each row is
                a sequence.
            keep: how many inputs to hand over at most; size - 1 by default, as many as the next call needs.
        """
        keep = self.size - 1 if keep is None else keep
        weight = self.weight.to(x.dtype)
        if cu_seqlens is None:
            past = x.new_zeros(len(x), keep, x.shape[2]) if past is None else past.to(x.dtype)
            line = torch.cat([past, x], 1)
            seen = line[:, past.shape[1] - self.size + 1 :]
            y = conv1d(seen.mT, weight[:, None], groups=len(weight)).mT
            # A copy: a view would keep the whole prompt's inputs alive.
            return silu(y), line[:, max(0, line.shape[1] - keep) :].detach().clone()
        bounds = cu_seqlens.to(x.device, torch.long)
        # Row 0 is what stands before every sequence.
        line = torch.cat([x.new_zeros(1, x.shape[2]), x[0]])

        def at(sequence: Tensor, place: Tensor) -> Tensor:
            index = torch.where(place < 0, 0, 1 + bounds[sequence] + place)
            return line.index_select(0, index.flatten())

        every = torch.arange(len(bounds) - 1, device=x.device)
        sequence = every.repeat_interleave(bounds.diff(), output_size=x.shape[1])
        place = torch.arange(x.shape[1], device=x.device) - bounds[sequence]
        taps = [at(sequence, place - back) * weight[:, self.size - 1 - back] for back in range(self.size)]
        newest = bounds.diff()[:, None] + torch.arange(-keep, 0, device=x.device)
        kept = at(every[:, None].expand_as(newest), newest).view(len(every), keep, x.shape[2])
        return silu(sum(taps[1:], taps[0]))[None], kept.detach()
