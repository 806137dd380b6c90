"""What is known when a kernel is compiled: widths, dtype, flags, and the instructions that multiply."""

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from ..flags import Flags, flags_of
from .kernel import named
from .numbers import Number

LANES = 16
"""Widths of states in memory are multiples of so many numbers."""


@dataclass(frozen=True)
class Plan:
    """One problem, configuration and target.

    Attributes:
        DK, DV: widths of keys and values as tensors have them.
        SK, SV: as states are stored, the next multiples of 16.
    """

    flags: Flags
    number: Number
    instruction: str
    DK: int
    DV: int
    SK: int
    SV: int
    config: Any

    def __getitem__(self, name: str) -> Any:
        """A value of the configuration."""
        return self.config[name]


def plan_of(problem: Any, config: Any) -> Plan:
    """The plan of a ``Problem`` and a ``Config``."""
    widths = (problem.Dk, problem.Dv)
    padded = (-(-width // LANES) * LANES for width in widths)
    return Plan(flags_of(problem), Number(problem.dtype), config["instruction"], *widths, *padded, config)


def origin_of(x: Any, bh: Any) -> Any:
    """The first row of a head in ``[B * T * H]``, of which those of a head are H apart."""
    return T.truncdiv(bh, x.H) * x.T * x.H + T.truncmod(bh, x.H)


def share_of(x: Any, piece: Any, whole: Any) -> Any:
    """``whole`` over the segments that a piece's tokens read, where gates are equal and add up to 1."""
    s = named(x.segment[piece], "s")
    return named(whole / T.cast(s - x.seg_first[s] + 1, "float32"), "share")


@dataclass(frozen=True)
class Place:
    """A tile of tokens of one head.

    Attributes:
        bh: the head, of B * H; origin: of :func:`origin_of`.
        piece, first, start, stop: the tile's piece, its first token, the piece's first token, and one past the tile's.
        segment, oldest: the tile's segment, and the first of its sequence.
    """

    bh: Any
    origin: Any
    piece: Any
    first: Any
    start: Any
    stop: Any
    segment: Any
    oldest: Any


def place_of(x: Any, tile: Any, rows: int) -> Place:
    """The tile number ``tile`` of ``x.tiles``, of at most ``rows`` tokens, of head ``x.row``."""
    bh = x.row
    origin = named(origin_of(x, bh), "origin")
    piece, first = named(x.tiles[tile * 2], "piece"), named(x.tiles[tile * 2 + 1], "first")
    segment = named(x.segment[piece], "segment")
    stop = named(T.min(first + rows, x.end[piece]), "stop")
    start, oldest = named(x.begin[piece], "start"), named(x.seg_first[segment], "oldest")
    return Place(bh, origin, piece, first, start, stop, segment, oldest)
