"""Search space of the forward pass of deep memories on a GPU: writes, gates and the read, searched together."""

from collections.abc import Mapping, Sequence

from mctune.core.config import Config, Scalar
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint, Int, Pow2, SearchSpace
from mctune.core.target import Target

from .._rules import at_most, lists, longest, power, unused

_WIDE = Config.of(
    {
        "precision": "ieee",
        "write_FORM": "states",
        "write_READ": "tokens",
        "write_HELD": "nothing",
        "write_BJ": 32,
        "write_EB": 64,
        "write_num_warps": 4,
        "write_num_stages": 1,
        "rows_BT": 64,
        "rows_BJ": 64,
        "rows_EB": 64,
        "rows_num_warps": 4,
        "rows_num_stages": 2,
        "gates_BT": 64,
        "gates_BN": 16,
        "gates_num_warps": 4,
        "gates_num_stages": 2,
        "read_BT": 256,
        "read_EB": 64,
        "read_num_warps": 16,
        "read_num_stages": 2,
    }
)
_LONGEST_ROWS = 1024
"""Tokens of the longest segment that the launcher writes by rows."""
_ADDED = ("write_FORM", "write_HELD", "write_BJ", "rows_BT", "rows_BJ", "rows_EB", "rows_num_warps", "rows_num_stages")
_NO_UNITS = "a block wider than the memory computes units that do not exist"
_NO_ROWS = "a tile longer than a segment computes rows that do not exist"


def _rows(config: Config, problem: Problem) -> bool:
    return config["write_FORM"] == "rows"


def _by_rows(config: Config, problem: Problem, target: Target) -> bool:
    """Rows stand for states where these start afresh, and errors take all hidden units."""
    if not _rows(config, problem):
        return True
    independent = problem.writes.momentum and problem.state_init == "independent"
    return independent and (problem.segment_length or problem.T) <= _LONGEST_ROWS


def _states(config: Config, problem: Problem, target: Target) -> bool:
    """A block of both layers in a quarter of a thread's registers, momentum's and float32's operands beside it; in half
    of them where products leave their other operands in shared memory. By rows, a chunk's hidden
    units in three eighths."""
    if _rows(config, problem):
        rows, threads = power(problem.inner_chunk or 1), 32 * config.integer("write_num_warps")
        return rows * (power(problem.E) + power(problem.Dv)) <= 96 * threads
    floats = config.integer("write_EB") * (power(problem.Dk) + power(problem.Dv))
    threads = (32 if target.kind == "cuda" else 64) * config.integer("write_num_warps")
    if problem.writes.momentum or problem.dtype == "float32":
        return 2 * floats <= 64 * threads
    return floats <= (128 if target.products_in_flight else 64) * threads


def _tile(config: Config, problem: Problem, target: Target) -> bool:
    """Hidden units of a tile, in half of a thread's registers; the shortest tile is always there."""
    units = config.integer("rows_BT") * power(problem.E)
    return not _rows(config, problem) or units <= 128 * 32 * config.integer("rows_num_warps")


def _shared(config: Config, problem: Problem, target: Target) -> bool:
    """Layers that are held, blocks of the others, and rows with those that are loaded ahead."""
    if not _rows(config, problem):
        return True
    Dk, Dv, E, item = power(problem.Dk), power(problem.Dv), power(problem.E), 4 if problem.dtype == "float32" else 2
    held = {"nothing": 0, "down": Dv, "both": Dk + Dv}[str(config["write_HELD"])] * E
    ahead = config.integer("write_num_stages") * config.integer("write_BJ") * E
    write = held + config.integer("write_EB") * max(Dk, Dv) + ahead
    ahead = config.integer("rows_num_stages") * config.integer("rows_BJ") * E
    read = config.integer("rows_BT") * E + config.integer("rows_EB") * max(Dk, Dv) + ahead
    return item * max(1.25 * write, 1.7 * read) <= target.shared_bytes


def _sums(config: Config, problem: Problem, target: Target) -> bool:
    """The sum of a tile's reads and a block of its hidden units: in half of a thread's registers, of which many warps
    leave each other fewer."""
    floats = config.integer("read_BT") * (power(problem.Dv) + config.integer("read_EB"))
    return floats <= min(128 * 32 * config.integer("read_num_warps"), 65536 // 2)


def _queries(config: Config, problem: Problem, target: Target) -> bool:
    """float32 rows are operands of products too, and so are hidden units, which takes most of the registers."""
    rows = config.integer("read_BT") * power(problem.Dk)
    return problem.dtype != "float32" or config["read_BT"] == 16 or rows <= 128 * config.integer("read_num_warps")


def _logits(config: Config, problem: Problem, target: Target) -> bool:
    rows = config.integer("gates_BT") * power(problem.Dk)
    return not _wide(problem) or config["gates_BT"] == 16 or rows <= 512 * config.integer("gates_num_warps")


def _wide(problem: Problem) -> bool:
    return problem.dtype == "float32" and problem.routed


_ROW_WRITES = tuple(
    {"write_FORM": "rows"}
    | dict(zip(("write_HELD", "write_BJ", "write_EB", "write_num_warps"), write, strict=True))
    | dict(zip(("rows_BT", "rows_BJ", "rows_EB", "rows_num_warps", "rows_num_stages"), rows, strict=True))
    for write, rows in (
        (("down", 32, 256, 4), (128, 32, 256, 8, 2)),
        (("nothing", 32, 128, 8), (128, 32, 256, 8, 2)),
        (("nothing", 32, 64, 4), (64, 32, 64, 8, 2)),
        (("nothing", 32, 128, 8), (64, 32, 128, 8, 1)),
        (("nothing", 16, 64, 8), (32, 16, 64, 8, 1)),
    )
)
"""Of titans' short segments, which start afresh: narrower for wider heads, and where there is less shared memory."""
_WRITES = tuple(
    dict(zip(("write_EB", "write_num_warps"), write, strict=True))
    for write in ((64, 4), (32, 4), (32, 8), (16, 8), (16, 16))
)
"""Hidden units and warps of a program: narrower for wider heads."""
_WIDER = ({"write_EB": 64, "write_num_warps": 8}, *_WRITES)
"""The same where heads are too wide for four warps to read; with four, states of 64 hidden units leave registers."""
_READS = ((256, 64, 16), (128, 64, 4), (128, 64, 8), (64, 64, 4), (64, 64, 8))
_SHORT = ((32, 64, 4), (32, 32, 4), (16, 64, 4), (16, 32, 4))
"""Tokens, hidden units and warps: fewer tokens for wider heads, and for short segments."""
_EIGHT = _READS[2]
_COLUMNS = _READS[1]
"""Where heads are narrow, and products not those of sm_90."""


def _default(write: Mapping[str, Scalar], read: tuple[int, int, int], tile: int, warps: int, precision: str) -> Config:
    """Blocks of writes and of the read, tokens and warps of a tile of logits."""
    return _WIDE.replace(
        precision=precision, read_BT=read[0], read_EB=read[1], read_num_warps=read[2], gates_BT=tile,
        gates_num_warps=warps, **write,
    )  # fmt: skip


def _defaults(reads: Sequence[tuple[int, int, int]]) -> tuple[Config, ...]:
    return tuple(
        _default(write, read, 64, warps, "ieee").replace(read_num_stages=stages, write_READ=order)
        for stages in (2, 1)
        for warps in (4, 8)  # longer lists of the best logits take more
        for read in reads
        for order in (("columns", "tokens") if read == _COLUMNS else ("tokens",))
        for write in (*_ROW_WRITES, *(_WIDER if read == _EIGHT else _WRITES))
    )


def _float32(precision: str) -> tuple[Config, ...]:
    return tuple(
        _default(write, (16, 32, 4), tile, warps, precision).replace(read_num_stages=1)
        for tile, warps in ((16, 8), (64, 4))  # the second where there are no gates
        for write in _WRITES[2:]
    )


SPACE = SearchSpace(
    params=(
        Choice("precision", ("ieee", "tf32x3"), "of float32 products"),
        Choice("write_FORM", ("states", "rows"), "what a segment's tokens leave: one state, or their rows"),
        Choice("write_READ", ("tokens", "columns"), "rows of the online read's product with the second layer"),
        Choice("write_HELD", ("nothing", "down", "both"), "first layers that stay in shared memory"),
        Pow2("write_BJ", 16, 128, "earlier rows of a step"),
        Pow2("write_EB", 16, 256, "hidden units that a program owns, or a step of one that owns a lane"),
        Pow2("write_num_warps", 4, 16),
        Int("write_num_stages", (1, 2, 3)),
        Pow2("rows_BT", 16, 128, "tokens of a tile of the online reads"),
        Pow2("rows_BJ", 16, 128, "rows of a step"),
        Pow2("rows_EB", 16, 256, "hidden units of a program, or of a step"),
        Pow2("rows_num_warps", 2, 8),
        Int("rows_num_stages", (1, 2, 3)),
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
        Constraint(
            "write_READ",
            lambda c, p, t: (
                c["write_READ"] == _WIDE["write_READ"] or not (p.writes.momentum or p.reads.mixes_parameters)
            ),
            "the second layer is read by another kernel, or in blocks",
        ),
        Constraint(
            "write_FORM", _by_rows, "rows are of segments of at most 1024 tokens that start afresh, and of titans"
        ),
        *(
            Constraint(name, lambda c, p, t, name=name: _rows(c, p) or c[name] == _WIDE[name], "no rows are read")
            for name in ("write_HELD", "write_BJ")
        ),
        unused("rows", _WIDE, ("BT", "BJ", "EB", "num_warps", "num_stages"), _rows),
        unused("gates", _WIDE, ("BT", "BN", "num_warps", "num_stages")),
        *(at_most(name, _WIDE, lambda c, p: power(p.E), _NO_UNITS) for name in ("write_EB", "rows_EB", "read_EB")),
        *(at_most(name, _WIDE, lambda c, p: longest(p), _NO_ROWS) for name in ("rows_BT", "gates_BT")),
        Constraint("read_BT", lambda c, p, t: c.integer("read_BT") <= longest(p), _NO_ROWS),
        Constraint("write registers", _states, "the states alone would spill"),
        Constraint("rows registers", _tile, "the hidden units of a tile would spill"),
        Constraint("rows shared memory", _shared, "a multiprocessor does not hold so much of layers and rows"),
        Constraint("read registers", _sums, "the accumulators alone would spill"),
        Constraint("read operands", _queries, "float32 rows of q would spill"),
        Constraint("gates operands", _logits, "float32 rows of u would spill"),
        Constraint("gates registers", lists, "the lists of the best logits would spill"),
        Constraint(
            "read_num_warps",
            lambda c, p, t: c.integer("read_num_warps") <= 8 or t.arch == "sm_90",
            "only the products of sm_90 spread over so many warps",
        ),
        Constraint(
            "read_num_stages",
            lambda c, p, t: t.kind == "cuda" or c["read_num_stages"] == 1 or power(max(p.Dk, p.Dv)) <= 128,
            "AMD's 64 KiB of shared memory do not hold wide states that are loaded ahead",
        ),
        Constraint(
            "write_num_stages",
            lambda c, p, t: t.kind == "cuda" or c["write_num_stages"] == 1,
            "Triton cannot compile rows of a chunk that are loaded ahead for AMD",
        ),
    ),
    default=_defaults(_READS)[0],
    fallbacks=tuple(
        dict.fromkeys((*_defaults(_READS)[1:], *_float32("tf32x3"), *_defaults(_SHORT), *_float32("ieee")))
    ),
    before=Config.of({name: _WIDE[name] for name in _ADDED}),
).chained(
    {
        "write": (
            "deep_write",
            "deep_write_lanes",
            "deep_write_rows",
        ),
        "rows": (
            "deep_rows",
            "deep_row_output",
        ),
        "gates": ("gates",),
        "read": (
            "deep_read",
            "deep_mix",
        ),
    },
    shared=("write_FORM",),
)
