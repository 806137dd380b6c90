"""The rows of a page as columns: what its table, its downloads and its plots are made of."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mctune.core.problem import Problem
from mctune.core.work import bound, work
from mctune.report.page.content import Content
from mctune.report.rows import COLUMNS, Row, csv_cells, sort_key

NUMBERS = frozenset({
    "B", "T", "H", "Dk", "Dv", "segment_length", "top_k", "expansion", "inner_chunk", "ms", "low", "high", "repeats",
    "error", "best_baseline_ms", "speedup", "fraction_of_bound", "sm_mhz", "celsius",
})  # fmt: skip
_INTEGERS = frozenset({
    "B", "T", "H", "Dk", "Dv", "segment_length", "top_k", "expansion", "inner_chunk", "repeats",
})  # fmt: skip
OURS = "mctune"


def columns(rows: Iterable[Row]) -> dict[str, list[Any]]:
    """The cells of ``rows.csv`` by column, numbers as numbers and ``None`` where a row has nothing."""
    cells = [csv_cells(row) for row in sorted(rows, key=sort_key)]
    return {name: [_value(name, line[place]) for line in cells] for place, name in enumerate(COLUMNS)}


def _value(name: str, cell: str) -> Any:
    if name not in NUMBERS:
        return cell
    if not cell:
        return None
    return int(cell) if name in _INTEGERS else float(cell)


def coded(table: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Columns as they travel in a page: texts, which repeat, as numbers of a list of them.

    Examples:
        >>> coded({"how": ["measured", "measured"], "ms": [1.5, 2.0]})
        {'how': {'texts': ['measured'], 'at': [0, 0]}, 'ms': [1.5, 2.0]}
    """
    packed: dict[str, Any] = {}
    for name, values in table.items():
        if name in NUMBERS:
            packed[name] = list(values)
            continue
        places: dict[str, int] = {}
        at = [places.setdefault(value, len(places)) for value in values]
        packed[name] = {"texts": list(places), "at": at}
    return packed


def parquet(table: Mapping[str, Sequence[Any]]) -> bytes:
    """A Parquet file of the columns, the same bytes for the same columns and version of pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array(values, pa.int64() if name in _INTEGERS else pa.float64() if name in NUMBERS else pa.string())
        for name, values in table.items()
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays), buffer, compression="zstd")
    return buffer.getvalue()


def operation(problem: Problem) -> str:
    """What is computed, without its size."""
    top_k = f" top {problem.top_k}" if problem.top_k else ""
    return f"{problem.pass_} {problem.recurrence} {problem.aggregation}{top_k}"


def shape(problem: Problem, segment: bool = True, length: bool = True) -> str:
    """Its size, with the segment length and T or without: ``T4096 H4 D64 C256``."""
    told = [
        f"B{problem.B}" if problem.B > 1 else "",
        f"T{problem.T}" if length else "",
        f"H{problem.H} {problem.widths}",
        f"C{problem.segment_length}" if segment and problem.segment_length else "",
        f"b{problem.inner_chunk}" if problem.deep else "",
    ]
    return " ".join(part for part in told if part)


def figure(value: float) -> str:
    """A number to three digits, without an exponent where a reader does not need one.

    Examples:
        >>> figure(1009.93), figure(0.02764), figure(12.345)
        ('1,010', '0.0276', '12.3')
    """
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def label(problem: Problem) -> str:
    """Operation, size and type, as plots name a problem."""
    return f"{operation(problem)}, {shape(problem)} {problem.dtype}"


def point(row: Row, content: Content) -> dict[str, Any]:
    """A row as a point of a plot: times in ms, rates in GFLOP/s, and what a tooltip says of it."""
    counted, rates = work(row.problem), content.rates
    # A row's own share is of the rates of its own rounds; what fits a cache has a faster copy than the page's.
    least = bound(counted, rates[0], rates[1]) * 1e3 if rates else None
    if row.fraction_of_bound is not None:
        least = row.fraction_of_bound * row.ms
    return {
        "problem": label(row.problem), "operation": operation(row.problem), "pass": row.problem.pass_,
        "T": row.problem.T, "segment": row.problem.segment_length, "contender": f"{OURS}, {row.backend}",
        "how": row.how, "ms": row.ms, "low": row.low, "high": row.high, "target": content.title,
        "intensity": counted.operations / counted.bytes, "gflops": counted.operations / row.ms / 1e6,
        "bound": least, "fraction": None if least is None else least / row.ms,
        "bound by": limited(row.problem, rates), "date": row.date or "not recorded",
        "versions": versions(dict(row.versions)),
    }  # fmt: skip


def limited(problem: Problem, rates: tuple[float, float, str] | None) -> str:
    """Which of both rates the least time is of."""
    if rates is None:
        return ""
    counted = work(problem)
    return "matrix products" if counted.operations / rates[0] >= counted.bytes / rates[1] else "memory"


def versions(told: Mapping[str, str]) -> str:
    """The versions that a reader asks for first."""
    return ", ".join(f"{name} {told[name]}" for name in ("mctune", "torch", "apache-tvm", "triton") if name in told)


def text(values: Any) -> str:
    """JSON that can stand inside a script element, whatever the strings in it say."""
    told = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return told.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
