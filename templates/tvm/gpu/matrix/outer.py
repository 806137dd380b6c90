"""Sums of outer products over tokens, sum_t w_t a_t^T b_t: what a piece writes to a state, and gradients of states.

A block has some key rows and value columns of one sum, a warp some of the rows.
"""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from ..copies import Copy, Rows
from ..fragments import Fragments, Operand
from ..instructions import fragments
from ..kernel import Tile, barrier, loop, named, when
from ..plan import Plan, origin_of

Weight = Callable[[Any], Any]
"""A float32 for a token."""


class Outer:
    """A block at work.

    Args:
        prefix: of the parameters: warps, rows (of a warp), BT (tokens of a step), BV (value columns).

    Attributes:
        which: the number of the sum (a piece, a segment) that the block has a part of.
        first_key, column: the block's first row and column; first_row: the warp's first row.
    """

    def __init__(self, plan: Plan, x: Any, prefix: str) -> None:
        self.plan, self.x, number = plan, x, plan.number
        self.R, self.BT = plan[f"{prefix}_rows"], plan[f"{prefix}_BT"]
        self.keys, self.BV = plan[f"{prefix}_warps"] * self.R, min(plan[f"{prefix}_BV"], plan.SV)
        self.threads = 32 * plan[f"{prefix}_warps"]
        self.frag: Fragments = fragments(number, plan.instruction, self.R, x.lane)
        self.left: Tile = x.shared.take(self.BT, self.keys, number.stored)
        self.right: Tile = x.shared.take(self.BT, self.BV, number.stored)
        x.shared.open()
        across, down = -(-plan.SV // self.BV), -(-plan.SK // self.keys)
        self.column = named(T.truncmod(x.block, across) * self.BV, "column")
        self.first_key = named(T.truncmod(T.truncdiv(x.block, across), down) * self.keys, "first_key")
        self.which = named(T.truncdiv(x.block, across * down), "which")
        self.above = named(x.warp * self.R, "above")
        self.first_row = named(self.first_key + self.above, "first_row")
        self.origin = named(origin_of(x, x.row), "origin")
        self.acc = self.frag.accumulators(self.BV)
        self.frag.clear(self.acc, self.BV)

    def rows(self, array: Any, width: int) -> Rows:
        """Rows of the block's head."""
        return Rows(array, self.plan.number, width, self.origin, self.x.H)

    def run(
        self, a: Rows, b: Rows, begin: Any, end: Any, weight: Weight | None, trips: str,
        step: Callable[[Any], None] | None = None,
    ) -> None:  # fmt: skip
        """The sum over tokens from ``begin`` to ``end``; ``step(token)``: what else is done with each step's rows."""
        x, number = self.x, self.plan.number
        copy_a, copy_b = Copy(self.BT, self.keys, self.threads, number), Copy(self.BT, self.BV, self.threads, number)
        with loop(begin, end, self.BT, trips=trips) as t0:
            held_a, held_b = copy_a.room("held_a"), copy_b.room("held_b")
            copy_a.fetch(x.thread, a, t0, end, self.first_key, held_a)
            copy_b.fetch(x.thread, b, t0, end, self.column, held_b)
            if weight is not None:
                copy_b.scale(x.thread, held_b, lambda r: weight(t0 + r))
            barrier()
            copy_a.put(x.thread, held_a, self.left)
            copy_b.put(x.thread, held_b, self.right)
            barrier()
            left = Operand(self.left, col=self.above, transposed=True)
            self.frag.product(self.acc, self.BV, left, Operand(self.right), self.BT)
            if step is not None:
                step(t0)

    def each(self, write: Callable[[Any, Any, Any], None]) -> None:
        """``write(row, column, sum)`` for each element of the state that the thread has."""
        uneven = self.plan.SV % self.BV != 0
        for place, slot, col in self.frag.elements(self.BV):
            row, value = self.first_row + self.frag.row(slot), self.column + col
            inside = T.And(row < self.plan.SK, value < self.plan.SV) if uneven else row < self.plan.SK
            with when(inside):
                write(row, value, self.acc[place])
