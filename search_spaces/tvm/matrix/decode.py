"""Search space of a decode step on a CPU: how the columns of the states are shared out, and how states are read."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target


def _fits_registers(accumulators: int, others: int, *counts: str):
    """As many sums as the parameters' product times ``accumulators``, and ``others`` more, stay in vector registers."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        vectors = -(-config.integer("cols") // target.vector_floats)
        registers = 32 if target.vector_floats == 16 else 16
        sums = accumulators
        for count in counts:
            sums *= config.integer(count)
        return sums * vectors + others <= registers

    return holds


_WIDE = Config.of({"split": 1, "cols": 64, "rows": 2, "streams": 2, "prefetch": 0})

SPACE = SearchSpace(
    params=(
        Int("split", (1, 2, 3, 4, 8), "groups of value columns of a head, each a task of its own"),
        Int("cols", (16, 32, 48, 64, 128), "value columns of a register tile"),
        Pow2("rows", 1, 8, "rows of a state whose sums are kept apart"),
        Pow2("streams", 1, 4, "cached states that one token reads side by side"),
        Choice("prefetch", (0, 512, 1024, 2048, 4096), "bytes ahead of a state's row that are fetched; 0 for none"),
    ),
    constraints=(
        Constraint(
            "split",
            lambda c, p, t: c["split"] == 1 or p.Dv % (16 * c.integer("split")) == 0,
            "a group of columns is a multiple of 16",
        ),
        Constraint(
            "cols",
            lambda c, p, t: c["cols"] == 16 or c.integer("cols") <= p.Dv // c.integer("split"),
            "a tile wider than a group of columns is never used",
        ),
        Constraint("rows", lambda c, p, t: c.integer("rows") <= p.Dk, "more rows than a state has"),
        Constraint("read registers", _fits_registers(1, 2, "rows", "streams"), "the sums of a read would spill"),
        Constraint("write registers", _fits_registers(2, 3, "rows"), "the sums of a write would spill"),
    ),
    # Whole rows of wide states: two passes over half rows read memory a third more slowly.
    default=_WIDE.replace(cols=128, rows=1),
    # For narrow values, AVX2's 16 registers, both, and the smallest.
    fallbacks=(
        _WIDE,
        _WIDE.replace(cols=32),
        _WIDE.replace(cols=32, rows=1),
        _WIDE.replace(cols=16),
        _WIDE.replace(cols=16, streams=1),
        _WIDE.replace(cols=16, rows=1, streams=1),
    ),
)
