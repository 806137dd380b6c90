"""Search space of the forward pass of deep memories on a GPU: writes, gates and the read, searched together."""

from mctune.core.config import Config
from mctune.core.space import Choice, Constraint, Int, Pow2, SearchSpace

_WIDE = Config.of(
    {
        "precision": "ieee",
        "write_EB": 64,
        "write_num_warps": 4,
        "write_num_stages": 1,
        "gates_BT": 64,
        "gates_BN": 16,
        "gates_num_warps": 4,
        "gates_num_stages": 2,
        "read_BT": 128,
        "read_EB": 64,
        "read_num_warps": 8,
        "read_num_stages": 2,
    }
)

SPACE = SearchSpace(
    params=(
        Choice("precision", ("ieee", "tf32x3"), "of float32 products"),
        Pow2("write_EB", 16, 256, "hidden units of a program's state, or of a step over a lane's"),
        Pow2("write_num_warps", 4, 16),
        Int("write_num_stages", (1, 2, 3)),
        Pow2("gates_BT", 16, 128, "tokens of a tile of logits"),
        Pow2("gates_BN", 16, 64, "segments of a tile of logits"),
        Pow2("gates_num_warps", 2, 8),
        Int("gates_num_stages", (1, 2, 3)),
        Pow2("read_BT", 16, 256, "tokens of a tile, which share every state that they read"),
        Pow2("read_EB", 16, 128, "hidden units of a step"),
        Pow2("read_num_warps", 4, 16),
        Int("read_num_stages", (1, 2, 3, 4)),
    ),
    constraints=(
        Constraint(
            "precision",
            lambda c, p, t: c["precision"] == "ieee" or (p.dtype == "float32" and t.kind == "cuda"),
            "only products of float32 on NVIDIA's GPUs have a choice of precision",
        ),
    ),
    default=_WIDE,
    fallbacks=(),
)
