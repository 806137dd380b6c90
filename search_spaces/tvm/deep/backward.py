"""Search space of the backward pass of deep memories on a CPU."""

from mctune.core.config import Config
from mctune.core.space import Block, Choice, Constraint, Int, Pow2, SearchSpace

from ._rules import covers, divides, fits_registers

_WIDE = Config.of(
    {
        "walk_rows": 8,
        "walk_cols": 32,
        "unroll": 1,
        "chunk": 128,
        "rows": 8,
        "cols": 32,
        "groups": 1,
        "score_rows": 8,
        "score_lanes": 16,
        "saved": "states",
    }
)
_HALF = _WIDE.replace(walk_rows=4, walk_cols=16, unroll=4, rows=6, cols=16, score_rows=4)
# For short segments, narrow values, AVX2's 16 registers, and both.
_EACH = (_WIDE, _WIDE.replace(chunk=64), _WIDE.replace(chunk=32), _HALF.replace(chunk=32), _HALF.replace(chunk=16))

SPACE = SearchSpace(
    params=(
        Int("walk_rows", (1, 2, 4, 6, 8, 16), "tokens, or rows of a layer, of a tile of the writes' gradients"),
        Int("walk_cols", (16, 32, 48, 64), "columns of that tile"),
        Pow2("unroll", 1, 8, "unrolling of a tile's loop over a width"),
        Int("chunk", (16, 32, 48, 64, 96, 128, 256), "tokens whose reads of a state are taken together"),
        Int("rows", (2, 4, 6, 8, 16), "rows of a register tile of the reads' gradients"),
        Int("cols", (16, 32, 48, 64), "columns of that tile"),
        Pow2("groups", 1, 8, "groups of a head's states, each with its own part of dq"),
        Int("score_rows", (2, 4, 8), "segments of a tile of logits"),
        Int("score_lanes", (16, 32, 48, 64), "tokens of a tile of logits"),
        Choice("saved", ("states", "mixture", "nothing"), "what the forward keeps; what it does not is computed again"),
    ),
    constraints=(
        covers("walk_rows"),
        divides("walk_cols", "Dk", "Dv", "E"),
        fits_registers("walk_rows", "walk_cols"),
        covers("rows"),
        divides("cols", "Dk", "Dv", "E"),
        fits_registers("rows", "cols"),
        divides("score_lanes", "chunk"),
        fits_registers("score_rows", "score_lanes"),
        Constraint(
            "chunk",
            lambda c, p, t: c["chunk"] == 16 or p.segment_length is None or c.integer("chunk") <= p.segment_length,
            "a chunk longer than a segment computes rows that do not exist",
        ),
        Constraint(
            "groups",
            lambda c, p, t: c["groups"] == 1 or not p.reads.mixes_parameters,
            "where parameters are mixed, dq is not added up by state",
        ),
        Constraint(
            "saved",
            lambda c, p, t: c["saved"] == "nothing" or not (p.writes.momentum and p.state_init == "checkpoint"),
            "the writes are computed again for the momentum that enters segments, whatever is kept",
        ),
        Constraint(
            "saved",
            lambda c, p, t: c["saved"] != ("states" if p.reads.mixes_parameters else "mixture"),
            "a read of mixed parameters needs its mixture again, or all is computed again; any other has none",
        ),
    ),
    default=_WIDE,
    fallbacks=tuple(one.replace(saved=saved) for saved in ("states", "mixture", "nothing") for one in _EACH),
    # The mixture's backward, where parameters are mixed, walks as the writes do and reads as the reads do.
    blocks=(
        Block("writes", ("deep_write", "deep_mix_backward", "deep_write_backward"), ("walk_rows", "walk_cols")),
        Block("reads", ("deep_mix_backward", "deep_read_backward"), ("rows", "cols", "groups")),
        Block("gates", ("deep_gates",), ("score_rows", "score_lanes")),
    ),
)
