"""Search space of the backward pass on a GPU by TVM: states, and gradients of the read, gates, states and writes."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target

from .._rules import INSTRUCTION, PREFETCH, ahead, instruction, instruction_or_older, stored, tile, unused

_REGISTERS = 176
"""32-bit registers of a thread that sums may take; the rest is for addresses and what is loaded."""

_FIRST = Config.of(
    {
        "instruction": "m16n8k8",
        "piece": 256,
        "saved": "gates",
        "states_warps": 4,
        "states_rows": 16,
        "states_BT": 32,
        "states_BV": 64,
        "gates_warps": 4,
        "gates_rows": 16,
        "gates_BN": 16,
        "dq_warps": 4,
        "dq_rows": 16,
        "dq_BJ": 32,
        "dq_BK": 64,
        "dq_stages": 1,
        "dq_prefetch": "registers",
        "dgates_warps": 4,
        "dgates_BI": 16,
        "dgates_splits": 1,
        "dstates_warps": 4,
        "dstates_rows": 16,
        "dstates_BT": 32,
        "dstates_BV": 64,
        "dkv_warps": 4,
        "dkv_rows": 16,
        "dkv_BT": 32,
    }
)
_NARROW = {"states_warps": 2, "states_BV": 32, "dstates_warps": 2, "dstates_BV": 32, "dq_BK": 32}
_SMALL = {"dq_warps": 2, "dq_BJ": 16, "dkv_warps": 2, "dkv_BT": 16}
_SMALLEST = _SMALL | {"dkv_warps": 1, "dgates_warps": 2}
_DEFAULTS = tuple(
    _FIRST.replace(**{"instruction": name, "piece": piece, "saved": saved, **sizes, **widths})
    for saved in ("gates", "states")
    for widths in ({}, _NARROW)
    for sizes in ({}, _SMALL, _SMALLEST)
    for name in ("m16n8k8", "m16n8k16", "m8n8k4", "simt")
    for piece in (256, 128, 64)
)


def _longest(problem: Problem) -> int:
    """Tokens of the longest segment."""
    return problem.segment_length or 1 << problem.T.bit_length() - 1


def _size(problem: Problem) -> int:
    return 4 if problem.dtype == "float32" else 2


def _sums_of_read(config: Config, problem: Problem, target: Target) -> bool:
    """A thread's sums, a state's part of them, q, and scores."""
    rows, columns = config.integer("dq_rows"), min(config.integer("dq_BK"), stored(problem.Dk))
    return rows * (3 * columns + config.integer("dq_BJ")) // 32 <= _REGISTERS


def _sums_of_writes(config: Config, problem: Problem, target: Target) -> bool:
    """A thread's sums of keys and of values, and two products of pairs of tokens."""
    rows = config.integer("dkv_rows")
    return rows * (stored(problem.Dk) + stored(problem.Dv) + 2 * config.integer("dkv_BT")) // 32 <= _REGISTERS


def shared_of_read(config: Config, problem: Problem) -> int:
    """Bytes of shared memory of a block of the read's gradient."""
    size, SV = _size(problem), stored(problem.Dv)
    BT, BJ = config.integer("dq_warps") * config.integer("dq_rows"), config.integer("dq_BJ")
    BK = min(config.integer("dq_BK"), stored(problem.Dk))
    own = tile(BJ, SV, size) + tile(BJ, BK, size)
    if config["instruction"] in ("simt", "m8n8k4"):
        own += tile(BT, BJ, size)
    return tile(BT, SV, size) + max(own, tile(BK * config.integer("dq_stages"), SV, size))


def shared_of_writes(config: Config, problem: Problem) -> int:
    """Bytes of shared memory of a block of the writes' gradients."""
    size, SK, SV = _size(problem), stored(problem.Dk), stored(problem.Dv)
    BJ, BT = config.integer("dkv_warps") * config.integer("dkv_rows"), config.integer("dkv_BT")
    later = tile(BT, SK, size) + tile(BT, SV, size)
    if config["instruction"] in ("simt", "m8n8k4"):
        later += tile(BJ, BT, size)
    return tile(BJ, SK, size) + tile(BJ, SV, size) + max(tile(SK, SV, size), later, tile(16, SK, 4))


def _fits(config: Config, problem: Problem, target: Target) -> bool:
    return max(shared_of_read(config, problem), shared_of_writes(config, problem)) <= target.shared_bytes


def _rows(prefix: str):
    """No warp without a row of the state."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        return config.integer(f"{prefix}_warps") * config.integer(f"{prefix}_rows") <= max(32, stored(problem.Dk))

    return Constraint(f"{prefix} rows", holds, "warps would have no row of the state")


def _columns(name: str, width: str):
    """Tiles no wider than the state, but for the narrowest."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        return config[name] == 32 or config.integer(name) < 2 * stored(getattr(problem, width))

    return Constraint(name, holds, "the tile would be wider than the state")


def _block(prefix: str):
    """A thread's sums of a state."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        columns = min(config.integer(f"{prefix}_BV"), stored(problem.Dv))
        return config.integer(f"{prefix}_rows") * columns // 32 <= 64

    return Constraint(f"{prefix} registers", holds, "the sums of a state would spill")


SPACE = SearchSpace(
    params=(
        INSTRUCTION,
        Pow2("piece", 64, 512, "tokens that a segment is cut into; products inside a piece grow with its square"),
        Choice("saved", ("nothing", "states", "gates"), "what the forward keeps: nothing, states, gates as well"),
        Pow2("states_warps", 2, 8),
        Int("states_rows", (16, 32), "key columns of a warp"),
        Pow2("states_BT", 16, 64, "tokens of a step of a state's sum"),
        Pow2("states_BV", 32, 128, "value columns of a state's tile"),
        Pow2("gates_warps", 2, 8),
        Int("gates_rows", (16, 32), "tokens of a warp"),
        Pow2("gates_BN", 16, 64, "segments of a tile of logits"),
        Pow2("dq_warps", 2, 8),
        Int("dq_rows", (16, 32), "tokens of a warp"),
        Pow2("dq_BJ", 16, 64, "tokens of a step inside the piece"),
        Pow2("dq_BK", 32, 128, "key columns of a tile"),
        Int("dq_stages", (1, 2), "states in shared memory: the one that is read, and the next"),
        Choice("dq_prefetch", PREFETCH, "where the next state is meanwhile"),
        Pow2("dgates_warps", 2, 8, "each of 16 tokens"),
        Pow2("dgates_BI", 16, 32, "segments of a tile of gates"),
        Pow2("dgates_splits", 1, 16, "parts of the tokens that a mean key's gradient is added up over"),
        Pow2("dstates_warps", 2, 8),
        Int("dstates_rows", (16, 32), "key columns of a warp"),
        Pow2("dstates_BT", 16, 64, "tokens of a step of a state's gradient"),
        Pow2("dstates_BV", 32, 128, "value columns of a state's tile"),
        Pow2("dkv_warps", 1, 8),
        Int("dkv_rows", (16, 32), "tokens of a warp"),
        Pow2("dkv_BT", 16, 64, "later tokens of a step"),
    ),
    constraints=(
        Constraint("instruction", instruction, "the GPU has another instruction for this dtype"),
        Constraint("saved", lambda c, p, t: c["saved"] != "gates" or p.routed, "there are no gates to keep"),
        Constraint(
            "piece",
            lambda c, p, t: c["piece"] == 64 or c.integer("piece") < 2 * _longest(p),
            "a piece longer than a segment is the segment",
        ),
        _rows("states"),
        _rows("dstates"),
        _columns("states_BV", "Dv"),
        _columns("dstates_BV", "Dv"),
        _columns("dq_BK", "Dk"),
        _block("states"),
        _block("dstates"),
        unused("gates", _FIRST),
        Constraint(
            "dgates_*",
            lambda c, p, t: (
                p.routed
                or (
                    all(c[name] == _FIRST[name] for name in ("dgates_BI", "dgates_splits"))
                    and c["dgates_warps"] in (2, 4)
                )
            ),
            "there are no gates to have gradients",
        ),
        *ahead("dq"),
        Constraint("dq registers", _sums_of_read, "sums of the read's gradient would spill"),
        Constraint("dkv registers", _sums_of_writes, "sums of the writes' gradients would spill"),
        Constraint("shared memory", _fits, "a block of the GPU has less shared memory"),
    ),
    default=_DEFAULTS[0],
    fallbacks=_DEFAULTS[1:],
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
