"""Tidy rows: one kernel on one problem on one target, with everything needed to read the number by itself."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted, Timed, shares
from mctune.core.problem import Problem
from mctune.report.files import write_whole

HOW = ("measured", "predicted")
_PROBLEM = (
    "pass", "recurrence", "aggregation", "segmentation", "state_init", "B", "T", "H", "Dk", "Dv", "segment_length",
    "top_k", "expansion", "inner_chunk", "dtype",
)  # fmt: skip
_TEXT = frozenset({"pass", "recurrence", "aggregation", "segmentation", "state_init", "dtype"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LABEL = re.compile(r"[\w(\[][ -~]{0,199}", re.ASCII)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_LARGEST, _SEGMENTS = 1 << 31, 1 << 20
COLUMNS = (
    "target", *_PROBLEM, "backend", "config", "how", "ms", "low", "high", "repeats", "error", "best_baseline",
    "best_baseline_ms", "speedup", "fraction_of_bound", "sm_mhz", "celsius", "date", "baselines", "shares", "versions",
)  # fmt: skip
"""The columns of ``rows.csv``; ``config``, ``baselines``, ``shares`` and ``versions`` hold JSON objects."""


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
        shares: of each operation in the time of the pass, by name, in their order, where a search timed them.
        date: the day (UTC, ``2026-11-29``) that it was timed or predicted; ``None`` where that was not written down.
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
    shares: tuple[tuple[str, float], ...] = ()
    date: str | None = None

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise UsageError(f"how={self.how!r} is not one of {', '.join(HOW)}")
        if not _is_number(self.ms) or not self.ms > 0:
            raise UsageError(f"ms={self.ms!r:.60}: a row needs a positive time; failures are outcomes, not rows")
        check_name("target", self.target)
        if not isinstance(self.backend, str) or not _LABEL.fullmatch(self.backend):
            raise UsageError(f"backend {self.backend!r:.60} is not a name of at most 200 printable characters")
        for name in ("low", "high", "error", "fraction_of_bound", "sm_mhz", "celsius"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise UsageError(f"{name}={value!r:.60} is not a number")
        if self.date is not None and not (isinstance(self.date, str) and _DATE.fullmatch(self.date)):
            raise UsageError(f"date={self.date!r:.60} is not a day: 2026-11-29")
        if self.repeats is not None and (not isinstance(self.repeats, int) or self.repeats < 0):
            raise UsageError(f"repeats={self.repeats!r:.60} is not a count")
        for name, ms in self.baselines:
            if not _LABEL.fullmatch(name) or not _is_number(ms) or not ms > 0:
                raise UsageError(f"baseline {name!r:.60}={ms!r:.60} is not a name and a positive time in milliseconds")
        for name, share in self.shares:
            if not _LABEL.fullmatch(name) or not _is_number(share) or not share >= 0:
                raise UsageError(f"shares: {name!r:.60}={share!r:.60} is not an operation and a share of the time")
        for name, version in self.versions:
            if not isinstance(version, str) or len(name) + len(version) > 200:
                raise UsageError(f"versions: {name!r:.60}={version!r:.60} is not the version of a package")
        p = self.problem
        if max(p.B, p.T, p.H, p.Dk, p.Dv, p.E, p.inner_chunk or 0) > _LARGEST or p.T > _SEGMENTS * (
            p.segment_length or p.T
        ):
            raise UsageError(f"{p!s:.120}: no machine computes that")

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
        date: str | None = None,
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
            shares=tuple(shares(outcome).items()),
            date=date,
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
            "shares": dict(self.shares),
            "date": self.date,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """The inverse of :meth:`to_dict`."""
        fields = {name: value for name, value in values.items() if name != "speedup"}
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise UsageError(f"a row has no {unknown[0]!r:.60}")
        # Rows share problems and versions by the thousand.
        fields["problem"] = _problem(tuple(values["problem"].items()))
        fields["config"] = _config(values["config"])
        fields["baselines"] = tuple(sorted(values.get("baselines", {}).items()))
        fields["shares"] = tuple(values.get("shares", {}).items())
        fields["versions"] = _shared(tuple(sorted(values.get("versions", {}).items())))
        return cls(**fields)


def check_name(what: str, name: object) -> str:
    """A name that is also one of a folder, and a cell of a spreadsheet.

    Raises:
        UsageError: if it is not.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{what} {name!r:.60} is not a name: letters, digits and . _ - after the first, at most 64")
    return name


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


@lru_cache(maxsize=4096)
def _problem(items: tuple[tuple[str, Any], ...]) -> Problem:
    return Problem.from_dict(dict(items))


@lru_cache(maxsize=4096)
def _shared(items: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return items


def _config(values: object) -> Config:
    if not isinstance(values, dict) or not all(isinstance(value, str | int | float) for value in values.values()):
        raise UsageError(f"config={values!r:.60} is not an object of numbers, strings and booleans")
    return Config.of({sys.intern(name): value for name, value in values.items()})


def sort_key(row: Row) -> tuple[Any, ...]:
    """Rows in reading order: by operation, then by size."""
    p = row.problem
    return (row.target, p.pass_, p.recurrence, p.aggregation, p.segmentation, p.state_init, p.dtype, p.H * p.Dk,
            p.T, p.segment_length or 0, p.to_json(), row.backend, row.ms)  # fmt: skip


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` in reading order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(map(csv_cells, sorted(rows, key=sort_key)))
    write_whole(path, text.getvalue())


def read_csv(path: Path) -> list[Row]:
    """The inverse of :func:`write_csv`, up to six digits of each number."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_from_record(record) for record in csv.DictReader(file)]


def csv_cells(row: Row) -> tuple[str, ...]:
    """The cells of a row, in the order of ``COLUMNS``."""
    best = row.best_baseline
    values = (
        row.how, row.ms, row.low, row.high, row.repeats, row.error, *(best or (None, None)), row.speedup,
        row.fraction_of_bound, row.sm_mhz, row.celsius, row.date,
        _json({name: float(f"{ms:.6g}") for name, ms in row.baselines}) if row.baselines else "{}",
        json.dumps({name: round(share, 4) for name, share in row.shares}, separators=(",", ":")),
    )  # fmt: skip
    told = row.target, *_columns(row.problem), row.backend, row.config.to_json()
    return (*told, *map(_text, values), _versions(row.versions))


@lru_cache(maxsize=4096)
def _columns(problem: Problem) -> tuple[str, ...]:
    fields = problem.to_dict()
    return tuple(_text(fields.get(name)) for name in _PROBLEM)


@lru_cache(maxsize=4096)
def _versions(versions: tuple[tuple[str, str], ...]) -> str:
    return _json(dict(versions))


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
            "shares": json.loads(record.get("shares") or "{}"),
            "date": record.get("date") or None,
            "versions": json.loads(record["versions"]),
        }
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))
