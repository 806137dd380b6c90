"""How a row of tokens is laid out for vectorised work: chunks, in steps, over independent lanes.

A chunk is a run of at most ``size`` tokens inside one segment. A lane is a chain of chunks that must follow one
another: a segment where states start afresh, a whole sequence where they are carried over. Step c holds the c-th chunk
of every lane that has one, so a scan needs one vectorised operation a step, however many lanes there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..modes import for_now, ordinary
from ..segments import Segments

Tensor = torch.Tensor
CHUNK = 64
"""Tokens of a chunk of a linear memory, at most."""
BLOCK = 256
"""Tokens that read the cached states together."""


@dataclass(frozen=True, eq=False)
class Step:
    """Chunks ``start`` to ``stop``, one for each of the first ``stop - start`` lanes."""

    start: int
    stop: int
    closing: Tensor
    """int64 [X]: the lanes whose segment ends with this step."""


@dataclass(frozen=True, eq=False)
class Plan:
    """M chunks of at most ``size`` tokens, ordered by step, then by lane (lanes with most chunks first).

    Attributes:
        size: b, slots of a chunk.
        tokens: int64 [M, b], the token in each slot; slots past a chunk's end repeat its last token.
        last: int64 [M], the last slot in use.
        segment: int64 [M], the segment that the chunk belongs to.
        follows: bool [M], whether the token before the chunk belongs to the same lane.
        used: bool [M, b], the slots up to a chunk's end; ``None`` where that is all of them.
        causal: bool [b, 1 + b], whether a slot comes after another, or is it; first, the row before the chunk.
        slot: int64 [T], where each token stands among the M * b slots.
        order: int64 [N], where each segment stands in the order in which the steps close them.
        final: the last chunk of each of the N segments.
    """

    size: int
    tokens: Tensor
    last: Tensor
    segment: Tensor
    follows: Tensor
    used: Tensor | None
    causal: Tensor
    slot: Tensor
    order: Tensor
    final: tuple[int, ...]
    steps: tuple[Step, ...]

    def take(self, x: Tensor) -> Tensor:
        """Tokens to chunks: [G, T, ...] to [G, M, b, ...]."""
        return _take(x, self.tokens)

    def take_or_zero(self, x: Tensor) -> Tensor:
        """[G, T] to [G, M, b]; 0 past a chunk's end, where a NaN that is repeated would reach more gradients."""
        x = self.take(x)
        return x if self.used is None else x.masked_fill(~self.used, 0)

    def take_previous(self, x: Tensor) -> Tensor:
        """[G, T, D] to [G, M, b + 1, D]: each chunk after the token before it (zeros, where there is none)."""
        before = x.index_select(1, (self.tokens[:, 0] - 1).clamp(min=0))
        before = torch.where(self.follows[:, None], before, 0)
        return torch.cat([before[:, :, None], _take(x, self.tokens)], 2)

    def seen(self, before: int = 0) -> Tensor:
        """bool [b, before + b] or [M, b, before + b]: which slots a slot sees, ``before`` rows in front included.

        Slots past a chunk's end see nothing: what they repeat of the last token is not to reach it twice.
        """
        seen = self.causal[:, 1 - before :]
        return seen if self.used is None else seen & self.used[:, :, None]

    def put(self, chunks: Tensor) -> Tensor:
        """Chunks back to tokens: [G, M, b, ...] to [G, T, ...]."""
        return chunks.flatten(1, 2).index_select(1, self.slot)

    def at_last(self, x: Tensor) -> Tensor:
        """The row of each chunk's last token: [G, M, b, ...] to [G, M, ...]."""
        return x[:, torch.arange(len(self.last), device=self.last.device), self.last]

    def gather(self, closed: list[Tensor]) -> Tensor:
        """What the steps closed, [G, X, ...] each, in the order of the segments: [G, N, ...]."""
        return torch.cat(closed, 1).index_select(1, self.order)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(1, rows.flatten()).view(x.shape[0], *rows.shape, *x.shape[2:])


def make_plan(segments: Segments, size: int, carried: bool, device: torch.device) -> Plan:
    """Lay out ``segments`` in chunks of at most ``size`` tokens; ``carried`` makes a lane of each sequence."""
    lanes: dict[int, list[tuple[int, int, int]]] = {}
    for index, (begin, end, first) in enumerate(segments.spans):
        lane = lanes.setdefault(first if carried else index, [])
        lane += [(left, min(left + size, end), index) for left in range(begin, end, size)]
    ordered = sorted(lanes.values(), key=len, reverse=True)
    chunks: list[tuple[int, int, int, bool]] = []
    steps, closed = [], []
    for depth in range(len(ordered[0])):
        opening, closing = len(chunks), []
        for position, lane in enumerate(ordered):
            if depth >= len(lane):
                break
            left, right, index = lane[depth]
            chunks.append((left, right, index, depth > 0))
            if right == segments.spans[index][1]:
                closing.append(position)
                closed.append(index)
        steps.append(Step(opening, len(chunks), torch.tensor(closing, dtype=torch.int64, device=device)))
    final = {index: chunk for chunk, (_, _, index, _) in enumerate(chunks)}
    start, stop, segment, follows = (torch.tensor(column) for column in zip(*chunks, strict=True))
    last = stop - start - 1
    places = torch.arange(size)
    tokens = start[:, None] + torch.minimum(places, last[:, None])
    used = places <= last[:, None]
    slot = torch.empty(segments.spans[-1][1], dtype=torch.int64)
    slot[tokens[used]] = torch.arange(tokens.numel()).view_as(tokens)[used]
    order = torch.tensor(closed).argsort()
    return Plan(
        size,
        tokens.to(device),
        last.to(device),
        segment.to(device),
        follows.to(device),
        None if bool(used.all()) else used.to(device),
        torch.ones(size, 1 + size, dtype=torch.bool).tril(1).to(device),
        slot.to(device),
        order.to(device),
        tuple(final[index] for index in range(len(final))),
        tuple(steps),
    )


@dataclass(frozen=True, eq=False)
class Block:
    """Tokens ``begin`` to ``end`` and the cached segments ``lo`` to ``hi`` that any of them may read.

    ``visible`` is bool [end - begin, hi - lo] (``None``: all of them), ``rank`` int64 [end - begin] counts the segments
    of the token's sequence up to and including its own.
    """

    begin: int
    end: int
    lo: int
    hi: int
    visible: Tensor | None
    rank: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """All that a call needs to know of its segments, on its device.

    Attributes:
        count: N, the number of segments.
        firsts: the index of the first segment of each sequence, and N.
        states, keys: the plans for the states and for the running means of the keys.
        blocks: of the read.
        place: int64 [T], tokens of its segment up to and including each token.
        rank: int64 [T], segments of its sequence up to and including the one of each token.
        closing: int64 [N], the last token of each segment.
    """

    count: int
    firsts: tuple[int, ...]
    states: Plan
    keys: Plan
    blocks: tuple[Block, ...]
    place: Tensor
    rank: Tensor
    closing: Tensor


def make_layout(segments: Segments, size: int, carried: bool, device: torch.device) -> Layout:
    """Lay out ``segments``: states in chunks of ``size`` tokens, their lanes as :func:`make_plan` says."""
    return for_now(_layout(segments, size, carried, device))


@lru_cache(maxsize=64)
def _layout(segments: Segments, size: int, carried: bool, device: torch.device) -> Layout:
    with ordinary(), torch.device("cpu"):
        return _make_layout(segments, size, carried, device)


def _make_layout(segments: Segments, size: int, carried: bool, device: torch.device) -> Layout:
    begin, end, first = (bound.long() for bound in (segments.begin, segments.end, segments.first))
    of = torch.arange(segments.count).repeat_interleave(end - begin)
    place = torch.arange(1, len(of) + 1) - begin[of]
    blocks = tuple(_blocks(of, first[of], device))
    return Layout(
        segments.count,
        (*sorted({first for _, _, first in segments.spans}), segments.count),
        make_plan(segments, size, carried, device),
        make_plan(segments, chunk_size(segments), False, device),
        blocks,
        place.to(device),
        (of - first[of] + 1).to(device),
        (end - 1).to(device),
    )


def chunk_size(segments: Segments) -> int:
    """Tokens of a chunk of a linear memory, so that the longest segment is cut evenly."""
    return -(-segments.longest // -(-segments.longest // CHUNK))


def _blocks(of: Tensor, first: Tensor, device: torch.device) -> Iterator[Block]:
    """Cut the row into blocks, each with the past that it can see: the future is skipped."""
    for begin in range(0, len(of), BLOCK):
        end = min(begin + BLOCK, len(of))
        lo, hi = int(first[begin]), int(of[end - 1])
        columns = torch.arange(lo, hi)
        visible = (columns < of[begin:end, None]) & (columns >= first[begin:end, None])
        rank = of[begin:end] - first[begin:end] + 1
        yield Block(begin, end, lo, hi, None if bool(visible.all()) else visible.to(device), rank.to(device))
