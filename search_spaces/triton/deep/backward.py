"""Search space of the backward pass of deep memories on a GPU: the writes again, reads, gates, states, writes."""

from collections.abc import Callable

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target

from .._rules import lists, power, unused


def _layers(problem: Problem) -> int:
    """Elements of a hidden unit, of both layers."""
    return power(problem.Dk) + power(problem.Dv)


def _units(name: str) -> Constraint:
    """Blocks are no wider than the hidden units."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        return config.integer(name) <= power(problem.E)

    return Constraint(name, holds, "a block wider than the hidden units computes columns that do not exist")


def _fits(prefix: str, elements: Callable[[Config, Problem], int], registers: int) -> Constraint:
    """What a program holds, in so many registers a thread; the narrowest blocks are always there."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        if config[f"{prefix}_EB"] == 16 and (f"{prefix}_BT" not in config or config[f"{prefix}_BT"] == 16):
            return True
        # Operands of float32 products are in registers too.
        wide = 4 if problem.dtype == "float32" else 1
        return wide * elements(config, problem) <= registers * 32 * config.integer(f"{prefix}_num_warps")

    return Constraint(f"{prefix} registers", holds, "the states, or the sums of products, would spill")


def _momentum(problem: Problem) -> int:
    return 2 if problem.writes.momentum else 1


def _little_shared(config: Config, problem: Problem, target: Target) -> bool:
    """AMD's 64 KiB do not hold wide rows that are loaded ahead."""
    small = config["dq_num_stages"] == config["dstates_num_stages"] == 1
    return target.kind == "cuda" or (small and config.integer("dstates_BT") <= 64 and config.integer("dq_EB") <= 32)


def _logits(config: Config, problem: Problem, target: Target) -> bool:
    """float32 rows of u are operands of products, and lists of the best logits grow with top_k."""
    rows = config.integer("gates_BT") * power(problem.Dk)
    if problem.routed and problem.dtype == "float32" and config["gates_BT"] != 16:
        if rows > 256 * config.integer("gates_num_warps"):
            return False
    return lists(config, problem, target)


def _connectors(config: Config, problem: Problem, target: Target) -> bool:
    """A float32 product is three products of parts of its operands."""
    rows = max(config.integer("dgates_BT"), config.integer("dgates_BI"))
    return not problem.routed or rows == 16 or 4 * rows * power(problem.Dk) <= 4096 * config.integer("dgates_num_warps")


_WIDE = Config.of(
    {
        "precision": "ieee",
        "saved": "states",
        "replay_EB": 64,
        "replay_num_warps": 4,
        "replay_num_stages": 1,
        "online_EB": 64,
        "online_num_warps": 4,
        "online_num_stages": 1,
        "gates_BT": 64,
        "gates_BN": 16,
        "gates_num_warps": 4,
        "gates_num_stages": 2,
        "dq_BT": 128,
        "dq_EB": 64,
        "dq_num_warps": 8,
        "dq_num_stages": 2,
        "dgates_BT": 32,
        "dgates_BI": 16,
        "dgates_SPLITS": 4,
        "dgates_num_warps": 4,
        "dgates_num_stages": 2,
        "dstates_BT": 128,
        "dstates_EB": 64,
        "dstates_num_warps": 8,
        "dstates_num_stages": 2,
        "dkv_EB": 32,
        "dkv_num_warps": 4,
        "dkv_num_stages": 1,
    }
)
_UNITS = ("replay_EB", "online_EB", "dq_BT", "dq_EB", "dstates_BT", "dstates_EB", "dkv_EB")
_TIERS = (
    # For wider and wider heads, momentum, and float32.
    ((64, 64, 128, 64, 128, 64, 32), 8, 4),
    ((32, 64, 128, 64, 128, 64, 32), 8, 8),
    ((32, 32, 64, 64, 64, 64, 16), 8, 4),
    ((32, 32, 64, 32, 64, 32, 16), 8, 8),
    ((16, 32, 64, 32, 64, 32, 16), 8, 8),
    ((16, 16, 32, 32, 32, 32, 16), 8, 8),
    ((16, 16, 16, 32, 16, 32, 16), 8, 8),
    ((16, 16, 16, 16, 16, 16, 16), 8, 8),
)
"""Blocks, and warps of the cached reads' kernels and of the others."""


def _default(tier: tuple[tuple[int, ...], int, int], saved: str, stages: int, tile: int, warps: int) -> Config:
    units, reads, writes = tier
    return _WIDE.replace(
        **dict(zip(_UNITS, units, strict=True)), dq_num_warps=reads, dstates_num_warps=reads, replay_num_warps=writes,
        online_num_warps=writes, dkv_num_warps=writes, saved=saved, dq_num_stages=stages, dstates_num_stages=stages,
        gates_BT=tile, gates_num_warps=warps, dgates_BT=16 if tile == 16 else 32, dgates_num_warps=warps,
    )  # fmt: skip


SPACE = SearchSpace(
    params=(
        Choice(
            "precision", ("ieee", "tf32x3"), "of float32 products: with 16-bit inputs, those of the gates' gradients"
        ),
        Choice("saved", ("states", "nothing"), "what the forward keeps: end states of segments; else computed again"),
        Pow2("replay_EB", 16, 256, "hidden units of a step over a lane's states"),
        Pow2("replay_num_warps", 4, 8),
        Int("replay_num_stages", (1, 2, 3)),
        Pow2("online_EB", 16, 128, "hidden units of a program's online read"),
        Pow2("online_num_warps", 4, 8),
        Int("online_num_stages", (1, 2)),
        Pow2("gates_BT", 16, 128, "tokens of a tile of logits"),
        Pow2("gates_BN", 16, 64, "segments of a tile of logits"),
        Pow2("gates_num_warps", 2, 8),
        Int("gates_num_stages", (1, 2, 3)),
        Pow2("dq_BT", 16, 128, "tokens of a tile of dq, which share every state that they read"),
        Pow2("dq_EB", 16, 128, "hidden units of a step of dq"),
        Pow2("dq_num_warps", 4, 8),
        Int("dq_num_stages", (1, 2, 3)),
        Pow2("dgates_BT", 16, 128, "tokens of a tile of du, and of a step of a mean key's gradient"),
        Pow2("dgates_BI", 16, 64, "segments of a tile of the gates' gradients"),
        Pow2("dgates_SPLITS", 1, 16, "programs that share a mean key's gradient"),
        Pow2("dgates_num_warps", 2, 8),
        Int("dgates_num_stages", (1, 2, 3)),
        Pow2("dstates_BT", 16, 128, "tokens of a step of a state's gradient"),
        Pow2("dstates_EB", 16, 128, "hidden units of a program's part of a state's gradient"),
        Pow2("dstates_num_warps", 4, 8),
        Int("dstates_num_stages", (1, 2, 3)),
        Pow2("dkv_EB", 16, 64, "hidden units of a step of the walk back"),
        Pow2("dkv_num_warps", 4, 8),
        Int("dkv_num_stages", (1, 2)),
    ),
    constraints=(
        Constraint(
            "precision",
            lambda c, p, t: c["precision"] == "ieee" or (t.kind == "cuda" and (p.dtype == "float32" or p.routed)),
            "only products of float32 on NVIDIA's GPUs have a choice of precision",
        ),
        Constraint(
            "saved",
            lambda c, p, t: c["saved"] == "nothing" or p.segmentation != "logarithmic",
            "end states of logarithmic segments are not kept",
        ),
        unused("gates", _WIDE, ("BT", "BN", "num_warps", "num_stages")),
        unused("dgates", _WIDE, ("BT", "BI", "SPLITS", "num_warps", "num_stages")),
        *(_units(name) for name in ("replay_EB", "online_EB", "dq_EB", "dstates_EB", "dkv_EB")),
        _fits("replay", lambda c, p: _momentum(p) * c.integer("replay_EB") * _layers(p), 64),
        _fits("online", lambda c, p: _momentum(p) * c.integer("online_EB") * _layers(p), 128),
        _fits("dq", lambda c, p: c.integer("dq_BT") * (power(p.Dk) + 2 * c.integer("dq_EB")), 128),
        _fits("dstates", lambda c, p: c.integer("dstates_EB") * (_layers(p) + 2 * c.integer("dstates_BT")), 128),
        _fits("dkv", lambda c, p: _momentum(p) * c.integer("dkv_EB") * _layers(p), 32),
        Constraint("gates registers", _logits, "rows of u, or lists of the best logits, would spill"),
        Constraint("dgates registers", _connectors, "the sums of products would spill"),
        Constraint("shared memory", _little_shared, "wide rows that are loaded ahead exceed 64 KiB"),
    ),
    default=_WIDE,
    fallbacks=tuple(
        _default(tier, saved, stages, tile, warps)
        for saved in ("states", "nothing")
        for stages in (2, 1)
        for tier in _TIERS
        for tile, warps in ((64, 4), (64, 8), (16, 8))
    ),
).chained(
    {
        "replay": ("deep_replay",),
        "gates": ("gates",),
        "online": ("deep_online_backward",),
        "dq": ("deep_read_backward",),
        "dgates": ("gates_backward",),
        "dstates": ("deep_state_backward",),
        "dkv": ("deep_write_backward",),
    },
)
