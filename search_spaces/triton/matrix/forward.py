"""Search space of the forward pass on a GPU: segment states, gates and the read, searched together."""

from dataclasses import replace

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target

from .._rules import MANY, lists, longest, operands, power, state_and_keys, unused

FORMULATIONS = {
    "even": ("summed",),
    "dense": ("per_segment", "gated", "scaled"),
    "sparse": ("per_segment", "gated", "scaled", "grouped"),
}
"""How the cached read may be computed, by the weights that it has; the template says what each one is."""


_WIDE = Config.of(
    {
        "piece": 256,
        "precision": "ieee",
        "gates": "precomputed",
        "formulation": "per_segment",
        "states_BT": 64,
        "states_BK": 128,
        "states_BV": 128,
        "states_num_warps": 8,
        "states_num_stages": 3,
        "gates_BT": 64,
        "gates_BN": 16,
        "gates_num_warps": 4,
        "gates_num_stages": 2,
        "read_BT": 128,
        "read_BJ": 64,
        "read_BV": 128,
        "read_BN": 16,
        "read_num_warps": 8,
        "read_num_stages": 3,
        "group_BT": 64,
        "group_BV": 128,
        "group_ROUNDS": 8,
        "group_MIB": 0,
        "group_num_warps": 4,
        "group_num_stages": 3,
    }
)
_GATES = ("BT", "BN", "num_warps", "num_stages")
_GROUP = ("BT", "BV", "ROUNDS", "MIB", "num_warps", "num_stages")


def _shorter(piece: int, formulation: str) -> Config:
    """The default for shorter pieces and other aggregations."""
    return _WIDE.replace(piece=piece, formulation=formulation, read_BT=min(piece, 128))


def _float32(piece: int, formulation: str, precision: str, columns: int) -> Config:
    """The default for float32; tiles of more columns than there are values are cut down, from the widest tile."""
    tiles = {f"{name}_num_stages": 1 for name in ("states", "gates", "read")}
    tiles |= {
        "states_BT": min(piece, 32),
        "states_BK": 64,
        "states_BV": columns,
        "read_BJ": 16,
        "read_BV": columns,
        "gates_num_warps": 8,
    }
    return _shorter(piece, formulation).replace(precision=precision, gates_BT=16, read_BT=16, **tiles)


def _sums(config: Config, problem: Problem, target: Target) -> bool:
    """The sum, and where gates times products are added to it, a product: in half of a thread's registers."""
    warps = config.integer("read_num_warps")
    tiles = 2 if config["formulation"] == "per_segment" else 1
    columns = min(config.integer("read_BV"), power(problem.Dv))
    return tiles * config.integer("read_BT") * columns <= min(warps * 32 * 128, 65536 // 2)


_TALL = _WIDE.replace(formulation="scaled", read_BT=256, read_BJ=32, read_num_warps=16, read_num_stages=2)
_DEFAULTS = (
    # Lists of a larger top_k need more warps.
    *(
        _shorter(piece, "grouped").replace(gates_num_warps=warps)
        for warps in (4, 8)
        for piece in (256, 128, 64, 32, 16)
    ),
    # Many rows share one load of a state from L2.
    _WIDE.replace(read_BT=256, read_num_warps=16),
    _TALL,
    _WIDE.replace(read_BT=256, read_BV=64, read_num_warps=16),
    *(_shorter(piece, name) for name in ("per_segment", "summed") for piece in (256, 128, 64, 32, 16)),
)
_FLOAT32 = tuple(
    config.replace(**({f"gates_{name}": _WIDE[f"gates_{name}"] for name in _GATES} if unused else {}))
    for columns in (32, 16)  # the first for wider values, the second for those of at most 16
    for name, unused in (("per_segment", False), ("summed", True))
    for piece in (64, 32, 16)
    for precision in ("tf32x3", "ieee")
    for columns in (32, 128)
    for config in (_float32(piece, name, precision, columns),)
)

SPACE = SearchSpace(
    params=(
        Pow2("piece", 16, 512, "tokens that a segment is cut into; products inside a piece grow with its square"),
        Choice("precision", ("ieee", "tf32x3"), "of float32 products"),
        Choice("gates", ("precomputed", "fused"), "by a kernel of their own, or as the read goes along"),
        Choice("formulation", ("summed", "per_segment", "gated", "scaled", "grouped"), "of the cached read"),
        Pow2("states_BT", 16, 128, "tokens of a step of a state's sum"),
        Pow2("states_BK", 32, 128, "key columns of a state's tile"),
        Pow2("states_BV", 16, 128, "value columns of a state's tile"),
        Pow2("states_num_warps", 4, 8),
        Int("states_num_stages", (1, 2, 3, 4)),
        Pow2("gates_BT", 16, 128, "tokens of a tile of logits"),
        Pow2("gates_BN", 16, 64, "segments of a tile of logits"),
        Pow2("gates_num_warps", 2, 8),
        Int("gates_num_stages", (1, 2, 3)),
        Pow2("read_BT", 16, 256, "tokens of a tile, which share every state that they read"),
        Pow2("read_BJ", 16, 128, "tokens of a step inside the piece"),
        Pow2("read_BV", 16, 256, "value columns of a tile"),
        Pow2("read_BN", 16, 64, "segments whose gates are computed at once, where gates are fused"),
        Pow2("read_num_warps", 4, 16),
        Int("read_num_stages", (1, 2, 3, 4)),
        Pow2("group_BT", 16, 128, "pairs of a tile of the grouped read"),
        Pow2("group_BV", 16, 128, "value columns of a tile of the grouped read"),
        Pow2("group_ROUNDS", 1, 16, "tiles of a segment's pairs that a program reads its state for"),
        Int("group_MIB", (0, 16, 32, 64), "of the reads of pairs that are written and added up together; 0: all"),
        Pow2("group_num_warps", 2, 8),
        Int("group_num_stages", (1, 2, 3, 4)),
    ),
    constraints=(
        Constraint(
            "piece", lambda c, p, t: c.integer("piece") <= longest(p), "no segment is longer than a shorter piece"
        ),
        Constraint(
            "precision",
            lambda c, p, t: c["precision"] == "ieee" or (p.dtype == "float32" and t.kind == "cuda"),
            "only products of float32 on NVIDIA's GPUs have a choice of precision",
        ),
        Constraint(
            "formulation",
            lambda c, p, t: c["formulation"] in FORMULATIONS[p.reads.weights],
            "the aggregation has no such formulation",
        ),
        Constraint(
            "gates",
            lambda c, p, t: c["gates"] == "precomputed" or p.reads.weights == "dense",
            "the aggregation's gates cannot be fused",
        ),
        Constraint(
            "gates",
            lambda c, p, t: c["gates"] == "precomputed" or c["formulation"] != "scaled",
            "the sum is kept in units of a gate, and a fused one is not known before the last state",
        ),
        Constraint(
            "read_BN",
            lambda c, p, t: c["gates"] == "fused" or c["read_BN"] == _WIDE["read_BN"],
            "only fused gates come in blocks",
        ),
        unused("gates", _WIDE, _GATES, lambda c, p: c["gates"] == "precomputed" and p.routed),
        unused("group", _WIDE, _GROUP, lambda c, p: c["formulation"] == "grouped"),
        Constraint(
            "read_BT",
            lambda c, p, t: c.integer("read_BT") <= c.integer("piece"),
            "a tile longer than a piece computes rows that do not exist",
        ),
        # Larger tiles are cut down to this size, so of the values that mean the same only the default's stays.
        *(
            Constraint(
                name,
                lambda c, p, t, name=name: c.integer(name) <= c.integer("piece") or c[name] == _WIDE[name],
                "a tile longer than a piece computes rows that do not exist",
            )
            for name in ("states_BT", "gates_BT", "read_BJ")
        ),
        *(
            Constraint(
                name,
                lambda c, p, t, name=name: c.integer(name) <= power(p.Dv) or c[name] == _WIDE[name],
                "a tile wider than the values computes columns that do not exist",
            )
            for name in ("states_BV", "read_BV", "group_BV")
        ),
        Constraint(
            "states_BK",
            lambda c, p, t: c.integer("states_BK") <= max(power(p.Dk), 32) or c["states_BK"] == _WIDE["states_BK"],
            "a tile wider than the keys computes rows that do not exist",
        ),
        Constraint("read registers", _sums, "the accumulators alone would spill"),
        Constraint("read_num_warps", lambda c, p, t: c.integer("read_num_warps") <= 8 or t.arch == "sm_90", MANY),
        Constraint(
            "read_num_stages",
            lambda c, p, t: t.kind == "cuda" or c["read_num_stages"] == 1 or power(max(p.Dk, p.Dv)) < 128,
            "AMD's 64 KiB of shared memory do not hold wide rows that are loaded ahead",
        ),
        Constraint("read operands", operands("read", "BT", lambda p: p.Dk), "float32 rows of q would spill"),
        Constraint(
            "gates operands",
            lambda c, p, t: operands("gates", "BT", lambda p: p.Dk)(c, p, t) or c["gates"] == "fused" or not p.routed,
            "float32 rows of u would spill",
        ),
        Constraint("gates registers", lists, "the lists of the best logits would spill"),
        Constraint(
            "states registers",
            state_and_keys,
            "the sums of products, of a state and of its keys, would spill",
        ),
    ),
    default=_DEFAULTS[0],
    fallbacks=(*_DEFAULTS[1:], *(config.replace(read_num_stages=1) for config in _DEFAULTS), *_FLOAT32),
).chained(
    {
        "states": ("segment_states",),
        "gates": ("gates",),
        "group": (
            "pair_order",
            "grouped_read",
        ),
        "read": (
            "read_forward",
            "read_specialized",
        ),
    },
)


def _specialized(config: Config, problem: Problem, target: Target) -> bool:
    fits = problem.Dk == problem.Dv == 128 and problem.dtype != "float32" and target.arch == "sm_90"
    gated = problem.reads.weights == "dense" and config["gates"] == "precomputed"
    return config["formulation"] != "specialized" or (fits and gated and not problem.writes.gated)


def _ring(config: Config, problem: Problem, target: Target) -> bool:
    return config["formulation"] != "specialized" or config.integer("read_num_stages") >= 2


def _fixed(config: Config, problem: Problem, target: Target) -> bool:
    names = ("read_BT", "read_BJ", "read_BV", "read_BN", "read_num_warps")
    return config["formulation"] != "specialized" or all(config[name] == _TALL[name] for name in names)


def _or_specialized(constraint: Constraint) -> Constraint:
    def holds(config: Config, problem: Problem, target: Target) -> bool:
        return config["formulation"] == "specialized" or constraint.holds(config, problem, target)

    return Constraint(constraint.name, holds, constraint.reason)


MEASURED = replace(
    SPACE,
    params=tuple(
        Choice(p.name, (*map(str, p.values), "specialized"), p.help) if p.name == "formulation" else p
        for p in SPACE.params
    ),
    constraints=(
        *(_or_specialized(c) if c.name == "formulation" else c for c in SPACE.constraints),
        Constraint(
            "formulation",
            _specialized,
            "warps are specialised on sm_90, for linear grm and soup, 128 x 128 of 16 bits, and precomputed gates",
        ),
        Constraint("read_num_stages", _ring, "keys and values of specialised warps are in the ring together"),
        Constraint("read_*", _fixed, "specialised warps read tiles of one size"),
    ),
)
"""The space where candidates are measured. What only a device verifies, since Triton's interpreter has no Gluon, is a
point of it and never a default: no prediction, and no package that a GPU has not verified, has it."""
