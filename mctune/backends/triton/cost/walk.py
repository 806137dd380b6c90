"""What a launch of a Triton template walks through: pieces, tiles and segments of a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from mctune.core.config import Config
from mctune.core.problem import Problem

Value = int | float | bool | str


@dataclass(frozen=True)
class Source:
    """A loop of the source, or (with ``trips`` 1) a whole kernel.

    Attributes:
        trips: passes, each time that it is entered.
        matrix: operations of products in a pass, without those of ``inner``.
        inner: the loops inside.
        conditional: operations of products that stand there too, and are not done.
    """

    trips: float
    matrix: float = 0.0
    inner: tuple[Source, ...] = ()
    conditional: float = 0.0

    @property
    def total(self) -> float:
        """Operations of all passes."""
        return self.trips * (self.matrix + sum(loop.total for loop in self.inner))


@dataclass(frozen=True)
class Piece:
    """A piece of a sequence.

    Attributes:
        past: cached segments before its own.
        before, later: pieces of its segment.
        length: tokens.
        entered: whether a state enters it.
    """

    past: int
    before: int
    length: int
    entered: bool
    later: int


@dataclass(frozen=True)
class Walk:
    """What a launch of ``problem`` walks through.

    ``heaviest``: of the program with most work, not of the mean one; ``in_flight``: on a GPU whose products are.
    """

    problem: Problem
    config: Config
    values: Mapping[str, Value]
    heaviest: bool = False
    in_flight: bool = False

    def __getitem__(self, name: str) -> int:
        """A number among the launch's arguments."""
        return int(self.values[name])

    def has(self, name: str, kind: str) -> bool:
        """Whether the configuration says so."""
        return name in self.config and self.config[name] == kind

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces of one sequence."""
        piece = self.config.integer("piece") if "piece" in self.config else self.problem.T
        return _pieces(self.problem, piece)

    @property
    def segments(self) -> int:
        """The number of segments of one sequence."""
        return len(self.problem.spans())

    @property
    def whole(self) -> bool:
        """Whether every segment is one piece."""
        return len(self.pieces) == self.segments

    @property
    def padded(self) -> tuple[int, int]:
        """Key and value width as blocks hold them."""
        return _power(self.problem.Dk), _power(self.problem.Dv)

    def of_pieces(self, count: Callable[[Piece], float]) -> float:
        """``count`` of a piece."""
        return self._one([count(piece) for piece in self.pieces])

    def of_tiles(self, rows: int, count: Callable[[Piece, int], float]) -> float:
        """``count(piece, first token in it)`` of a tile of ``rows`` tokens."""
        tiles = [(piece, start) for piece in self.pieces for start in range(0, piece.length, rows)]
        return self._one([count(*tile) for tile in tiles])

    def _one(self, counts: list[float]) -> float:
        return max(counts) if self.heaviest else sum(counts) / len(counts)


def _power(value: int) -> int:
    return max(16, 1 << (value - 1).bit_length())


@lru_cache(maxsize=64)
def _pieces(problem: Problem, piece: int) -> tuple[Piece, ...]:
    found = []
    for past, (begin, end) in enumerate(problem.spans()):
        count = -(-(end - begin) // piece)
        for before in range(count):
            length = min(piece, end - begin - before * piece)
            entered = before > 0 or (past > 0 and problem.state_init == "checkpoint")
            found.append(Piece(past, before, length, entered, count - 1 - before))
    return tuple(found)
