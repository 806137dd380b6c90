"""What the templates of deep memories know when they are compiled: widths, tiles, and what the problem asks for."""

from dataclasses import dataclass
from typing import Any

from ..tiles import LANES


def wide(width):
    """A width in whole vectors: zeros in what is added stay zeros through every product and through gelu."""
    return -(-width // LANES) * LANES


@dataclass(frozen=True)
class Flags:
    """Kernels of one set of flags differ in sizes alone.

    Args:
        decays: writes have a gate g.
        momentum: the surprise of past tokens is carried along, and the loss is ||M(k) - v||^2 (Eq. 34-36); else it is
            -<M(k), v> (Eq. 30-31), whose error rows are -v.
        checkpoint: a segment starts from the state before it instead of from the layers that are learned.
        routed, sparse, averages: as of a matrix memory.
        mixes: the states' parameters are mixed, and the mixture is read once (Eq. 14-15).
    """

    decays: bool
    momentum: bool
    checkpoint: bool
    routed: bool
    sparse: bool
    averages: bool
    mixes: bool

    @property
    def enters(self) -> bool:
        """Whether momentum enters segments: kernels that start there need it."""
        return self.momentum and self.checkpoint


def flags_of(problem: Any) -> Flags:
    """The flags of a ``Problem``."""
    return Flags(
        decays="g" in problem.writes.gates,
        momentum=problem.writes.momentum,
        checkpoint=problem.state_init == "checkpoint",
        routed=problem.reads.routed,
        sparse=problem.reads.sparse,
        averages=problem.reads.averages,
        mixes=problem.reads.mixes_parameters,
    )


def across_rows(rows, cols):
    """Rows of a tile with LANES tokens in its columns, in no more registers than ``rows`` by ``cols``."""
    most = min(LANES, rows * (1 << (cols // LANES).bit_length() - 1))
    # LANES of them are whole tiles, or tiles of one row less too (walk.tiles).
    return next(rows for rows in range(most, 0, -1) if LANES % rows == 0 or -(-LANES // rows) * (rows - 1) <= LANES)


class Plan:
    """Sizes and flags of an operation's kernel, and those parameters by their names that the operation has."""

    def __init__(self, problem, config) -> None:
        self.Dk, self.Dv, self.E = wide(problem.Dk), wide(problem.Dv), wide(problem.E)
        self.flags = flags_of(problem)
        self.both = min(self.Dk, self.Dv)  # equal wherever a memory adds its input
        vars(self).update(config.to_dict())

    @property
    def WR(self):
        """Rows of a tile of the writes."""
        return self.walk_rows

    @property
    def WC(self):
        """Columns of that tile."""
        return self.walk_cols

    @property
    def AR(self):
        """Rows of a tile with LANES tokens in its columns, beside it."""
        return across_rows(self.WR, self.WC)
