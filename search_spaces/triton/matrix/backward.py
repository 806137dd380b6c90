"""Search space of the backward pass on a GPU: states and gates, then the gradients of each operation."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target

from .._rules import MANY, at_most, lists, longest, operands, power, state_and_keys, unused


def _accumulator(prefix: str, elements, *, beside: int = 0) -> Constraint:
    """128 registers a thread for what products are added up in; a thread of 16 warps, which has no more, less some."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        warps = config.integer(f"{prefix}_num_warps")
        return elements(config, problem) <= (128 - (beside if warps == 16 else 0)) * 32 * warps

    return Constraint(f"{prefix} registers", holds, "the accumulator alone would spill")


def _dense(config: Config, problem: Problem) -> bool:
    """Whether tokens read every cached state with a gate of its own."""
    return problem.routed and config["formulation"] != "grouped"


def _keeps_gates(config: Config, problem: Problem, target: Target) -> bool:
    """A logit a token and segment is kept where all of them take no more memory than q, k, v and u."""
    inputs = (3 * problem.Dk + problem.Dv) * (4 if problem.dtype == "float32" else 2)
    few = not _dense(config, problem) or 4 * len(problem.spans()) <= inputs
    return config["saved"] != "gates" or (problem.routed and problem.segmentation != "logarithmic" and few)


def _rows(config: Config) -> int:
    """Rows of a tile of the gates' gradient."""
    return max(config.integer("dgates_BT"), config.integer("dgates_BI"))


def _both(config: Config, problem: Problem) -> int:
    """Elements of a tile of dk and dv."""
    return config.integer("dkv_BJ") * (power(problem.Dk) + power(problem.Dv))


def _rows_in_registers(config: Config, problem: Problem, target: Target) -> bool:
    """16-bit rows of k and v, beside dk, dv and two tiles of scores, and under SWLA of decays."""
    if problem.dtype == "float32" or target.kind != "cuda" or target.products_in_flight:
        return True
    tile, step = _both(config, problem), config.integer("dkv_BJ") * config.integer("dkv_BT")
    scores = (4 if problem.writes.gated else 2) * step
    return tile <= 16384 and tile + scores <= 192 * 32 * config.integer("dkv_num_warps")


_WIDE = Config.of(
    {
        "piece": 256,
        "precision": "tf32x3",
        "saved": "gates",
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
        "dq_BT": 128,
        "dq_BJ": 64,
        "dq_BK": 64,
        "dq_num_warps": 8,
        "dq_num_stages": 2,
        "dgates_BT": 32,
        "dgates_BI": 16,
        "dgates_SPLITS": 4,
        "dgates_num_warps": 4,
        "dgates_num_stages": 2,
        "dstates_BT": 64,
        "dstates_BK": 64,
        "dstates_BV": 128,
        "dstates_SEGMENTS": 2,
        "dstates_OPERAND": "registers",
        "dstates_num_warps": 8,
        "dstates_num_stages": 2,
        "dkv_BJ": 128,
        "dkv_BT": 32,
        "dkv_BS": 128,
        "dkv_num_warps": 8,
        "dkv_num_stages": 2,
        "dgroup_BT": 64,
        "dgroup_BK": 128,
        "dgroup_OPERAND": "registers",
        "dgroup_num_warps": 4,
        "dgroup_num_stages": 3,
    }
)
_GATES = ("BT", "BN", "num_warps", "num_stages")
_GROUP = ("BT", "BK", "num_warps", "num_stages")
_DGATES = ("BT", "BI", "SPLITS", "num_warps", "num_stages")


def _shorter(piece: int, routed: bool) -> Config:
    """The default for shorter pieces and other aggregations."""
    config = _WIDE.replace(
        piece=piece, dq_BT=min(piece, 128), dkv_BJ=min(piece, 128), dkv_num_warps=8 if piece > 64 else 4
    )
    return config if routed else config.replace(precision="ieee", dq_BK=128, dstates_SEGMENTS=1)


def _chosen(piece: int, keys: int = 128, warps: int = 8) -> Config:
    """The default for ssc, with whole rows of dq: one part of the gradients of gates."""
    rows = {"dq_BK": 128, "dgates_BT": 64, "dgates_num_warps": 8}
    return _shorter(piece, True).replace(formulation="grouped", dgroup_BK=keys, dgroup_num_warps=warps, **rows)


def _float32(piece: int, routed: bool, precision: str) -> Config:
    """The default for float32."""
    tiles = {f"{name}_num_stages": 1 for name in ("states", "dq", "dstates", "dkv")}
    tiles |= {"states_BT": min(piece, 32), "states_BK": 64, "states_BV": 32}
    tiles |= {"dq_BT": 16, "dq_BJ": 16, "dq_BK": 32}
    tiles |= {"dkv_BJ": 16, "dkv_BT": 16, "dkv_BS": 32, "dkv_num_warps": 4}
    tiles |= {"dstates_BT": min(piece, 32), "dstates_BK": 64, "dstates_BV": 32, "dstates_SEGMENTS": 1}
    if routed:
        tiles |= {"gates_BT": 16, "gates_num_warps": 8, "gates_num_stages": 1}
        tiles |= {"dgates_BT": 16, "dgates_num_warps": 8, "dgates_num_stages": 1}
    return _shorter(piece, routed).replace(precision=precision, **tiles)


def _chosen_float32(piece: int, precision: str) -> Config:
    """The default for ssc of float32."""
    tiles = {"dgroup_BT": 16, "dgroup_BK": 32, "dgroup_num_stages": 1, "dstates_SEGMENTS": 2}
    return _float32(piece, True, precision).replace(formulation="grouped", **tiles)


def _little_shared(config: Config, problem: Problem, target: Target) -> bool:
    """AMD's 64 KiB do not hold wide rows that are loaded ahead."""
    small = config["dq_num_stages"] == config["dkv_num_stages"] == 1 and config.integer("dkv_BS") <= 64
    return target.kind == "cuda" or small or power(max(problem.Dk, problem.Dv)) < 128


def _waiting(config: Config, where: str) -> Config:
    """With gated rows that wait for their product there."""
    return config.replace(**{f"{'dgroup' if config['formulation'] == 'grouped' else 'dstates'}_OPERAND": where})


_LONG = "a tile longer than a piece computes rows that do not exist"
_BROAD = "a tile wider than a row computes columns that do not exist"

_PIECES = (256, 128, 64, 32, 16)
_PRECISIONS = ("tf32x3", "ieee")
_DEFAULTS = (
    # Lists of a larger top_k need more warps.
    *(
        _chosen(piece, *wide).replace(gates_num_warps=warps, precision=precision)
        for warps in (4, 8)
        for precision in _PRECISIONS
        for wide in ((128, 8), (64, 8), (64, 4), (32, 4))
        for piece in _PIECES
    ),
    # Many rows share one load of a state from L2.
    _WIDE.replace(
        **{"dq_BT": 256, "dq_BJ": 32, "dq_num_warps": 16, "dgates_BT": 64, "dgates_num_warps": 8},
        **{"dstates_SEGMENTS": 4, "dstates_num_warps": 16},
    ),
    *(_shorter(piece, routed) for routed in (True, False) for piece in _PIECES),
    *(_shorter(piece, True).replace(precision="ieee") for piece in _PIECES),
    # Wider rows.
    *(
        _shorter(piece, True).replace(dq_BT=min(piece, 64), dgates_num_warps=8, precision=precision)
        for piece in _PIECES
        for precision in _PRECISIONS
    ),
    *(_shorter(piece, False).replace(dq_BT=min(piece, 64)) for piece in (256, 128)),
)
_FLOAT32 = (
    *(_chosen_float32(piece, precision) for piece in (64, 32, 16) for precision in _PRECISIONS),
    *(
        _float32(piece, routed, precision)
        for routed in (True, False)
        for piece in (64, 32, 16)
        for precision in _PRECISIONS
    ),
)
_LITTLE_SHARED = {"dq_num_stages": 1, "dkv_num_stages": 1, "dkv_BS": 64}
_FEWER_ROWS = (
    # For products that take rows from registers.
    {"dkv_BJ": 64, "dkv_BT": 64, "dkv_BS": 64, "dkv_num_warps": 4},  # BS 128 spills 700 B by Triton 3.6
    {"dkv_BJ": 64, "dkv_BT": 64, "dkv_num_warps": 8},
    # For wider rows.
    {"dkv_BJ": 64, "dkv_BT": 32, "dkv_BS": 64, "dkv_num_warps": 8},
    {"dkv_BJ": 32, "dkv_BT": 32, "dkv_BS": 64, "dkv_num_warps": 4},
)

SPACE = SearchSpace(
    params=(
        Pow2("piece", 16, 512, "tokens that a segment is cut into; products inside a piece grow with its square"),
        Choice(
            "precision", ("ieee", "tf32x3"), "of float32 products: with 16-bit inputs, those of the gates' gradients"
        ),
        Choice(
            "saved",
            ("gates", "states", "nothing"),
            "what the forward keeps: states and logits (of ssc the choice and its order), states; the rest is computed "
            "again",
        ),
        Choice(
            "formulation",
            ("per_segment", "grouped"),
            "of what cached states were read for: by segment and token, or by the pairs of them that ssc chose",
        ),
        Pow2("states_BT", 16, 128, "tokens of a step of a state's sum"),
        Pow2("states_BK", 32, 128, "key columns of a state's tile"),
        Pow2("states_BV", 16, 128, "value columns of a state's tile"),
        Pow2("states_num_warps", 4, 8),
        Int("states_num_stages", (1, 2, 3, 4)),
        Pow2("gates_BT", 16, 128, "tokens of a tile of logits"),
        Pow2("gates_BN", 16, 64, "segments of a tile of logits"),
        Pow2("gates_num_warps", 2, 8),
        Int("gates_num_stages", (1, 2, 3)),
        Pow2("dq_BT", 16, 256, "tokens of a tile of dq, which share every state that they read"),
        Pow2("dq_BJ", 16, 128, "tokens of a step inside the piece"),
        Pow2("dq_BK", 16, 256, "key columns of a tile of dq"),
        Pow2("dq_num_warps", 4, 16),
        Int("dq_num_stages", (1, 2, 3, 4)),
        Pow2("dgates_BT", 16, 128, "tokens of a tile of du, and of a step of a mean key's gradient"),
        Pow2("dgates_BI", 16, 64, "segments of a tile of the gates' gradients"),
        Pow2("dgates_SPLITS", 1, 16, "programs that share a mean key's gradient"),
        Pow2("dgates_num_warps", 2, 8),
        Int("dgates_num_stages", (1, 2, 3)),
        Pow2("dstates_BT", 16, 128, "tokens of a step of the sum of a state's gradient"),
        Pow2("dstates_BK", 16, 128, "key columns of a tile of a state's gradient"),
        Pow2("dstates_BV", 16, 256, "value columns of a tile of a state's gradient"),
        Pow2("dstates_SEGMENTS", 1, 4, "states whose gradients share the rows that they read"),
        Choice("dstates_OPERAND", ("shared", "registers"), "where gated rows wait for their product"),
        Pow2("dstates_num_warps", 4, 16),
        Int("dstates_num_stages", (1, 2, 3, 4)),
        Pow2("dkv_BJ", 16, 128, "tokens of a tile of dk and dv"),
        Pow2("dkv_BT", 16, 128, "tokens of a step inside the piece"),
        Pow2("dkv_BS", 16, 256, "rows, and columns, of a state's gradient at a time"),
        Pow2("dkv_num_warps", 4, 8),
        Int("dkv_num_stages", (1, 2, 3, 4)),
        Pow2("dgroup_BT", 16, 128, "pairs of a step of the gradients of a state and of what read it"),
        Pow2("dgroup_BK", 16, 128, "key columns of a tile of the same"),
        Choice("dgroup_OPERAND", ("shared", "registers"), "the same of pairs"),
        Pow2("dgroup_num_warps", 4, 16),
        Int("dgroup_num_stages", (1, 2, 3, 4)),
    ),
    constraints=(
        Constraint(
            "piece", lambda c, p, t: c.integer("piece") <= longest(p), "no segment is longer than a shorter piece"
        ),
        Constraint(
            "precision",
            lambda c, p, t: c["precision"] == "ieee" or (t.kind == "cuda" and (p.dtype == "float32" or p.routed)),
            "only products of float32 on NVIDIA's GPUs have a choice of precision",
        ),
        Constraint(
            "saved",
            lambda c, p, t: c["saved"] == "nothing" or c.integer("piece") == longest(p),
            "the forward keeps the end states of segments, not those of shorter pieces",
        ),
        Constraint(
            "saved gates",
            _keeps_gates,
            "there are no gates to keep, or so many logits that they take more memory than q, k, v and u",
        ),
        Constraint(
            "formulation",
            lambda c, p, t: c["formulation"] == "per_segment" or p.reads.sparse,
            "only ssc chooses pairs of tokens and segments",
        ),
        unused("dgroup", _WIDE, _GROUP, lambda c, p: c["formulation"] == "grouped"),
        unused("dgates", _WIDE, ("BI", "SPLITS"), lambda c, p: c["formulation"] != "grouped"),
        unused("dstates", _WIDE, ("SEGMENTS",), lambda c, p: c["formulation"] != "grouped"),
        unused("gates", _WIDE, _GATES),
        unused("dgates", _WIDE, _DGATES),
        Constraint(
            "dstates_SEGMENTS",
            lambda c, p, t: p.routed or c["dstates_SEGMENTS"] == 1,
            "with equal gates a state's gradient is a sum of others",
        ),
        *(
            Constraint(name, lambda c, p, t, name=name: c.integer(name) <= c.integer("piece"), _LONG)
            for name in ("dq_BT", "dkv_BJ")
        ),
        *(
            at_most(name, _WIDE, lambda c, p: c.integer("piece"), _LONG)
            for name in ("states_BT", "gates_BT", "dq_BJ", "dgates_BT", "dkv_BT", "dstates_BT")
        ),
        *(at_most(name, _WIDE, lambda c, p: max(power(p.Dv), 32), _BROAD) for name in ("states_BV", "dstates_BV")),
        *(at_most(name, _WIDE, lambda c, p: max(power(p.Dk), 64), _BROAD) for name in ("states_BK", "dstates_BK")),
        at_most("dq_BK", _WIDE, lambda c, p: max(power(p.Dk), 32), _BROAD),
        at_most("dkv_BS", _WIDE, lambda c, p: max(power(max(p.Dk, p.Dv)), 32), _BROAD),
        Constraint("states registers", state_and_keys, "the sums of products, of a state and of its keys, would spill"),
        # dy and q stay in registers; where every state is read by itself, one read is added to the sum of the others.
        _accumulator(
            "dq",
            lambda c, p: (
                c.integer("dq_BT")
                * ((3 if _dense(c, p) else 1) * min(c.integer("dq_BK"), power(p.Dk)) + power(p.Dv) / 2)
            ),
        ),
        # A float32 product is three products of parts of its operands.
        _accumulator("dgates", lambda c, p: 4 * _rows(c) * power(p.Dk) if p.routed else 0),
        _accumulator(
            "dstates",
            lambda c, p: c.integer("dstates_SEGMENTS") * c.integer("dstates_BK") * c.integer("dstates_BV"),
            beside=32,
        ),
        _accumulator("dkv", lambda c, p: _both(c, p)),
        Constraint(
            "dkv_BS",
            lambda c, p, t: c.integer("dkv_BS") * power(max(p.Dk, p.Dv)) <= 16384,
            "more of a wide state exceeds shared memory",
        ),
        Constraint(
            "dkv rows",
            _rows_in_registers,
            "products take rows of k and v from registers, which would spill beside the accumulators",
        ),
        # A state's gradient, beside the read and its rows.
        _accumulator(
            "dgroup",
            lambda c, p: (
                c.integer("dgroup_BK") * (power(p.Dv) + c.integer("dgroup_BT")) if c["formulation"] == "grouped" else 0
            ),
            beside=32,
        ),
        Constraint("gates registers", lists, "the lists of the best logits would spill"),
        Constraint(
            "dgroup rows",
            lambda c, p, t: c["formulation"] != "grouped" or operands("dgroup", "BT", lambda p: p.Dv)(c, p, t),
            "float32 rows of dy would spill",
        ),
        *(
            Constraint(name, lambda c, p, t, name=name, most=most: c.integer(name) <= most or t.arch == "sm_90", MANY)
            for name, most in (("dq_num_warps", 8), ("dstates_num_warps", 8), ("dgroup_num_warps", 4))
        ),
        *(
            Constraint(
                name,
                lambda c, p, t, name=name, used=used: c[name] == "registers" or (used(c, p) and t.arch == "sm_90"),
                "only the products of sm_90 take either operand from shared memory, and only gated rows wait",
            )
            for name, used in (
                ("dstates_OPERAND", _dense),
                ("dgroup_OPERAND", lambda c, p: c["formulation"] == "grouped"),
            )
        ),
        Constraint("shared memory", _little_shared, "wide rows that are loaded ahead exceed 64 KiB"),
        Constraint("dq operands", operands("dq", "BT", lambda p: p.Dv), "float32 rows of dy would spill"),
        Constraint(
            "dkv operands", operands("dkv", "BJ", lambda p: max(p.Dk, p.Dv)), "float32 rows of k and v would spill"
        ),
        Constraint(
            "gates operands",
            lambda c, p, t: not p.routed or operands("gates", "BT", lambda p: p.Dk)(c, p, t),
            "float32 rows of u would spill",
        ),
    ),
    default=_waiting(_DEFAULTS[0], "shared"),
    # The same with nothing saved, for pieces shorter than segments.
    fallbacks=tuple(
        _waiting(config.replace(saved=saved, **{**shared, **rows}), operand)
        for operand, fewer in (("shared", ()), ("registers", _FEWER_ROWS))
        for saved in ("gates", "states", "nothing")
        for shared in ({}, *((_LITTLE_SHARED,) if fewer else ()))
        for rows in ({}, *fewer)
        for config in _DEFAULTS
    )
    + tuple(
        _waiting(config.replace(saved=saved), operand)
        for operand in ("shared", "registers")
        for saved in ("gates", "states", "nothing")
        for config in _FLOAT32
    ),
).chained(
    {
        "states": ("segment_states",),
        "gates": ("gates",),
        "dgroup": (
            "pair_order",
            "grouped_backward",
        ),
        "dq": ("read_backward",),
        "dgates": ("gates_backward",),
        "dstates": ("state_backward",),
        "dkv": ("write_backward",),
    },
)
