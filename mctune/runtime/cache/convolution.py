"""The inputs of short convolutions that a cache keeps for the next call, and to go back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..errors import ArgumentError
from .crop import remedy

Tensor = torch.Tensor


@dataclass(eq=False)
class Convolution:
    """Newest inputs of the convolutions, [B, K, width] each; the oldest ``spare`` of the K are kept only to go back.

    ``floor``, int64 [B] on the CPU: the length to which each sequence can go back. Cropped inputs leave zeros in front.
    """

    inputs: tuple[Tensor, ...]
    spare: int
    floor: Tensor

    def reach(self, lengths: Tensor) -> Tensor:
        """int64 [B]: by how many tokens each sequence can go back."""
        return lengths - self.floor


def check_convolution(kept: Convolution, lengths: Tensor, removed: Tensor, reach: int) -> None:
    """Whether so many tokens of every sequence can be taken back; ``reach`` is the cache's ``rewind``.

    Raises:
        ArgumentError: if not.
    """
    can = kept.reach(lengths)
    short = removed > can
    if bool(short.any()):
        most, left = int(removed[short].max()), int(can[short].min())
        raise ArgumentError(
            f"crop by {most} tokens with inputs of a convolution kept for {left}: crop by at most "
            f"{left}, or to 0 and run the prompt again; {remedy(most, reach)}"
        )


def crop_convolution(kept: Convolution, removed: Tensor) -> None:
    """Take these tokens back."""

    def cropped(x: Tensor) -> Tensor:
        counts = removed.clamp(max=x.shape[1]).tolist()
        rows = (pad(row[: len(row) - count], (0, 0, count, 0)) for row, count in zip(x, counts, strict=True))
        return torch.stack(tuple(rows))

    kept.inputs = tuple(cropped(x) for x in kept.inputs)


def in_common(kept: Convolution, lengths: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """The inputs that all sequences have, and how many of those are spare."""
    # A sequence that can go back to its beginning lacks nothing: before it there are zeros.
    lacking = int(torch.where(kept.floor > 0, kept.spare - kept.reach(lengths), 0).max())
    return tuple(x[:, lacking:] for x in kept.inputs), kept.spare - lacking
