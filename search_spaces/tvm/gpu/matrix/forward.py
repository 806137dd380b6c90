"""Search space of the forward pass on a GPU by TVM: segment states, gates and the read, searched together."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target

from .._rules import (
    GATES,
    INSTRUCTION,
    INSTRUCTION_RULE,
    PIECE,
    PIECE_RULE,
    STATES,
    ahead,
    fits,
    gates_shared,
    measuring,
    narrow,
    read_shared,
    states_shared,
    stored,
    sums_of_states,
    unused,
    walk,
    words_ahead,
)

FORMULATIONS = {
    "even": ("summed",),
    "dense": ("per_segment", "gated"),
    "sparse": ("per_segment", "gated"),
}
"""How the cached read may be computed, by the weights that it has; the template says what each one is."""
_REGISTERS = 160
"""32-bit registers of a thread that sums and operands may take; the rest is for addresses and what is loaded."""

_FIRST = Config.of(
    {
        "instruction": "m16n8k8",
        "piece": 256,
        "formulation": "per_segment",
        "states_warps": 4,
        "states_rows": 16,
        "states_BT": 32,
        "states_BV": 64,
        "gates_warps": 4,
        "gates_rows": 16,
        "gates_BN": 16,
        "read_warps": 4,
        "read_rows": 16,
        "read_BJ": 32,
        "read_BV": 64,
        "read_stages": 1,
        "read_prefetch": "registers",
    }
)
_DEFAULTS = tuple(
    _FIRST.replace(instruction=name, formulation=formulation, read_BJ=BJ, read_warps=warps, piece=piece)
    for formulation in ("per_segment", "summed")
    for name in ("m16n8k8", "m16n8k16", "m8n8k4", "simt")
    for piece in (256, 128, 64)
    for BJ, warps in ((32, 4), (16, 2))
)


def _sums(config: Config, problem: Problem, target: Target) -> bool:
    """A thread's sums, those of a state where products are weighed, and operands that it holds."""
    rows, columns = config.integer("read_rows"), min(config.integer("read_BV"), stored(problem.Dv))
    part = rows * columns // 32
    kept = part
    if config["formulation"] == "gated":
        kept += 2 * rows * stored(problem.Dk) // 64
    elif config["formulation"] == "per_segment":
        kept += part
    return max(kept, part + rows * config.integer("read_BJ") // 32) <= _REGISTERS


def shared_of_read(config: Config, problem: Problem) -> int:
    """Bytes of shared memory of a block of the read."""
    SK, BV = stored(problem.Dk), min(config.integer("read_BV"), stored(problem.Dv))
    return read_shared(config, problem, "read", SK, BV, (SK, BV))


def _fetched(config: Config, problem: Problem, target: Target) -> bool:
    """A state that is loaded ahead is in registers meanwhile."""
    part = stored(problem.Dk), min(config.integer("read_BV"), stored(problem.Dv))
    return words_ahead(config, problem, "read", part) <= 32


SHARED = {
    "segment_states": states_shared("states"),
    "gates": gates_shared,
    "read_forward": shared_of_read,
}
"""Bytes of shared memory of a block, by operation."""

SPACE = SearchSpace(
    params=(
        INSTRUCTION,
        PIECE,
        Choice("formulation", ("summed", "per_segment", "gated"), "of the cached read"),
        *STATES,
        *GATES,
        Pow2("read_warps", 2, 8),
        Int("read_rows", (16, 32), "tokens of a warp"),
        Pow2("read_BJ", 16, 64, "tokens of a step inside the piece"),
        Pow2("read_BV", 32, 128, "value columns of a tile"),
        *walk("read"),
    ),
    constraints=(
        INSTRUCTION_RULE,
        Constraint(
            "formulation",
            lambda c, p, t: c["formulation"] in FORMULATIONS[p.reads.weights],
            "the aggregation has no such formulation",
        ),
        Constraint(
            "gated",
            lambda c, p, t: c["formulation"] != "gated" or str(c["instruction"]).startswith("m16"),
            "only operands of m16n8 are weighed in registers",
        ),
        PIECE_RULE,
        *sums_of_states("states"),
        unused("gates", _FIRST),
        narrow("read_BV", "Dv", "values"),
        Constraint("read registers", _sums, "sums and operands of the read would spill"),
        Constraint("read registers ahead", _fetched, "a state in registers would spill"),
        *ahead("read"),
        fits(SHARED),
    ),
    default=_DEFAULTS[0],
    fallbacks=(*_DEFAULTS[1:], *(config.replace(states_warps=2, states_BV=32, read_BV=32) for config in _DEFAULTS)),
).chained(
    {
        "states": ("segment_states",),
        "gates": ("gates",),
        "read": ("read_forward",),
    },
    shared=("states_BT",),
)
MEASURED = measuring(SPACE)
