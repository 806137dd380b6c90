"""The JSON of flash-linear-attention's benchmark runner (``benchmarks/ops/run.py --json``), written and read.

``machine_info``, and ``results``: ``op``, ``mode`` (``fwd``, or ``fwdbwd`` for a training step), B, T, H, D, and the
median, 20th and 80th percentile in milliseconds. Its comparison knows a result by all but the times, so what else is
of a problem stands in the name of the op. What there is no field for stands under ``mctune``, which it passes over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mctune.core.errors import UsageError
from mctune.core.problem import Problem
from mctune.report.rows import Row, sort_key
from mctune.report.write import Document

SHAPES = frozenset({
    (1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (4, 4096, 64, 128), (8, 2048, 32, 256),
    (8, 1024, 8, 64),
})  # fmt: skip
"""(B, T, H, D) that the runner takes by default; it takes others with ``--custom-shapes``."""
STEP = " step"
"""At the end of the backend of a row that is a training step."""
_THEIRS = "fla "
"""Before the names of flash-linear-attention's own operations where they are baselines."""
_MODES = ("fwd", "fwdbwd")
_ABSENT = "N/A"


@dataclass(frozen=True)
class Result:
    """A result of the runner; times are in milliseconds, percentiles ``None`` where only the median is known."""

    op: str
    mode: str
    B: int
    T: int
    H: int
    D: int
    median_ms: float
    p20_ms: float | None = None
    p80_ms: float | None = None

    @property
    def standard(self) -> bool:
        """Whether the runner takes this shape by default."""
        return (self.B, self.T, self.H, self.D) in SHAPES


def to_fla(document: Document, note: Callable[[str], None]) -> dict[str, Any]:
    """The runner's document of one target's rows; ``note`` is told what is left out, a line for each reason."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    left: dict[str, int] = {}
    for row in sorted(document.rows, key=lambda row: (sort_key(row), row.config.to_json())):
        reason = _left_out(row)
        if not reason:
            made = _result(row) | {"mctune": row.to_dict()}
            if found.setdefault(_key(made), made) is not made:
                reason = "a faster one has the same op, mode and shape"
        if reason:
            left[reason] = left.get(reason, 0) + 1
    for row in document.rows:
        for made in _baselines(row) if not _left_out(row) else ():
            known = found.setdefault(_key(made), made)
            known["median_ms"] = min(known["median_ms"], made["median_ms"])
    for reason, count in left.items():
        note(f"{document.environment['target']['name']}: {count} of {len(document.rows)} rows left out: {reason}")
    return {"machine_info": _machine(document.environment), "results": list(found.values())}


def _key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the runner's comparison knows a result by."""
    return tuple(result[name] for name in ("op", "mode", "B", "T", "H", "D"))


def _left_out(row: Row) -> str:
    """Why the runner's document has no place for a row; empty if it has."""
    p = row.problem
    if row.how != "measured":
        return "their times are predicted, and the format has measured ones alone"
    if p.pass_ == "decode" or (p.pass_ == "backward" and not row.backend.endswith(STEP)):
        return "the format has forwards and training steps, no decode steps and no backward kernels alone"
    if p.Dk != p.Dv:
        return "the format has one width, D, and theirs are two"
    return ""


def _result(row: Row) -> dict[str, Any]:
    p = row.problem
    sizes = [f"c{p.segment_length}"] if p.segment_length else []
    sizes += [f"top{p.top_k}"] if p.top_k else []
    sizes += [f"e{p.E}", f"b{p.inner_chunk}"] if p.deep else []
    words = ("mctune", p.recurrence, p.aggregation, p.segmentation, p.state_init, *sizes, p.dtype)
    op = "_".join((*words, row.backend.removesuffix(STEP)))
    times = {"median_ms": row.ms, "p20_ms": row.low, "p80_ms": row.high}
    return {"op": op, **_where(p), **times}


def _where(problem: Problem) -> dict[str, Any]:
    mode = _MODES[problem.pass_ == "backward"]
    return {"mode": mode, "B": problem.B, "T": problem.T, "H": problem.H, "D": problem.Dk}


def _baselines(row: Row) -> list[dict[str, Any]]:
    """Their own operations that were timed beside a row; of those, medians alone are kept."""
    times = {name.removeprefix(_THEIRS): ms for name, ms in row.baselines if name.startswith(_THEIRS)}
    where = _where(row.problem)
    return [{"op": op, **where, "median_ms": ms, "p20_ms": None, "p80_ms": None} for op, ms in times.items()]


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What the runner says of a machine; its name is nobody's concern."""
    target, versions = environment["target"], environment.get("versions") or {}
    on_gpu = target.get("kind") in ("cuda", "hip")
    platform = "-".join(str(environment[name]) for name in ("system", "machine") if environment.get(name))
    return {
        "hostname": _ABSENT,
        "platform": platform or _ABSENT,
        "pytorch_version": str(versions.get("torch", _ABSENT)),
        "cuda_version": str(environment.get("cuda", _ABSENT)),
        "triton_version": str(versions.get("triton", _ABSENT)),
        "gpu_name": str(target.get("title") or target["name"]) if on_gpu else _ABSENT,
        "gpu_count": int(on_gpu),
        "gpu_memory_gb": 0,
        "mctune": dict(environment),
    }


def from_fla(document: Any) -> tuple[tuple[Result, ...], tuple[Row, ...]]:
    """The results of a runner's document, and the rows of those that mctune wrote.

    Raises:
        UsageError: naming the first result that is not one.

    Examples:
        >>> found, rows = from_fla({"machine_info": {}, "results": [{"op": "chunk_gla", "mode": "fwd", "B": 4,
        ...     "T": 2048, "H": 16, "D": 128, "median_ms": 0.5, "p20_ms": 0.49, "p80_ms": 0.52}]})
        >>> found[0].op, found[0].standard, rows
        ('chunk_gla', True, ())
    """
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, list):
        raise UsageError("is no output of flash-linear-attention's runner: it has no list of results")
    found: list[Result] = []
    rows: list[Row] = []
    for number, one in enumerate(results):
        try:
            found.append(_read(one))
            if "mctune" in one:
                rows.append(Row.from_dict(one["mctune"]))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise UsageError(f"result {number} is not one of flash-linear-attention's: {text}") from error
    return tuple(found), tuple(rows)


def _read(one: Mapping[str, Any]) -> Result:
    if one["mode"] not in _MODES or not isinstance(one["op"], str):
        raise ValueError(f"op {one['op']!r:.60} in mode {one['mode']!r:.20}")
    sizes = [one[name] for name in "BTHD"]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"sizes {sizes!r:.120}")
    median = float(one["median_ms"])
    low, high = (None if one.get(name) is None else float(one[name]) for name in ("p20_ms", "p80_ms"))
    if not all(0 < ms < float("inf") for ms in (median, low, high) if ms is not None):
        raise ValueError(f"times {[median, low, high]!r:.120}")
    return Result(one["op"], one["mode"], one["B"], one["T"], one["H"], one["D"], median, low, high)
