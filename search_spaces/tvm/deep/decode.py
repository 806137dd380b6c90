"""Search space of a decode step of deep memories on a CPU: how states are shared out, and how they are read."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target


def _fits_registers(config: Config, problem: Problem, target: Target) -> bool:
    """The sums of a read, a row of a state and a broadcast stay in the vector registers."""
    vectors = -(-config.integer("cols") // target.vector_floats)
    registers = 32 if target.vector_floats == 16 else 16
    return config.integer("rows") * vectors + 2 <= registers


# Whole rows of a layer, read in the order of memory: strips of them are two to three times slower.
_WIDE = Config.of({"split": 1, "cols": 256, "rows": 1, "prefetch": 0})

SPACE = SearchSpace(
    params=(
        Pow2("split", 1, 8, "shares of a head's cached states, each a task of its own"),
        Int("cols", (16, 32, 48, 64, 128, 256), "columns of a register tile"),
        Pow2("rows", 1, 8, "rows of a layer whose sums are kept apart"),
        Choice("prefetch", (0, 512, 1024, 2048, 4096), "bytes ahead of a layer's row that are fetched; 0 for none"),
    ),
    constraints=(Constraint("registers", _fits_registers, "the sums of a read would spill"),),
    default=_WIDE,
    # For AVX2's 16 registers.
    fallbacks=(_WIDE.replace(cols=64), _WIDE.replace(cols=32), _WIDE.replace(cols=16)),
)
