"""Search space of the forward pass on a CPU: ``segment_states`` and ``read_forward``, searched together."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Block, Choice, Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target

FORMULATIONS = {
    "even": ("summed", "per_segment"),
    "dense": ("per_segment", "gated"),
    "sparse": ("per_segment", "gated", "gather"),
}
"""How the cached read may be computed, by the weights that it has; the template says what each one is."""


def _width(value: int) -> int:
    """Widths are padded to whole vectors of 16 floats before they reach a kernel."""
    return -(-value // 16) * 16


def _fits_registers(rows: str, cols: str):
    """Accumulators, one row of B and one broadcast of A stay in the vector registers."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        vectors = -(-config.integer(cols) // target.vector_floats)
        registers = 32 if target.vector_floats == 16 else 16
        return config.integer(rows) * vectors + vectors + 1 <= registers

    return holds


_WIDE = Config.of(
    {
        "chunk": 64,
        "rows": 4,
        "cols": 64,
        "unroll": 1,
        "formulation": "per_segment",
        "panel": 1,
        "loop_order": "rows_outer",
        "parallel": "head",
        "score_rows": 8,
        "score_lanes": 32,
        "state_chunk": 32,
        "state_rows": 8,
        "state_cols": 32,
    }
)

_READ = ("rows", "cols", "unroll", "panel", "loop_order", "score_rows", "score_lanes")

SPACE = SearchSpace(
    params=(
        Int("chunk", (16, 32, 48, 64, 96, 128, 256), "BT: tokens of a chunk"),
        Int("rows", (1, 2, 4, 6, 8, 12, 16), "tokens of a register tile"),
        Int("cols", (16, 32, 48, 64), "columns of a register tile"),
        Pow2("unroll", 1, 8, "unrolling of the tile's K loop"),
        Choice("formulation", ("per_segment", "gated", "summed", "gather"), "of the cached read"),
        Pow2("panel", 1, 8, "segments of one long-K product, for gated"),
        Choice("loop_order", ("rows_outer", "cols_outer"), "of the register tiles"),
        Choice("parallel", ("segment", "head"), "what one task is; with head the read computes the states as it goes"),
        Int("score_rows", (2, 4, 8), "keys or segments of a score tile"),
        Int("score_lanes", (16, 32, 48, 64), "tokens of a score tile"),
        Pow2("state_chunk", 32, 256, "tokens packed at once for the segment states"),
        Int("state_rows", (2, 4, 8, 16), "key columns of a state tile"),
        Int("state_cols", (16, 32, 48, 64), "value columns of a state tile"),
    ),
    constraints=(
        Constraint(
            "formulation",
            lambda c, p, t: c["formulation"] in FORMULATIONS[p.reads.weights],
            "the aggregation has no such formulation",
        ),
        Constraint("panel", lambda c, p, t: c["formulation"] == "gated" or c["panel"] == 1, "only gated has panels"),
        Constraint("rows", lambda c, p, t: c.integer("chunk") % c.integer("rows") == 0, "rows must divide chunk"),
        Constraint("cols", lambda c, p, t: _width(p.Dv) % c.integer("cols") == 0, "cols must divide Dv, padded to 16"),
        Constraint("registers", _fits_registers("rows", "cols"), "the register tile would spill"),
        Constraint(
            "score_rows",
            lambda c, p, t: c.integer("chunk") % c.integer("score_rows") == 0,
            "score_rows must divide chunk",
        ),
        Constraint(
            "score_lanes",
            lambda c, p, t: c.integer("chunk") % c.integer("score_lanes") == 0,
            "score_lanes must divide chunk",
        ),
        Constraint("score registers", _fits_registers("score_rows", "score_lanes"), "the score tile would spill"),
        Constraint(
            "state_chunk",
            lambda c, p, t: c["parallel"] == "segment" or c["state_chunk"] == 32,
            "with one task a head the states come from the read's own chunks",
        ),
        Constraint(
            "state_rows",
            lambda c, p, t: _width(p.Dk) % c.integer("state_rows") == 0,
            "state_rows must divide Dk, padded to 16",
        ),
        Constraint(
            "state_cols",
            lambda c, p, t: _width(p.Dv) % c.integer("state_cols") == 0,
            "state_cols must divide Dv, padded to 16",
        ),
        Constraint("state registers", _fits_registers("state_rows", "state_cols"), "the state tile would spill"),
        Constraint(
            "chunk",
            lambda c, p, t: c["chunk"] == 16 or p.segment_length is None or c.integer("chunk") <= p.segment_length,
            "a chunk longer than a segment computes rows that do not exist",
        ),
    ),
    default=_WIDE,
    # For short segments, narrow values, AVX2's 16 registers, and both.
    fallbacks=(
        _WIDE.replace(chunk=32),
        _WIDE.replace(cols=32),
        _WIDE.replace(cols=16, score_rows=4, score_lanes=16, state_rows=4, state_cols=16),
        _WIDE.replace(chunk=16, cols=16, score_rows=4, score_lanes=16, state_rows=4, state_cols=16),
    ),
    blocks=(
        # The read advances the state that it is in by the same tiles: those are shared.
        Block("states", ("segment_states",), ("state_chunk",), {"parallel": ("segment",)}),
        Block("read", ("read_forward",), _READ, {"parallel": ("segment",)}),
        Block("head", ("read_forward",), ("state_chunk", *_READ), {"parallel": ("head",)}),
    ),
)
