"""Search space of the backward pass on a GPU by TVM: states, and gradients of the read, gates, states and writes."""

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
    THROUGH_SHARED,
    ahead,
    fits,
    gates_shared,
    measuring,
    narrow,
    read_shared,
    size_of,
    states_shared,
    stored,
    sums_of_states,
    tile,
    unused,
    walk,
    words_ahead,
)

_REGISTERS = 176
"""32-bit registers of a thread that sums may take; the rest is for addresses and what is loaded."""

_OF_EACH, _OF_GATES = 16, 24
"""Those of them that a write's gradient needs besides its sums; what gates of writes need is more."""

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
        "dkv_BK": 64,
    }
)
_NARROW = {"states_warps": 2, "states_BV": 32, "dstates_warps": 2, "dstates_BV": 32, "dq_BK": 32, "dkv_BK": 32}
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


def _sums_of_read(config: Config, problem: Problem, target: Target) -> bool:
    """A thread's sums, a state's part of them, q, and scores; and the next state, where that is in registers."""
    rows, columns = config.integer("dq_rows"), min(config.integer("dq_BK"), stored(problem.Dk))
    sums = rows * (3 * columns + config.integer("dq_BJ")) // 32
    return sums + words_ahead(config, problem, "dq", (columns, stored(problem.Dv))) <= _REGISTERS


def _sums_of_writes(config: Config, problem: Problem, target: Target) -> bool:
    """A thread's sums of keys and of values, and two products of pairs of tokens."""
    rows = config.integer("dkv_rows")
    sums = rows * (stored(problem.Dk) + stored(problem.Dv) + 2 * config.integer("dkv_BT")) // 32
    return sums <= _REGISTERS - (_OF_GATES if problem.writes.gated else _OF_EACH)


def shared_of_read(config: Config, problem: Problem) -> int:
    """Bytes of shared memory of a block of the read's gradient."""
    SV, BK = stored(problem.Dv), min(config.integer("dq_BK"), stored(problem.Dk))
    return read_shared(config, problem, "dq", SV, BK, (BK, SV))


def shared_of_writes(config: Config, problem: Problem) -> int:
    """Bytes of shared memory of a block of the writes' gradients."""
    size, SK, SV = size_of(problem), stored(problem.Dk), stored(problem.Dv)
    BJ, BT = config.integer("dkv_warps") * config.integer("dkv_rows"), config.integer("dkv_BT")
    later = tile(BT, SK, size) + tile(BT, SV, size)
    if config["instruction"] in THROUGH_SHARED:
        later += tile(BJ, BT, size)
    end = tile(min(config.integer("dkv_BK"), SK), SV, size)
    return tile(BJ, SK, size) + tile(BJ, SV, size) + max(end, later, tile(16, SK, 4))


SHARED = {
    "segment_states": states_shared("states"),
    "gates": gates_shared,
    "read_backward": shared_of_read,
    "state_backward": states_shared("dstates"),
    "write_backward": shared_of_writes,
}
"""Bytes of shared memory of a block, by operation, but for what fits every GPU."""

SPACE = SearchSpace(
    params=(
        INSTRUCTION,
        PIECE,
        Choice("saved", ("nothing", "states", "gates"), "what the forward keeps: nothing, states, gates as well"),
        *STATES,
        *GATES,
        Pow2("dq_warps", 2, 8),
        Int("dq_rows", (16, 32), "tokens of a warp"),
        Pow2("dq_BJ", 16, 64, "tokens of a step inside the piece"),
        Pow2("dq_BK", 32, 128, "key columns of a tile"),
        *walk("dq"),
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
        Pow2("dkv_BK", 32, 128, "key columns of the part of a state that is in shared memory"),
    ),
    constraints=(
        INSTRUCTION_RULE,
        Constraint("saved", lambda c, p, t: c["saved"] != "gates" or p.routed, "there are no gates to keep"),
        PIECE_RULE,
        *sums_of_states("states"),
        *sums_of_states("dstates"),
        narrow("dq_BK", "Dk"),
        narrow("dkv_BK", "Dk"),
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
        fits(SHARED),
    ),
    default=_DEFAULTS[0],
    fallbacks=_DEFAULTS[1:],
).chained(
    {
        "states": ("segment_states",),
        "gates": ("gates",),
        "dq": ("read_backward",),
        "dgates": ("gates_backward",),
        "dstates": ("state_backward",),
        "dkv": ("write_backward",),
    },
    shared=("states_BT",),
)
MEASURED = measuring(SPACE)
