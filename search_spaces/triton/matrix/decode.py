"""Search space of a decode step on a GPU: how a head's cached states are shared out, and how a share is read."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target

from .._rules import power


def _online_fits(config: Config, problem: Problem, target: Target) -> bool:
    """A block of the online state's columns stays in registers; a single program has them all."""
    columns = power(problem.Dv)
    if config.integer("decode_SPLITS") > 1:
        columns = min(columns, config.integer("decode_BO"))
    return power(problem.Dk) * columns <= 64 * 32 * config.integer("decode_num_warps")


_WIDE = Config.of(
    {
        "decode_SPLITS": 16,
        "decode_BK": 32,
        "decode_BV": 128,
        "decode_BO": 16,
        "decode_TOKENS": 8,
        "decode_NEAR": 64,
        "decode_STAGES": 2,
        "decode_num_warps": 4,
    }
)

SPACE = SearchSpace(
    params=(
        Pow2("decode_SPLITS", 1, 64, "programs that share the cached states of a head; 1: one does everything"),
        Pow2("decode_BK", 8, 64, "rows of a cached state's tile"),
        Pow2("decode_BV", 16, 256, "columns of a cached state's tile"),
        Pow2("decode_BO", 16, 128, "columns of the online state that a program writes"),
        Int("decode_TOKENS", (1, 4, 8), "tokens of a launch, which read the states once"),
        Int("decode_NEAR", (0, 64, 256), "ssc: cached states up to which every program computes all logits itself"),
        Int("decode_STAGES", (1, 2, 3, 4), "tiles of a cached state that are fetched ahead"),
        Pow2("decode_num_warps", 1, 8),
    ),
    constraints=(
        Constraint(
            "decode_SPLITS",
            lambda c, p, t: p.top_k is None or c.integer("decode_SPLITS") <= max(2, 1 << (p.top_k - 1).bit_length()),
            "programs that share top_k states among more of them have none to read",
        ),
        Constraint(
            "decode_BV",
            lambda c, p, t: c.integer("decode_BV") <= power(p.Dv) or c["decode_BV"] == _WIDE["decode_BV"],
            "a tile wider than the values reads columns that do not exist",
        ),
        Constraint(
            "decode_BO",
            lambda c, p, t: c.integer("decode_BO") <= power(p.Dv),
            "a tile wider than the values writes columns that do not exist",
        ),
        Constraint(
            "decode_NEAR",
            lambda c, p, t: p.reads.sparse or c["decode_NEAR"] == _WIDE["decode_NEAR"],
            "only ssc compares all logits",
        ),
        Constraint(
            "decode_TOKENS",
            lambda c, p, t: not p.reads.sparse or c["decode_SPLITS"] != 1 or c["decode_TOKENS"] == 1,
            "under ssc tokens choose different states: a program alone takes one token",
        ),
        Constraint(
            "cached registers",
            lambda c, p, t: (
                c.integer("decode_BK") * min(c.integer("decode_BV"), power(p.Dv))
                <= 64 * 32 * c.integer("decode_num_warps")
            ),
            "a tile of a cached state would spill",
        ),
        Constraint("online registers", _online_fits, "the online state would spill"),
    ),
    default=_WIDE,
    # For fewer states, and for wide keys.
    fallbacks=tuple(
        _WIDE.replace(decode_SPLITS=splits, decode_num_warps=warps) for splits in (16, 8, 4, 2) for warps in (4, 8)
    ),
)
