"""Tidy rows: one kernel on one problem on one target, with everything needed to read the number by itself."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted, Timed
from mctune.core.problem import Problem

HOW = ("measured", "predicted")
_PROBLEM = (
    "pass", "recurrence", "aggregation", "segmentation", "state_init", "B", "T", "H", "Dk", "Dv", "segment_length",
    "top_k", "expansion", "inner_chunk", "dtype",
)  # fmt: skip
_TEXT = frozenset({"pass", "recurrence", "aggregation", "segmentation", "state_init", "dtype"})
COLUMNS = (
    "target", *_PROBLEM, "backend", "config", "how", "ms", "low", "high", "repeats", "error", "best_baseline",
    "best_baseline_ms", "speedup", "fraction_of_bound", "sm_mhz", "celsius", "baselines", "versions",
)  # fmt: skip
"""The columns of ``rows.csv``; ``config``, ``baselines`` and ``versions`` hold JSON objects."""


@dataclass(frozen=True)
class Row:
    """One result. Times are milliseconds: median, and the 20th and 80th percentile over ``repeats``.

    Args:
        backend: what produced the kernel (``tvm``, ``triton``).
        how: ``measured``, or ``predicted`` by a cost model, which then has no spread.
        error: RMS ratio to the oracle, where it was verified.
        baselines: milliseconds of other ways to compute the same, by name, timed in the same run.
        fraction_of_bound: the time that no kernel can beat on this target, over ``ms``.
        sm_mhz, celsius: a GPU's clock and temperature right after it was timed.
        versions: of the packages that took part.
    """

    target: str
    problem: Problem
    backend: str
    config: Config
    how: str
    ms: float
    low: float | None = None
    high: float | None = None
    repeats: int | None = None
    error: float | None = None
    baselines: tuple[tuple[str, float], ...] = ()
    fraction_of_bound: float | None = None
    sm_mhz: float | None = None
    celsius: float | None = None
    versions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise UsageError(f"how={self.how!r} is not one of {', '.join(HOW)}")
        if not self.ms > 0:
            raise UsageError(f"ms={self.ms!r}: a row needs a positive time; failures are outcomes, not rows")

    @classmethod
    def of(
        cls,
        target: str,
        problem: Problem,
        backend: str,
        config: Config,
        outcome: Timed | Predicted,
        *,
        baselines: Mapping[str, float] | None = None,
        fraction_of_bound: float | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> Row:
        """The row of an outcome that has a time."""
        spread: dict[str, Any] = {}
        if isinstance(outcome, Timed):
            names = ("low", "high", "repeats", "error", "sm_mhz", "celsius")
            spread = {name: getattr(outcome, name) for name in names}
        return cls(
            target=target,
            problem=problem,
            backend=backend,
            config=config,
            how="measured" if isinstance(outcome, Timed) else "predicted",
            ms=outcome.ms,
            baselines=tuple(sorted((baselines or {}).items())),
            fraction_of_bound=fraction_of_bound,
            versions=tuple(sorted((versions or {}).items())),
            **spread,
        )

    @property
    def best_baseline(self) -> tuple[str, float] | None:
        """Name and milliseconds of the fastest baseline."""
        return min(self.baselines, key=lambda item: item[1], default=None)

    @property
    def speedup(self) -> float | None:
        """Time of the fastest baseline over this time."""
        best = self.best_baseline
        return best[1] / self.ms if best else None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "target": self.target,
            "problem": self.problem.to_dict(),
            "backend": self.backend,
            "config": self.config.to_dict(),
            "how": self.how,
            "ms": self.ms,
            "low": self.low,
            "high": self.high,
            "repeats": self.repeats,
            "error": self.error,
            "baselines": dict(self.baselines),
            "speedup": self.speedup,
            "fraction_of_bound": self.fraction_of_bound,
            "sm_mhz": self.sm_mhz,
            "celsius": self.celsius,
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """The inverse of :meth:`to_dict`."""
        fields = {name: value for name, value in values.items() if name != "speedup"}
        fields["problem"] = Problem.from_dict(values["problem"])
        fields["config"] = Config.of(values["config"])
        for name in ("baselines", "versions"):
            fields[name] = tuple(sorted(values.get(name, {}).items()))
        return cls(**fields)


def sort_key(row: Row) -> tuple[Any, ...]:
    """Rows in reading order: by operation, then by size."""
    p = row.problem
    return (row.target, p.pass_, p.recurrence, p.aggregation, p.segmentation, p.state_init, p.dtype, p.H * p.Dk,
            p.T, p.segment_length or 0, p.to_json(), row.backend, row.ms)  # fmt: skip


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` in reading order."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=sort_key):
            writer.writerow(_to_record(row))


def read_csv(path: Path) -> list[Row]:
    """The inverse of :func:`write_csv`, up to six digits of each number."""
    with path.open(newline="") as file:
        return [_from_record(record) for record in csv.DictReader(file)]


def _to_record(row: Row) -> dict[str, str]:
    best = row.best_baseline
    values: dict[str, Any] = {
        **row.to_dict(),
        **row.problem.to_dict(),
        "config": row.config.to_json(),
        "best_baseline": best[0] if best else None,
        "best_baseline_ms": best[1] if best else None,
        "baselines": _json({name: float(f"{ms:.6g}") for name, ms in row.baselines}),
        "versions": _json(dict(row.versions)),
    }
    return {name: _text(values.get(name)) for name in COLUMNS}


def _from_record(record: dict[str, str]) -> Row:
    problem = {name: record[name] if name in _TEXT else int(record[name]) for name in _PROBLEM if record[name]}
    optional = ("low", "high", "error", "fraction_of_bound", "sm_mhz", "celsius")
    numbers = {name: float(record[name]) if record.get(name) else None for name in optional}
    return Row.from_dict(
        {
            **{name: record[name] for name in ("target", "backend", "how")},
            **numbers,
            "problem": problem,
            "config": json.loads(record["config"]),
            "ms": float(record["ms"]),
            "repeats": int(record["repeats"]) if record["repeats"] else None,
            "baselines": json.loads(record["baselines"]),
            "versions": json.loads(record["versions"]),
        }
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))
