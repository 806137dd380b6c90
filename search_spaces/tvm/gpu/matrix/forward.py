"""Search space of the forward pass on a GPU by TVM: segment states, gates and the read, searched together."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target

from .._rules import INSTRUCTION, PREFETCH, ahead, instruction, instruction_or_older, stored, tile, unused

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


def _longest(problem: Problem) -> int:
    """Tokens of the longest segment."""
    return problem.segment_length or 1 << problem.T.bit_length() - 1


def _size(problem: Problem) -> int:
    return 4 if problem.dtype == "float32" else 2


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
    size, SK = _size(problem), stored(problem.Dk)
    BT, BJ = config.integer("read_warps") * config.integer("read_rows"), config.integer("read_BJ")
    BV = min(config.integer("read_BV"), stored(problem.Dv))
    own = tile(BJ, SK, size) + tile(BJ, BV, size)
    if config["instruction"] in ("simt", "m8n8k4"):
        own += tile(BT, BJ, size)
    return tile(BT, SK, size) + max(own, tile(SK * config.integer("read_stages"), BV, size))


def _fetched(config: Config, problem: Problem, target: Target) -> bool:
    """A state that is loaded ahead is in registers meanwhile: 16 bytes take four."""
    if config["read_prefetch"] == "async":
        return True
    bytes_ = stored(problem.Dk) * min(config.integer("read_BV"), stored(problem.Dv)) * _size(problem)
    return bytes_ // 4 <= 32 * 32 * config.integer("read_warps")


def _wide(name: str, width: str):
    """Tiles no wider than the state, but for the narrowest."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        narrowest = config.integer(name) == 32
        return narrowest or config.integer(name) < 2 * stored(getattr(problem, width))

    return holds


SPACE = SearchSpace(
    params=(
        INSTRUCTION,
        Pow2("piece", 64, 512, "tokens that a segment is cut into; products inside a piece grow with its square"),
        Choice("formulation", ("summed", "per_segment", "gated"), "of the cached read"),
        Pow2("states_warps", 2, 8),
        Int("states_rows", (16, 32), "key columns of a warp"),
        Pow2("states_BT", 16, 64, "tokens of a step of a state's sum"),
        Pow2("states_BV", 32, 128, "value columns of a state's tile"),
        Pow2("gates_warps", 2, 8),
        Int("gates_rows", (16, 32), "tokens of a warp"),
        Pow2("gates_BN", 16, 64, "segments of a tile of logits"),
        Pow2("read_warps", 2, 8),
        Int("read_rows", (16, 32), "tokens of a warp"),
        Pow2("read_BJ", 16, 64, "tokens of a step inside the piece"),
        Pow2("read_BV", 32, 128, "value columns of a tile"),
        Int("read_stages", (1, 2), "states in shared memory: the one that is read, and the next"),
        Choice("read_prefetch", PREFETCH, "where the next state is meanwhile"),
    ),
    constraints=(
        Constraint("instruction", instruction, "the GPU has another instruction for this dtype"),
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
        Constraint(
            "piece",
            lambda c, p, t: c["piece"] == 64 or c.integer("piece") < 2 * _longest(p),
            "a piece longer than a segment is the segment",
        ),
        Constraint(
            "states rows",
            lambda c, p, t: c.integer("states_warps") * c.integer("states_rows") <= max(32, stored(p.Dk)),
            "warps would have no row of the state",
        ),
        Constraint("states_BV", _wide("states_BV", "Dv"), "the tile would be wider than the state"),
        Constraint(
            "states registers",
            lambda c, p, t: c.integer("states_rows") * min(c.integer("states_BV"), stored(p.Dv)) // 32 <= 64,
            "the sums of a state would spill",
        ),
        unused("gates", _FIRST),
        Constraint("read_BV", _wide("read_BV", "Dv"), "the tile would be wider than the values"),
        Constraint("read registers", _sums, "sums and operands of the read would spill"),
        Constraint("read registers ahead", _fetched, "a state in registers would spill"),
        *ahead("read"),
        Constraint(
            "shared memory",
            lambda c, p, t: shared_of_read(c, p) <= t.shared_bytes,
            "a block of the GPU has less shared memory",
        ),
    ),
    default=_DEFAULTS[0],
    fallbacks=(*_DEFAULTS[1:], *(config.replace(states_warps=2, states_BV=32, read_BV=32) for config in _DEFAULTS)),
)
MEASURED = SearchSpace(
    params=SPACE.params,
    constraints=tuple(
        Constraint(c.name, instruction_or_older, c.reason) if c.name == "instruction" else c for c in SPACE.constraints
    ),
    default=SPACE.default,
    fallbacks=SPACE.fallbacks,
)
"""The space where candidates are measured: newer GPUs run the instructions of older ones."""
