"""Where Triton's kernels find the tokens: segments cut into pieces, and pieces into tiles, as int32 tables on a device.

A piece is what a program holds whole; the product inside it is quadratic in its length.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...modes import ordinary
from ...segments import Segments

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
"""Where the tensors that kernels read are; torch calls AMD's GPUs ``cuda`` too. Triton's interpreter runs on a CPU."""

Span = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Tables:
    """The P pieces, N segments and Q sequences of a row of tokens. Tensors are int32, contiguous and not written to.

    Attributes:
        begin, end: [P], a piece's first token, and one past its last.
        segment: [P], the segment that it is part of.
        entering: [P], the piece whose end state enters it, or -1: the one before it in its segment, and under
            checkpoint the one before it in its sequence.
        seg_begin, seg_end: [N], tokens.
        seg_first: [N], the first segment of the sequence.
        seg_past_end: [N], one past the last segment of the sequence.
        seg_piece, seg_last: [N], first and last piece.
        seq_begin, seq_end: [Q], pieces.
        crosses: whether any piece is entered.
    """

    begin: torch.Tensor
    end: torch.Tensor
    segment: torch.Tensor
    entering: torch.Tensor
    seg_begin: torch.Tensor
    seg_end: torch.Tensor
    seg_first: torch.Tensor
    seg_past_end: torch.Tensor
    seg_piece: torch.Tensor
    seg_last: torch.Tensor
    seq_begin: torch.Tensor
    seq_end: torch.Tensor
    crosses: bool
    pieces: tuple[Span, ...]
    """(first token, one past the last, cached segments that its tokens read) of each piece."""

    @property
    def whole(self) -> bool:
        """Whether every segment is one piece."""
        return len(self.pieces) == self.seg_begin.shape[0]

    def tiles(self, rows: int, share: tuple[int, int] | None = None) -> torch.Tensor:
        """int32 [tiles, 2]: (piece, first token) of every tile of at most ``rows`` tokens, the longest work first.

        ``share``: of the pieces between two tokens, where pieces begin or end.
        """
        return _tiles(self.pieces, rows, share, self.begin.device)


_BLOCK = 1024
"""Tokens that blocks are multiples of."""


@dataclass(frozen=True)
class Shares:
    """Heads and tokens that are dealt with one after another: ``at_once`` of ``heads``, T over ``blocks`` tokens."""

    heads: int
    at_once: int
    T: int
    blocks: int

    def __iter__(self) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
        """First head, heads, block, and its first token and one past its last."""
        span = self.T // self.blocks
        for first in range(0, self.heads, self.at_once):
            for block in range(self.blocks):
                yield first, min(self.at_once, self.heads - first), block, (block * span, (block + 1) * span)


def share_out(heads: int, T: int, row_bytes: int, limit: int, tables: Tables) -> Shares:
    """Shares of at most ``limit`` bytes, ``row_bytes`` a token and head, as far as pieces allow; 0 for no limit."""
    blocks, begins = 1, {begin for begin, _, _ in tables.pieces}
    while limit and T // blocks * row_bytes > limit:
        span, rest = divmod(T, 2 * blocks)
        if rest or span % _BLOCK or not begins.issuperset(range(0, T, span)):
            break
        blocks *= 2
    at_once = max(1, limit // (T // blocks * row_bytes)) if limit else heads
    return Shares(heads, min(at_once, heads), T, blocks)


def make_tables(segments: Segments, piece: int, checkpoint: bool, device: torch.device) -> Tables:
    """The tables of ``segments``, cut into pieces of at most ``piece`` tokens; made once for equal arguments."""
    return _make(segments.spans, piece, checkpoint, device)


@lru_cache(maxsize=256)
def _make(spans: tuple[Span, ...], length: int, checkpoint: bool, device: torch.device) -> Tables:
    pieces: list[Span] = []
    segment: list[int] = []
    entering: list[int] = []
    seg_piece: list[int] = []
    for number, (begin, end, first) in enumerate(spans):
        seg_piece.append(len(pieces))
        for start in range(begin, end, length):
            follows = start > begin or (checkpoint and number > first)
            entering.append(len(pieces) - 1 if follows else -1)
            segment.append(number)
            pieces.append((start, min(start + length, end), number - first))
    seg_last = [*(piece - 1 for piece in seg_piece[1:]), len(pieces) - 1]
    starts = [number for number, (_, _, first) in enumerate(spans) if number == first]
    ends = [*starts[1:], len(spans)]
    past_end = [end for start, end in zip(starts, ends, strict=True) for _ in range(start, end)]

    def table(numbers: list[int]) -> torch.Tensor:
        with ordinary():
            return torch.tensor(numbers, dtype=torch.int32, device="cpu").to(device, non_blocking=True)

    return Tables(
        begin=table([begin for begin, _, _ in pieces]),
        end=table([end for _, end, _ in pieces]),
        segment=table(segment),
        entering=table(entering),
        seg_begin=table([begin for begin, _, _ in spans]),
        seg_end=table([end for _, end, _ in spans]),
        seg_first=table([first for _, _, first in spans]),
        seg_past_end=table(past_end),
        seg_piece=table(seg_piece),
        seg_last=table(seg_last),
        seq_begin=table([seg_piece[start] for start in starts]),
        seq_end=table([seg_last[end - 1] + 1 for end in ends]),
        crosses=any(piece >= 0 for piece in entering),
        pieces=tuple(pieces),
    )


@lru_cache(maxsize=256)
def _tiles(pieces: tuple[Span, ...], rows: int, share: tuple[int, int] | None, device: torch.device) -> torch.Tensor:
    work = []
    for number, (begin, end, cached) in enumerate(pieces):
        if share is not None and not share[0] <= begin < share[1]:
            continue
        for start in range(begin, end, rows):
            work.append((cached, start - begin, number, start))
    work.sort(key=lambda tile: tile[:2], reverse=True)
    with ordinary():
        table = torch.tensor([tile[2:] for tile in work], dtype=torch.int32, device="cpu")
        return table.to(device, non_blocking=True)
