"""Search space of the backward pass on a CPU: states, then gradients of the read, of the states and of the writes."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target

FORMULATIONS = {
    "even": ("summed",),
    "dense": ("per_segment",),
    "sparse": ("per_segment", "gather"),
}
"""How the cached states may be used, by the weights of the read; the templates say what each one is."""


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


def _divides(part: str, whole: str):
    def holds(config: Config, problem: Problem, target: Target) -> bool:
        size = config.integer(whole) if whole == "chunk" else _width(getattr(problem, whole))
        return size % config.integer(part) == 0

    return holds


_WIDE = Config.of(
    {
        "chunk": 32,
        "rows": 4,
        "cols": 64,
        "key_cols": 64,
        "unroll": 1,
        "formulation": "per_segment",
        "panel": 2,
        "read_rows": 8,
        "read_lanes": 32,
        "score_rows": 8,
        "score_lanes": 16,
        "state_chunk": 64,
        "state_rows": 8,
        "state_cols": 32,
        "saved": "states",
    }
)
_HALF = _WIDE.replace(rows=8, cols=32, key_cols=32)
_NARROW = _WIDE.replace(
    cols=16, key_cols=16, read_rows=4, read_lanes=16, score_rows=4, score_lanes=16, state_rows=4, state_cols=16
)
_DEFAULTS = tuple(
    config.replace(**cached)
    for config in (_WIDE, _WIDE.replace(chunk=16, read_lanes=16), _HALF, _NARROW, _NARROW.replace(chunk=16))
    for cached in ({"formulation": "gather", "panel": 1}, {}, {"formulation": "summed", "panel": 1})
)

SPACE = SearchSpace(
    params=(
        Int("chunk", (16, 32, 48, 64, 96, 128), "BT: tokens of a chunk"),
        Int("rows", (1, 2, 4, 8, 16), "tokens of a register tile"),
        Int("cols", (16, 32, 48, 64), "value columns of a register tile"),
        Int("key_cols", (16, 32, 48, 64), "key columns of a register tile"),
        Pow2("unroll", 1, 4, "unrolling of the K loops over a width"),
        Choice("formulation", ("per_segment", "summed", "gather"), "of the cached states' reads and gradients"),
        Pow2("panel", 1, 8, "states whose gradients one task adds up, for per_segment"),
        Int("read_rows", (2, 4, 8, 16), "key columns of a tile of a state times dy"),
        Int("read_lanes", (16, 32, 64), "tokens of a tile of a state times dy"),
        Int("score_rows", (2, 4, 8), "keys or segments of a score tile"),
        Int("score_lanes", (16, 32, 64), "tokens of a score tile"),
        Pow2("state_chunk", 32, 256, "tokens packed at once for states and their gradients"),
        Int("state_rows", (2, 4, 8, 16), "key columns of a state tile"),
        Int("state_cols", (16, 32, 48, 64), "value columns of a state tile"),
        Choice("saved", ("states", "nothing"), "what the forward keeps; with nothing the states are computed again"),
    ),
    constraints=(
        Constraint(
            "formulation",
            lambda c, p, t: c["formulation"] in FORMULATIONS[p.reads.weights],
            "the aggregation has no such formulation",
        ),
        Constraint(
            "panel", lambda c, p, t: c["formulation"] == "per_segment" or c["panel"] == 1, "only per_segment has panels"
        ),
        Constraint("rows", _divides("rows", "chunk"), "rows must divide chunk"),
        Constraint("cols", _divides("cols", "Dv"), "cols must divide Dv, padded to 16"),
        Constraint("key_cols", _divides("key_cols", "Dk"), "key_cols must divide Dk, padded to 16"),
        Constraint("registers", _fits_registers("rows", "cols"), "the register tile would spill"),
        Constraint("key registers", _fits_registers("rows", "key_cols"), "the key tile would spill"),
        Constraint("read_rows", _divides("read_rows", "Dk"), "read_rows must divide Dk, padded to 16"),
        Constraint("read_lanes", _divides("read_lanes", "chunk"), "read_lanes must divide chunk"),
        Constraint("read registers", _fits_registers("read_rows", "read_lanes"), "the read tile would spill"),
        Constraint("score_rows", _divides("score_rows", "chunk"), "score_rows must divide chunk"),
        Constraint("score_lanes", _divides("score_lanes", "chunk"), "score_lanes must divide chunk"),
        Constraint("score registers", _fits_registers("score_rows", "score_lanes"), "the score tile would spill"),
        Constraint("state_rows", _divides("state_rows", "Dk"), "state_rows must divide Dk, padded to 16"),
        Constraint("state_cols", _divides("state_cols", "Dv"), "state_cols must divide Dv, padded to 16"),
        Constraint("state registers", _fits_registers("state_rows", "state_cols"), "the state tile would spill"),
        Constraint(
            "chunk",
            lambda c, p, t: c["chunk"] == 16 or p.segment_length is None or c.integer("chunk") <= p.segment_length,
            "a chunk longer than a segment computes rows that do not exist",
        ),
    ),
    default=_DEFAULTS[0],
    # For ssc, grm and equal gates each: wide, short segments, narrow heads, AVX2's 16 registers, and both.
    fallbacks=_DEFAULTS[1:],
)
