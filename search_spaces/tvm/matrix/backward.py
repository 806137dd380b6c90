"""Search space of the backward pass on a CPU: states, then gradients of the read, of the states and of the writes."""

from mctune.core.config import Config, Scalar
from mctune.core.problem import Problem
from mctune.core.space import Block, Choice, Constraint, Int, Param, Pow2, SearchSpace
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


def _divides(part: str, whole: str) -> Constraint:
    def holds(config: Config, problem: Problem, target: Target) -> bool:
        size = config.integer(whole) if whole == "chunk" else _width(getattr(problem, whole))
        return size % config.integer(part) == 0

    return Constraint(part, holds, f"{part} must divide {whole}" + (", padded to 16" if whole != "chunk" else ""))


def _tile(rows: str, cols: str, whole_of_rows: str, whole_of_cols: str) -> tuple[Constraint, ...]:
    """A register tile divides what it tiles, and stays in registers."""
    return (
        _divides(rows, whole_of_rows),
        _divides(cols, whole_of_cols),
        Constraint(f"{rows} registers", _fits_registers(rows, cols), f"the tile of {rows} and {cols} would spill"),
    )


_STATES = ("chunk", "rows", "cols")
_BEFORE = {
    **{f"dq_{name}": name for name in ("rows", "key_cols", "unroll", "read_rows", "read_lanes")},
    **{f"dkv_{name}": name for name in ("rows", "cols", "key_cols", "unroll")},
    **{f"{prefix}_{name}": name for prefix in ("dq", "dkv") for name in ("score_rows", "score_lanes")},
    **{f"{prefix}_{name}": name for prefix in ("dq", "dkv") for name in ("state_rows", "state_cols")},
    **{f"dstates_{name}": f"state_{name}" for name in _STATES},
    "dstates_panel": "panel",
}
"""What parameters were called before each operation had its own."""


_SHARED_ONCE = ("chunk", "formulation", "saved", "state_chunk", "state_rows", "state_cols")


def _alike(**values: Scalar) -> Config:
    """A configuration whose operations have the same tiles."""
    return Config.of({now: values[name] for now, name in _BEFORE.items()} | {n: values[n] for n in _SHARED_ONCE})


_VALUES: dict[str, Scalar] = {
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
_HALF = {**_VALUES, "rows": 8, "cols": 32, "key_cols": 32}
_NARROW = {
    **_VALUES,
    **{
        "cols": 16,
        "key_cols": 16,
        "read_rows": 4,
        "read_lanes": 16,
        "score_rows": 4,
        "state_rows": 4,
        "state_cols": 16,
    },
}
_DEFAULTS = tuple(
    _alike(**{**values, **cached})
    for values in (_VALUES, {**_VALUES, "chunk": 16, "read_lanes": 16}, _HALF, _NARROW, {**_NARROW, "chunk": 16})
    for cached in ({"formulation": "gather", "panel": 1}, {}, {"formulation": "summed", "panel": 1})
)


def _state_tile(prefix: str, of: str) -> tuple[Int, Int]:
    return (
        Int(f"{prefix}_rows", (2, 4, 8, 16), f"key columns of a tile of {of}"),
        Int(f"{prefix}_cols", (16, 32, 48, 64), f"value columns of a tile of {of}"),
    )


def _score_tile(prefix: str, of: str) -> tuple[Int, Int]:
    return (
        Int(f"{prefix}_score_rows", (2, 4, 8), f"{of} of a score tile"),
        Int(f"{prefix}_score_lanes", (16, 32, 64), "tokens of a score tile"),
    )


_SHARED = (
    Int("chunk", (16, 32, 48, 64, 96, 128), "BT: tokens of a chunk"),
    Choice("formulation", ("per_segment", "summed", "gather"), "of the cached states' reads and gradients"),
    Choice("saved", ("states", "nothing"), "what the forward keeps; with nothing the states are computed again"),
)
_OF_STATES = (
    Pow2("state_chunk", 32, 256, "tokens packed at once for states"),
    *_state_tile("state", "a state"),
)
_OF_DQ = (
    Int("dq_rows", (1, 2, 4, 8, 16), "tokens of a register tile of du, or pairs of one of gathered reads"),
    Int("dq_key_cols", (16, 32, 48, 64), "key columns of that tile"),
    Pow2("dq_unroll", 1, 4, "unrolling of the K loops over a width"),
    Int("dq_read_rows", (2, 4, 8, 16), "key columns of a tile of a state times dy"),
    Int("dq_read_lanes", (16, 32, 64), "tokens of a tile of a state times dy"),
    *_score_tile("dq", "keys or segments"),
    *_state_tile("dq_state", "the memory that a chunk adds to"),
)
_OF_DSTATES = (
    Pow2("dstates_chunk", 32, 256, "tokens packed at once for the gradients of states"),
    *_state_tile("dstates", "a state's gradient"),
    Pow2("dstates_panel", 1, 8, "states whose gradients one task adds up, for per_segment"),
)
_OF_DKV = (
    Int("dkv_rows", (1, 2, 4, 8, 16), "tokens of a register tile of dk and dv"),
    Int("dkv_cols", (16, 32, 48, 64), "value columns of that tile"),
    Int("dkv_key_cols", (16, 32, 48, 64), "key columns of that tile"),
    Pow2("dkv_unroll", 1, 4, "unrolling of the K loops over a width"),
    *_score_tile("dkv", "keys"),
    *_state_tile("dkv_state", "the gradient that a chunk adds to"),
)


def _block(name: str, operation: str, params: tuple[Param, ...]) -> Block:
    return Block(name, (operation,), tuple(param.name for param in params))


SPACE = SearchSpace(
    params=(*_SHARED, *_OF_STATES, *_OF_DQ, *_OF_DSTATES, *_OF_DKV),
    constraints=(
        Constraint(
            "formulation",
            lambda c, p, t: c["formulation"] in FORMULATIONS[p.reads.weights],
            "the aggregation has no such formulation",
        ),
        Constraint(
            "dstates_panel",
            lambda c, p, t: c["formulation"] == "per_segment" or c["dstates_panel"] == 1,
            "only per_segment has panels",
        ),
        *_tile("dq_rows", "dq_key_cols", "chunk", "Dk"),
        *_tile("dq_read_rows", "dq_read_lanes", "Dk", "chunk"),
        *_tile("dkv_rows", "dkv_cols", "chunk", "Dv"),
        *_tile("dkv_rows", "dkv_key_cols", "chunk", "Dk")[1:],
        *_tile("dq_score_rows", "dq_score_lanes", "chunk", "chunk"),
        *_tile("dkv_score_rows", "dkv_score_lanes", "chunk", "chunk"),
        *_tile("state_rows", "state_cols", "Dk", "Dv"),
        *_tile("dq_state_rows", "dq_state_cols", "Dk", "Dv"),
        *_tile("dstates_rows", "dstates_cols", "Dk", "Dv"),
        *_tile("dkv_state_rows", "dkv_state_cols", "Dk", "Dv"),
        Constraint(
            "chunk",
            lambda c, p, t: c["chunk"] == 16 or p.segment_length is None or c.integer("chunk") <= p.segment_length,
            "a chunk longer than a segment computes rows that do not exist",
        ),
    ),
    default=_DEFAULTS[0],
    # For ssc, grm and equal gates each: wide, short segments, narrow heads, AVX2's 16 registers, and both.
    fallbacks=_DEFAULTS[1:],
    renamed=_BEFORE,
    blocks=(
        _block("states", "segment_states", _OF_STATES),
        _block("dq", "read_backward", _OF_DQ),
        _block("dstates", "state_backward", _OF_DSTATES),
        _block("dkv", "write_backward", _OF_DKV),
    ),
)
