"""Search space of a decode step on a GPU by TVM: how a head's cached states are shared out."""

from mctune.core.config import Config
from mctune.core.space import Constraint, Pow2, SearchSpace

from .._rules import INSTRUCTION, INSTRUCTION_RULE, stored

_FIRST = Config.of({"instruction": "m16n8k8", "decode_splits": 8, "decode_BV": 32})

SPACE = SearchSpace(
    params=(
        INSTRUCTION,
        Pow2("decode_splits", 1, 64, "blocks that share the cached states of a head"),
        Pow2("decode_BV", 16, 128, "value columns of a block; its other threads have other rows of the state"),
    ),
    constraints=(
        INSTRUCTION_RULE,
        Constraint(
            "decode_BV",
            lambda c, p, t: c["decode_BV"] == 16 or c.integer("decode_BV") < 2 * stored(p.Dv),
            "threads would have no column",
        ),
        Constraint(
            "decode_splits",
            lambda c, p, t: c["decode_splits"] == 1 or c.integer("decode_splits") <= max(len(p.spans()), 1),
            "blocks would have no state to read",
        ),
    ),
    default=_FIRST,
    fallbacks=tuple(
        _FIRST.replace(instruction=name, decode_splits=splits, decode_BV=columns)
        for name in ("m16n8k8", "m16n8k16", "m8n8k4", "simt")
        for splits in (8, 1)
        for columns in (32, 16)
    ),
)
