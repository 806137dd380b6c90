"""Products of small matrices by the threads of a warp, one strategy for each kind of instruction (:mod:`instructions`).

    acc[R, C] += A[R, K] B[K, C]

A and B lie in shared memory, as they are or transposed; A may also be in registers, where it is used many times.
``acc`` is spread over the warp's registers: what a thread holds, :meth:`elements` says.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from .kernel import Tile, lane_xor, loop, named, registers, store, warp_barrier
from .numbers import Number


@dataclass(frozen=True)
class Operand:
    """A matrix in shared memory, from a row and a column of a tile on; ``transposed``: the tile holds its columns."""

    tile: Tile
    row: Any = 0
    col: Any = 0
    transposed: bool = False


@dataclass(frozen=True)
class Held:
    """An operand A in registers: ``words`` of a thread, ``each`` for every step of K and every 16 rows."""

    words: Any
    each: int


Weight = Callable[[int], Any]
"""A float32 for a slot: one of the rows that a thread holds parts of."""


@contextmanager
def steps(a: "Operand | Held", depth: int) -> Iterator[tuple[Any, range]]:
    """The k of a product: a first one, and those after it that are unrolled, in steps of 4.

    Where A is in registers all of them are; else the device has a loop with 16 in each pass.
    """
    if isinstance(a, Held):
        yield 0, range(0, depth, 4)
    else:
        with loop(0, depth // 16) as step:
            yield named(step * 16, "k"), range(0, 16, 4)


class Fragments:
    """What the strategies share.

    Args:
        number: dtype of A and B.
        rows: R, rows of a warp, a multiple of 16.
        lane: of the thread.
    """

    deep = 16
    """K is a multiple of it, and C of it."""

    def __init__(self, number: Number, rows: int, lane: Any) -> None:
        assert rows % 16 == 0, rows
        self.number, self.rows, self.lane = number, rows, lane
        self.high = rows // 16

    # What a strategy says of its layout.

    slots: int
    """Rows of which a thread holds elements."""
    beside: tuple[int, ...]
    """Bits of the lane's number in which the threads differ that hold parts of the same rows."""

    def row(self, slot: int) -> Any:
        """The row, of R, of a slot."""
        raise NotImplementedError

    def elements(self, cols: int) -> Iterator[tuple[int, int, Any]]:
        """(place in acc, slot, column) of what a thread holds; of 16 bits two places in a row are two columns."""
        raise NotImplementedError

    def product(
        self, acc: Any, cols: int, a: "Operand | Held", b: Operand, depth: int, part: range | None = None
    ) -> None:
        """acc += A B; B has all columns of ``acc``, or a part: from a multiple of 32 to another, or to the last."""
        raise NotImplementedError

    # What follows from it.

    def accumulators(self, cols: int, name: str = "acc") -> Any:
        """Registers for ``[R, cols]``."""
        return registers(self.rows * cols // 32, "float32", name)

    def clear(self, acc: Any, cols: int) -> None:
        for place in range(self.rows * cols // 32):
            store(acc, place, T.float32(0))

    def scale(self, acc: Any, cols: int, weight: Weight) -> None:
        """Every row times its weight."""
        for place, slot, _ in self.elements(cols):
            store(acc, place, acc[place] * weight(slot))

    def add(self, acc: Any, cols: int, other: Any, weight: Weight) -> None:
        """acc += weight * other, row by row."""
        for place, slot, _ in self.elements(cols):
            store(acc, place, acc[place] + weight(slot) * other[place])

    def row_sums(self, name: str, terms: Callable[[int, int, Any], Any], cols: int) -> Any:
        """Registers with the sum of each of a thread's rows, of ``terms(place, slot, column)``; all who have parts of a
        row get its sum."""
        sums = registers(self.slots, "float32", name)
        for slot in range(self.slots):
            store(sums, slot, T.float32(0))
        for place, slot, col in self.elements(cols):
            store(sums, slot, sums[slot] + terms(place, slot, col))
        for slot in range(self.slots):
            self.share_row(sums, slot)
        return sums

    def share_row(self, sums: Any, slot: int) -> None:
        """All who have parts of a row get the sum of what they have at ``slot``."""
        for distance in self.beside:
            store(sums, slot, sums[slot] + lane_xor(sums[slot], distance))

    @property
    def leads(self) -> Any:
        """Whether a thread is the one of those with parts of the same rows that writes for them."""
        return T.bitwise_and(self.lane, sum(self.beside)) == 0

    def each(self, acc: Any, cols: int, change: Callable[[Any, int, Any], Any]) -> None:
        """Every element becomes ``change(element, slot, column)``."""
        for place, slot, col in self.elements(cols):
            store(acc, place, change(acc[place], slot, col))

    def put(self, acc: Any, cols: int, tile: Tile, above: Any) -> None:
        """Into rows of a tile from ``above`` on, rounded to the operands' dtype; the warp's threads then see them."""
        if self.number.wide:
            for place, slot, col in self.elements(cols):
                store(tile.numbers, (above + self.row(slot)) * tile.cols + col, acc[place])
        else:
            found = list(self.elements(cols))
            for place, slot, col in found[::2]:
                at = (above + self.row(slot)) * (tile.cols // 2) + T.truncdiv(col, 2)
                store(tile.words, at, self.number.pair(acc[place], acc[place + 1]))
        warp_barrier()
