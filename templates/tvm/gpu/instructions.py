"""The strategies of :mod:`fragments`, one for each kind of instruction.

    Lanes       any GPU, float32: every thread multiplies a few rows by a few columns
    Quads       sm_70: mma.m8n8k4, four of 8 x 8 at once, each by two groups of four threads
    Matrices    sm_75: mma.m16n8k8; sm_80 and later: mma.m16n8k16; operands by ldmatrix

Layouts are those of the PTX ISA, "Warp-level matrix instructions".
"""

import math
from collections.abc import Iterator
from typing import Any

from tvm.script import tirx as T

from .fragments import Fragments, Held, Operand, Weight, steps
from .kernel import loop, named, registers, store, vector
from .numbers import Number


class Lanes(Fragments):
    """float32, without matrix units: four groups of eight threads, a group to every fourth row."""

    deep = 4
    beside = (1, 2, 4)

    @property
    def slots(self) -> int:  # type: ignore[override]
        return self.rows // 4

    def row(self, slot: int) -> Any:
        return T.truncdiv(self.lane, 8) + 4 * slot

    def _run(self, cols: int) -> int:
        """Columns of a thread that are next to each other."""
        return math.gcd(4, cols // 8)

    def _col(self, n: int, cols: int) -> Any:
        run = self._run(cols)
        return (n // run) * (8 * run) + T.truncmod(self.lane, 8) * run + n % run

    def elements(self, cols: int) -> Iterator[tuple[int, int, Any]]:
        wide = cols // 8
        for slot in range(self.slots):
            for n in range(wide):
                yield slot * wide + n, slot, self._col(n, cols)

    def product(
        self, acc: Any, cols: int, a: "Operand | Held", b: Operand, depth: int, part: range | None = None
    ) -> None:
        assert isinstance(a, Operand), "operands of float32 stay in shared memory"
        part = part or range(cols)
        first, wide = part.start // 8, len(part) // 8
        left, right = registers(4 * self.slots, name="left"), registers(4 * wide, name="right")
        with loop(0, depth // 4) as step:
            k = named(step * 4, "k")
            for slot in range(self.slots):
                self._load_left(left, a, slot, k)
            self._load_right(right, b, cols, part, k)
            for e in range(4):
                for slot in range(self.slots):
                    for n in range(wide):
                        place = slot * (cols // 8) + first + n
                        store(acc, place, acc[place] + left[slot * 4 + e] * right[e * wide + n])

    def _load_left(self, left: Any, a: Operand, slot: int, k: Any) -> None:
        """left[slot, e] = A[row, k + e]."""
        row = self.row(slot)
        if a.transposed:
            for e in range(4):
                store(left, slot * 4 + e, a.tile.numbers[(a.row + k + e) * a.tile.cols + a.col + row])
            return
        at = (a.row + row) * (a.tile.cols // 4) + T.truncdiv(a.col + k, 4)
        with vector(4) as e:
            store(left, slot * 4 + e, a.tile.numbers[at * 4 + e])

    def _load_right(self, right: Any, b: Operand, cols: int, part: range, k: Any) -> None:
        """right[e, n] = B[k + e, column n of the part]."""
        wide, run = len(part) // 8, self._run(cols)
        if b.transposed:
            for n in range(wide):
                for e in range(4):
                    at = (b.row + self._col(n, cols)) * b.tile.cols + b.col + k + e
                    store(right, e * wide + n, b.tile.numbers[at])
            return
        for e in range(4):
            for n in range(0, wide, run):
                at = (b.row + k + e) * (b.tile.cols // run) + T.truncdiv(b.col + self._col(n, cols), run)
                with vector(run) as x:
                    store(right, e * wide + n + x, b.tile.numbers[at * run + x])


class Quads(Fragments):
    """mma.m8n8k4 of sm_70: of 16 x 16, each pair of quads of threads multiplies a quarter.

    Thread ``lane`` is ``lane % 4 + 4 * (lane / 16)`` of pair ``lane / 4 % 4``.
    """

    beside = (2, 8)
    _MMA = "mma.sync.aligned.m8n8k4.{}.{}.f32.f16.f16.f32"

    @property
    def slots(self) -> int:  # type: ignore[override]
        return 2 * self.high

    def _first(self) -> Any:
        """First row of the pair's quarter."""
        return 8 * T.truncmod(T.truncdiv(self.lane, 4), 2)

    def _across(self) -> Any:
        """First column of the pair's quarter."""
        return 8 * T.truncmod(T.truncdiv(self.lane, 8), 2)

    def _half(self) -> Any:
        return 4 * T.truncdiv(self.lane, 16)

    def row(self, slot: int) -> Any:
        return slot // 2 * 16 + self._first() + self._half() + T.truncmod(self.lane, 2) + 2 * (slot % 2)

    def elements(self, cols: int) -> Iterator[tuple[int, int, Any]]:
        for m in range(self.high):
            for c in range(cols // 16):
                for i in range(8):
                    col = c * 16 + self._across() + (i & 4) + 2 * T.truncmod(T.truncdiv(self.lane, 2), 2) + (i & 1)
                    yield (m * (cols // 16) + c) * 8 + i, 2 * m + (i >> 1 & 1), col

    def _pair(self, words: Any, at: int, operand: Operand, row: Any, col: Any) -> None:
        """Four numbers of a tile's row into two registers."""
        tile = operand.tile
        place = (operand.row + row) * (tile.cols // 4) + T.truncdiv(operand.col + col, 4)
        with vector(2) as e:
            store(words, at + e, tile.words[place * 2 + e])

    def _load(self, words: Any, at: int, operand: Operand, across: bool, lead: Any, k: Any) -> None:
        """A thread's part of four k. ``across``: a row of the tile has one k, and else all of a row of A."""
        index = T.truncmod(self.lane, 4)
        if across:
            self._pair(words, at, operand, k + index, lead + self._half())
        else:
            self._pair(words, at, operand, lead + self._half() + index, k)

    def hold(self, a: Operand, depth: int) -> Held:
        """A in registers."""
        words = registers(self.high * depth // 2, "uint32", "held_a")
        for m in range(self.high):
            for k in range(0, depth, 4):
                self._load(words, (m * depth + k) // 2, a, a.transposed, m * 16 + self._first(), k)
        return Held(words, 2)

    def product(
        self, acc: Any, cols: int, a: "Operand | Held", b: Operand, depth: int, part: range | None = None
    ) -> None:
        part = part or range(cols)
        across_a = isinstance(a, Operand) and a.transposed
        name = self._MMA.format("col" if across_a else "row", "col" if b.transposed else "row")
        left = registers(2 * self.high, "uint32", "left") if isinstance(a, Operand) else a.words
        right = registers(2, "uint32", "right")
        with steps(a, depth) as (begin, some):
            for k in some:
                if isinstance(a, Operand):
                    for m in range(self.high):
                        self._load(left, 2 * m, a, a.transposed, m * 16 + self._first(), begin + k)
                for c in range(part.start // 16, part.stop // 16):
                    self._load(right, 0, b, not b.transposed, c * 16 - part.start + self._across(), begin + k)
                    for m in range(self.high):
                        at = 2 * m if isinstance(a, Operand) else (m * depth + k) // 2
                        base = (m * (cols // 16) + c) * 8
                        own = [acc[base + i] for i in range(8)]
                        T.evaluate(T.ptx[name](*own, left[at], left[at + 1], right[0], right[1], *own))


class Matrices(Fragments):
    """mma.m16n8k8 of sm_75, mma.m16n8k16 of sm_80 and later, with operands by ldmatrix."""

    beside = (1, 2)

    def __init__(self, number: Number, rows: int, lane: Any, step: int) -> None:
        super().__init__(number, rows, lane)
        kind = {"float16": "f16", "bfloat16": "bf16"}[number.dtype]
        self.step = step
        self._mma = f"mma.sync.aligned.m16n8k{step}.row.col.f32.{kind}.{kind}.f32"

    @property
    def slots(self) -> int:  # type: ignore[override]
        return 2 * self.high

    def row(self, slot: int) -> Any:
        return slot * 8 + T.truncdiv(self.lane, 4)

    def elements(self, cols: int) -> Iterator[tuple[int, int, Any]]:
        for m in range(self.high):
            for c in range(cols // 8):
                for i in range(4):
                    yield (m * (cols // 8) + c) * 4 + i, 2 * m + i // 2, c * 8 + 2 * T.truncmod(self.lane, 4) + i % 2

    def _load(self, words: Any, at: int, operand: Operand, row: Any, col: Any, trans: bool) -> None:
        """Four matrices of 8 x 8, of whose rows each thread names one."""
        tile = operand.tile
        place = (operand.row + row) * tile.cols + operand.col + col
        name = f"ldmatrix.sync.aligned.m8n8.x4.{'trans.' if trans else ''}shared.b16"
        T.evaluate(T.ptx[name](*(words[at + e] for e in range(4)), tile.numbers.ptr_to((place,))))

    def _load_left(self, words: Any, at: int, a: Operand, m: int, k: Any) -> None:
        """16 x 16 of A: k 0 to 7 of rows 0 to 7 and 8 to 15, then k 8 to 15 of the same."""
        low, eight, high = T.truncmod(self.lane, 8), T.truncmod(T.truncdiv(self.lane, 8), 2), T.truncdiv(self.lane, 16)
        if a.transposed:
            self._load(words, at, a, k + high * 8 + low, m * 16 + eight * 8, True)
        else:
            self._load(words, at, a, m * 16 + eight * 8 + low, k + high * 8, False)

    def _load_right(self, words: Any, b: Operand, n: int, k: Any) -> None:
        """16 x 16 of B: of columns 0 to 7 k 0 to 7 and 8 to 15, then of columns 8 to 15."""
        low, eight, high = T.truncmod(self.lane, 8), T.truncmod(T.truncdiv(self.lane, 8), 2), T.truncdiv(self.lane, 16)
        if b.transposed:
            self._load(words, 0, b, n + high * 8 + low, k + eight * 8, False)
        else:
            self._load(words, 0, b, k + eight * 8 + low, n + high * 8, True)

    def hold(self, a: Operand, depth: int) -> Held:
        """A in registers."""
        words = registers(self.high * depth // 4, "uint32", "held_a")
        for m in range(self.high):
            for k in range(0, depth, 16):
                self._load_left(words, (m * depth + k) // 4, a, m, k)
        return Held(words, 4)

    def hold_sums(self, acc: Any, cols: int) -> Held:
        """``acc`` as an operand A: a thread holds what it then needs."""
        words = registers(self.high * cols // 4, "uint32", "held_sums")
        for m in range(self.high):
            for c in range(cols // 8):
                base, at = (m * (cols // 8) + c) * 4, (m * (cols // 8) + c) * 2
                store(words, at, self.number.pair(acc[base], acc[base + 1]))
                store(words, at + 1, self.number.pair(acc[base + 2], acc[base + 3]))
        return Held(words, 4)

    def scale_held(self, held: Held, depth: int, weight: Weight) -> Held:
        """The operand with every row times its weight, rounded again."""
        words = registers(self.high * depth // 4, "uint32", "held_gated")
        for m in range(self.high):
            for at in range(m * depth // 4, (m + 1) * depth // 4):
                low, high = self.number.halves(held.words[at])
                factor = weight(2 * m + at % 2)
                store(words, at, self.number.pair(low * factor, high * factor))
        return Held(words, 4)

    def product(
        self, acc: Any, cols: int, a: "Operand | Held", b: Operand, depth: int, part: range | None = None
    ) -> None:
        part = part or range(cols)
        left = registers(4 * self.high, "uint32", "left") if isinstance(a, Operand) else a.words
        right = registers(4, "uint32", "right")
        with steps(a, depth) as (begin, some):
            for k in some[::4]:
                if isinstance(a, Operand):
                    for m in range(self.high):
                        self._load_left(left, 4 * m, a, m, begin + k)
                for n in range(part.start, part.stop, 16):
                    self._load_right(right, b, n - part.start, begin + k)
                    for m in range(self.high):
                        at = 4 * m if isinstance(a, Operand) else (m * depth + k) // 4
                        for side in range(2):
                            base = (m * (cols // 8) + n // 8 + side) * 4
                            self._multiply(acc, base, left, at, right, 2 * side)

    def _multiply(self, acc: Any, base: int, left: Any, at: int, right: Any, side: int) -> None:
        """An 8-column tile of 16 k."""
        own = [acc[base + i] for i in range(4)]
        a, b = [left[at + i] for i in range(4)], [right[side], right[side + 1]]
        if self.step == 16:
            T.evaluate(T.ptx[self._mma](*own, *a, *b, *own))
        else:
            for half in range(2):
                T.evaluate(T.ptx[self._mma](*own, a[2 * half], a[2 * half + 1], b[half], *own))


def fragments(number: Number, instruction: str, rows: int, lane: Any) -> Any:
    """The strategy of an instruction kind: ``simt``, ``m8n8k4``, ``m16n8k8`` or ``m16n8k16``."""
    if instruction == "simt":
        return Lanes(number, rows, lane)
    if instruction == "m8n8k4":
        return Quads(number, rows, lane)
    return Matrices(number, rows, lane, int(instruction.rpartition("k")[2]))
