"""A block's tile of tokens, whose rows its warps share out: what reads and gradients of writes have in common."""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from ..copies import Copy, Rows
from ..fragments import Fragments
from ..kernel import Tile, registers, store, when
from ..plan import Place, Plan


class Tokens:
    """What a block knows of its tokens.

    Attributes:
        threads: of the block.
        frag: where a thread's sums are.
        at: the tile.
        above: the warp's first row.
    """

    plan: Plan
    x: Any
    threads: int
    frag: Fragments
    at: Place
    above: Any

    def token(self, slot: int) -> Any:
        """The token of a thread's row."""
        return self.at.first + self.above + self.frag.row(slot)

    def rows(self, array: Any, width: int) -> Rows:
        """The rows of the block's head."""
        return Rows(array, self.plan.number, width, self.at.origin, self.x.H)

    def load(self, tile: Tile, source: Rows, first: Any, stop: Any, column: Any = 0) -> None:
        """Rows into a tile; all threads have part in it, and see them after a barrier."""
        copy = Copy(tile.rows, tile.width, self.threads, self.plan.number)
        held = copy.room("loaded")
        copy.fetch(self.x.thread, source, first, stop, column, held)
        copy.put(self.x.thread, held, tile)

    def slots(self, name: str, value: Callable[[Any, int], Any], stop: Any = None) -> Any:
        """Registers with ``value(token, slot)`` for each of a thread's rows; 0 from ``stop``, or the tile's end, on."""
        held = registers(self.frag.slots, "float32", name)
        for slot in range(self.frag.slots):
            store(held, slot, T.float32(0))
            with when(self.token(slot) < (self.at.stop if stop is None else stop)):
                store(held, slot, value(self.token(slot), slot))
        return held
