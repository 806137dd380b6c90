"""Search space of a decode step of deep memories on a GPU: how a head's states are shared out and read."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target

from .._rules import power


def _fits(config: Config, problem: Problem, target: Target) -> bool:
    """Of the online state four blocks of a layer are held at once: its own, the start, the momentum and the write."""
    widest = power(max(problem.Dk, problem.Dv))
    return config.integer("decode_EB") == 16 or 4 * widest * config.integer("decode_EB") <= 128 * 32 * config.integer(
        "decode_num_warps"
    )


_WIDE = Config.of({"decode_SPLITS": 16, "decode_EB": 32, "decode_STAGES": 2, "decode_num_warps": 4})

SPACE = SearchSpace(
    params=(
        Pow2("decode_SPLITS", 1, 64, "programs that share the cached states of a head"),
        Pow2("decode_EB", 16, 256, "hidden units of a program's online state, and of a step over a cached one"),
        Int("decode_STAGES", (1, 2, 3, 4), "blocks of a cached state that are fetched ahead"),
        Pow2("decode_num_warps", 1, 8),
    ),
    constraints=(
        Constraint(
            "decode_SPLITS",
            lambda c, p, t: p.top_k is None or c.integer("decode_SPLITS") <= max(2, 1 << (p.top_k - 1).bit_length()),
            "programs that share top_k states among more of them have none to read",
        ),
        Constraint(
            "decode_EB",
            lambda c, p, t: c.integer("decode_EB") <= power(p.E),
            "a block wider than the hidden units reads columns that do not exist",
        ),
        Constraint("online registers", _fits, "the online state would spill"),
    ),
    default=_WIDE,
    # For fewer states, and for wide keys.
    fallbacks=tuple(
        _WIDE.replace(decode_SPLITS=splits, decode_EB=units, decode_num_warps=warps)
        for splits in (16, 8, 4, 2)
        for units in (32, 16)
        for warps in (4, 8)
    ),
)
