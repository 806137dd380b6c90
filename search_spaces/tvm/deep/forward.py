"""Search space of the forward pass of deep memories on a CPU: ``deep_write`` and ``deep_read``."""

from mctune.core.config import Config
from mctune.core.space import Block, Constraint, Int, Pow2, SearchSpace

from ._rules import covers, divides, fits_registers

_WIDE = Config.of(
    {
        "walk_rows": 8,
        "walk_cols": 32,
        "unroll": 1,
        "chunk": 64,
        "block": 64,
        "hid_rows": 8,
        "hid_lanes": 32,
        "rows": 8,
        "cols": 32,
        "score_rows": 8,
        "score_lanes": 16,
    }
)
_HALF = _WIDE.replace(
    walk_rows=6, walk_cols=16, unroll=4, chunk=96, block=32, hid_rows=6, hid_lanes=16, rows=6, cols=16, score_rows=4
)

SPACE = SearchSpace(
    params=(
        Int("walk_rows", (1, 2, 4, 6, 8, 16), "tokens, or rows of a layer, of a register tile of the writes"),
        Int("walk_cols", (16, 32, 48, 64), "columns of a register tile of the writes"),
        Pow2("unroll", 1, 8, "unrolling of a tile's loop over a width"),
        Int("chunk", (16, 32, 48, 64, 96, 128, 256), "tokens that go through the cached states together"),
        Int("block", (16, 32, 64, 128, 256), "hidden units that are held between the two products of a read"),
        Int("hid_rows", (2, 4, 6, 8, 16), "hidden units of a register tile of the first product of a read"),
        Int("hid_lanes", (16, 32, 48, 64), "tokens of that tile"),
        Int("rows", (2, 4, 6, 8, 12, 16), "tokens of a register tile of the second product"),
        Int("cols", (16, 32, 48, 64), "value columns of that tile"),
        Int("score_rows", (2, 4, 8), "segments of a tile of logits"),
        Int("score_lanes", (16, 32, 48, 64), "tokens of a tile of logits"),
    ),
    constraints=(
        covers("walk_rows"),
        divides("walk_cols", "Dv", "E"),
        fits_registers("walk_rows", "walk_cols"),
        divides("block", "E"),
        covers("hid_rows"),
        divides("hid_lanes", "chunk"),
        fits_registers("hid_rows", "hid_lanes"),
        covers("rows", "chunk"),
        divides("cols", "Dv", "E"),
        fits_registers("rows", "cols"),
        divides("score_lanes", "chunk"),
        fits_registers("score_rows", "score_lanes"),
        Constraint(
            "chunk",
            lambda c, p, t: c["chunk"] == 16 or p.segment_length is None or c.integer("chunk") <= p.segment_length,
            "a chunk longer than a segment computes rows that do not exist",
        ),
        Constraint(
            "mixed",
            lambda c, p, t: not p.reads.mixes_parameters or (c["block"] == 16 and c["hid_rows"] == 2),
            "where parameters are mixed, hidden units are not taken in blocks",
        ),
    ),
    default=_WIDE,
    # For short segments, narrow values, AVX2's 16 registers; where parameters are mixed.
    fallbacks=tuple(
        one.replace(**more)
        for one in (
            _WIDE,
            _WIDE.replace(chunk=32, block=32),
            _HALF,
            _HALF.replace(chunk=48),
            _HALF.replace(chunk=32),
            _HALF.replace(chunk=16, block=16),
        )
        for more in ({}, {"block": 16, "hid_rows": 2})
    ),
    # Where parameters are mixed, a read walks as the writes do.
    blocks=(
        Block(
            "read",
            ("deep_read",),
            ("chunk", "block", "hid_rows", "hid_lanes", "rows", "cols", "score_rows", "score_lanes"),
        ),
        Block("write", ("deep_write", "deep_read"), ("walk_rows", "walk_cols")),
    ),
)
