"""Rows of the device's memory into shared memory: through registers, so that many loads are under way at once."""

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from .kernel import Tile, choose, copy_later, named, registers, store, vector, when, words_of
from .numbers import Number


class Rows:
    """Rows of a matrix in the device's memory, which are ``stride`` rows of ``width`` numbers apart.

    Args:
        array: its numbers.
        number: their dtype.
        width: numbers of a row.
        origin: the row that counts as the first.
        stride: rows from one to the next.
    """

    def __init__(self, array: Any, number: Number, width: int, origin: Any, stride: Any) -> None:
        self.array, self.number, self.width, self.origin, self.stride = array, number, width, origin, stride
        self.words = words_of(array)

    @property
    def aligned(self) -> bool:
        """Whether every row begins at a multiple of 16 bytes."""
        return self.width % self.number.lanes == 0

    def at(self, row: Any, col: Any) -> Any:
        """The place of a number."""
        return (self.origin + row * self.stride) * self.width + col

    def load(self, row: Any, col: Any) -> Any:
        """A number as float32."""
        return self.number.load(self.array[self.at(row, col)])


@dataclass(frozen=True)
class Copy:
    """``rows`` rows of ``cols`` numbers, by the ``threads`` threads of a block, 16 bytes at a time."""

    rows: int
    cols: int
    threads: int
    number: Number

    @property
    def across(self) -> int:
        """Accesses of a row."""
        return self.cols // self.number.lanes

    @property
    def each(self) -> int:
        """Accesses of a thread, at most."""
        return -(-self.rows * self.across // self.threads)

    def room(self, name: str) -> Any:
        """Registers that hold a thread's part."""
        return registers(4 * self.each, "uint32", name)

    def _places(self, thread: Any) -> list[tuple[Any, Any, Any]]:
        """(row, access of the row, whether there is such a row) of each of a thread's accesses."""
        found = []
        for n in range(self.each):
            index = thread + n * self.threads
            inside = (n + 1) * self.threads <= self.rows * self.across
            there = None if inside else index < self.rows * self.across
            found.append((T.truncdiv(index, self.across), T.truncmod(index, self.across), there))
        return found

    def fetch(self, thread: Any, source: Rows, first: Any, stop: Any, column: Any, held: Any) -> None:
        """Into registers: rows from ``first``, columns from ``column``; 0 from ``stop`` on, and beyond the width."""
        lanes, wide = self.number.lanes, source.width % self.number.lanes == 0
        for n, (row, access, there) in enumerate(self._places(thread)):
            condition = first + row < stop
            if there is not None:
                condition = T.And(condition, there)
            if wide:
                step = source.width // lanes
                # In units of 16 bytes, so that the access is seen to be aligned.
                place = named(
                    (source.origin + (first + row) * source.stride) * step + T.truncdiv(column, lanes) + access, "place"
                )
                if not self._within(source, column):
                    condition = T.And(condition, column + access * lanes < source.width)
                self._load(condition, source.words, place, held, n)
            else:
                self._load_apart(condition, source, first + row, column + access * lanes, held, n)

    def _within(self, source: Rows, column: Any) -> bool:
        """Whether no access is beyond the width, whatever the column."""
        return isinstance(column, int) and column + self.cols <= source.width

    def _load(self, condition: Any, words: Any, place: Any, held: Any, n: int) -> None:
        def there() -> None:
            with vector(4) as e:
                store(held, n * 4 + e, words[place * 4 + e])

        def absent() -> None:
            with vector(4) as e:
                store(held, n * 4 + e, T.uint32(0))

        choose(condition, there, absent)

    def _load_apart(self, condition: Any, source: Rows, row: Any, col: Any, held: Any, n: int) -> None:
        """Number by number, where rows begin anywhere."""
        size = self.number.size
        for e in range(4):
            store(held, n * 4 + e, T.uint32(0))
        for e in range(self.number.lanes):
            with when(T.And(condition, col + e < source.width)):
                bits = source.array[source.at(row, col + e)]
                if size == 4:
                    store(held, n * 4 + e, T.reinterpret("uint32", bits))
                else:
                    word = n * 4 + e // 2
                    store(held, word, held[word] | (T.cast(bits, "uint32") << T.uint32(16 * (e % 2))))

    def put(self, thread: Any, held: Any, tile: Tile, above: Any = 0) -> None:
        """From registers into a tile, from its row ``above`` on."""
        for n, (row, access, there) in enumerate(self._places(thread)):
            quad = (above + row) * (tile.cols * tile.size // 16) + access

            def write(n: int = n, quad: Any = quad) -> None:
                with vector(4) as e:
                    store(tile.words, quad * 4 + e, held[n * 4 + e])

            if there is None:
                write()
            else:
                with when(there):
                    write()

    def start(self, thread: Any, source: Rows, first: Any, stop: Any, column: Any, tile: Tile, above: Any = 0) -> None:
        """``fetch`` and ``put`` without registers, of aligned rows: they are there after ``landed`` and a barrier."""
        assert source.aligned
        lanes = self.number.lanes
        for row, access, there in self._places(thread):
            col = named(column + access * lanes, "col")
            inside = T.And(first + row < stop, col < source.width)
            place = T.Select(inside, source.at(first + row, col), 0)

            def copy(row: Any = row, access: Any = access, place: Any = place, inside: Any = inside) -> None:
                to = (above + row) * tile.cols + access * lanes
                copy_later(tile.numbers.ptr_to((to,)), source.array.ptr_to((place,)), inside)

            if there is None:
                copy()
            else:
                with when(there):
                    copy()

    def scale(self, thread: Any, held: Any, weight: Any) -> None:
        """Rows in registers, each times ``weight(row)``, a float32."""
        for n, (row, _, there) in enumerate(self._places(thread)):

            def multiply(n: int = n, row: Any = row) -> None:
                factor = named(weight(row), "factor")
                for word in range(n * 4, n * 4 + 4):
                    if self.number.wide:
                        product = T.reinterpret("float32", held[word]) * factor
                        store(held, word, T.reinterpret("uint32", product))
                    else:
                        low, high = self.number.halves(held[word])
                        store(held, word, self.number.pair(low * factor, high * factor))

            if there is None:
                multiply()
            else:
                with when(there):
                    multiply()
