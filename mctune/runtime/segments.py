"""Where a row of tokens is cut into segments (Memory Caching, arXiv:2602.24281, Eq. 4 and its section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from .arguments import shown
from .errors import ArgumentError
from .modes import ordinary
from .traits import SEGMENTATIONS


@dataclass(frozen=True, eq=False)
class Segments:
    """The spans of the N segments of a row of T tokens, in order, without gaps.

    Attributes:
        begin: int32 [N], the first token of each segment.
        end: int32 [N], one past its last token.
        first: int32 [N], the index of the first segment of the sequence that the segment belongs to.
        longest: tokens of the longest segment.

    The tensors are contiguous, on the CPU, and shared between calls: they must not be written to.
    """

    begin: torch.Tensor
    end: torch.Tensor
    first: torch.Tensor
    longest: int
    spans: tuple[tuple[int, int, int], ...]
    """The same as Python integers: (begin, end, first) of each segment."""

    @property
    def count(self) -> int:
        """N, the number of segments."""
        return len(self.spans)


def make_segments(
    T: int, segmentation: str = "constant", segment_length: int = 256, cu_seqlens: torch.Tensor | None = None
) -> Segments:
    """Cut T tokens into segments.

    Args:
        T: tokens in the row, at least 1.
        segmentation: ``constant`` (spans of ``segment_length``, the last may be shorter), ``logarithmic`` (the powers
            of two of T's binary expansion, longest first; ``segment_length`` is ignored) or ``packed`` (constant
            spans inside each sequence of ``cu_seqlens``; an empty sequence has no segment).
        segment_length: C, in tokens.
        cu_seqlens: integers [S + 1], from 0 to T, never decreasing; only with ``packed``.

    Raises:
        ArgumentError: on a size below 1, an unknown segmentation, or a ``cu_seqlens`` that does not cut up T tokens.
    """
    if segmentation not in SEGMENTATIONS:
        raise ArgumentError(f"segmentation={segmentation!r} is not one of {', '.join(SEGMENTATIONS)}")
    if T < 1:
        raise ArgumentError(f"T={T}: there must be at least 1 token")
    if segmentation != "logarithmic" and segment_length < 1:
        raise ArgumentError(f"segment_length={segment_length}: a segment has at least 1 token (for example 256)")
    check_packing(segmentation, cu_seqlens)
    if cu_seqlens is None:
        return _one_sequence(T, None if segmentation == "logarithmic" else segment_length)
    return _packed(segment_length, check_bounds(T, cu_seqlens))


def check_packing(segmentation: str, cu_seqlens: torch.Tensor | None) -> None:
    """Refuse bounds without ``packed``, and ``packed`` without bounds."""
    if segmentation != "packed" and cu_seqlens is not None:
        raise ArgumentError(f"cu_seqlens with segmentation={segmentation!r}: use segmentation='packed'")
    if segmentation == "packed" and cu_seqlens is None:
        raise ArgumentError("segmentation='packed' needs cu_seqlens, int32 [S + 1], from 0 to T")


def check_bounds(T: int, cu_seqlens: torch.Tensor) -> tuple[int, ...]:
    """The bounds as integers.

    Raises:
        ArgumentError: if they do not cut up T tokens.
    """
    check_bounds_type(cu_seqlens)
    if cu_seqlens.is_meta:
        raise ArgumentError("cu_seqlens is on meta, which holds no values; pass it on the CPU")
    bounds = tuple(int(bound) for bound in cu_seqlens.tolist())
    if bounds[0] != 0 or bounds[-1] != T:
        raise ArgumentError(f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; it must run from 0 to T={T}")
    for sequence, (left, right) in enumerate(pairwise(bounds)):
        if right < left:
            raise ArgumentError(f"cu_seqlens falls from {left} to {right} at sequence {sequence}; it must not decrease")
    return bounds


def check_bounds_type(cu_seqlens: torch.Tensor) -> None:
    """Refuse bounds that are no integer tensor, [S + 1]; their values are not looked at.

    Raises:
        ArgumentError: naming what they are.
    """
    must = "it must be int32 [S + 1] with S of at least 1, a torch.Tensor"
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ArgumentError(f"cu_seqlens is {shown(cu_seqlens)}; {must}")
    if cu_seqlens.is_nested or cu_seqlens.layout != torch.strided:
        raise ArgumentError(f"cu_seqlens is a nested or sparse tensor; {must}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 2:
        raise ArgumentError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; {must}")


@lru_cache(maxsize=256)
def _one_sequence(T: int, segment_length: int | None) -> Segments:
    if segment_length is not None:
        return _build([(begin, min(begin + segment_length, T), 0) for begin in range(0, T, segment_length)])
    spans, begin = [], 0
    for bit in reversed(range(T.bit_length())):
        if T >> bit & 1:
            spans.append((begin, begin + (1 << bit), 0))
            begin += 1 << bit
    return _build(spans)


@lru_cache(maxsize=64)
def _packed(segment_length: int, bounds: tuple[int, ...]) -> Segments:
    spans: list[tuple[int, int, int]] = []
    for left, right in pairwise(bounds):
        first = len(spans)
        spans += [(begin, min(begin + segment_length, right), first) for begin in range(left, right, segment_length)]
    return _build(spans)


def _build(spans: list[tuple[int, int, int]]) -> Segments:
    with ordinary():
        begin, end, first = torch.tensor(spans, dtype=torch.int32, device="cpu").T.contiguous().unbind(0)
    return Segments(begin, end, first, max(right - left for left, right, _ in spans), tuple(spans))
