"""Search space of the backward pass of deep memories on a GPU: the writes again, reads, gates, states, writes."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target


def _unused(prefix: str, names: tuple[str, ...]) -> Constraint:
    """Parameters of the gates' operations keep one value where gates are equal."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        return problem.routed or all(config[f"{prefix}_{name}"] == _WIDE[f"{prefix}_{name}"] for name in names)

    return Constraint(f"{prefix}_*", holds, f"there is no {prefix} kernel to tune")


def _units(name: str) -> Constraint:
    """Blocks are no wider than the hidden units, but for the narrowest."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        return config.integer(name) <= max(16, 1 << (problem.E - 1).bit_length())

    return Constraint(name, holds, "a block wider than the hidden units computes columns that do not exist")


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
        "dq_BT": 64,
        "dq_EB": 32,
        "dq_num_warps": 4,
        "dq_num_stages": 2,
        "dgates_BT": 32,
        "dgates_BI": 16,
        "dgates_SPLITS": 4,
        "dgates_num_warps": 4,
        "dgates_num_stages": 2,
        "dstates_BT": 64,
        "dstates_EB": 32,
        "dstates_num_warps": 4,
        "dstates_num_stages": 2,
        "dkv_EB": 32,
        "dkv_num_warps": 4,
        "dkv_num_stages": 1,
    }
)
_NARROW = {"replay_EB": 32, "online_EB": 32, "dq_BT": 32, "dq_EB": 16, "dstates_BT": 32, "dstates_EB": 16, "dkv_EB": 16}

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
        _unused("gates", ("BT", "BN", "num_warps", "num_stages")),
        _unused("dgates", ("BT", "BI", "SPLITS", "num_warps", "num_stages")),
        *(_units(name) for name in ("replay_EB", "online_EB", "dq_EB", "dstates_EB", "dkv_EB")),
    ),
    default=_WIDE,
    fallbacks=tuple(
        config.replace(saved=saved)
        for saved in ("states", "nothing")
        for config in (_WIDE, _WIDE.replace(**_NARROW), _WIDE.replace(**{**_NARROW, "replay_EB": 16, "online_EB": 16}))
    ),
)
