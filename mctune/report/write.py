"""From the documents that searches and benchmarks leave to ``results/<target>/``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mctune.core import outcome
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted, Timed
from mctune.core.problem import Problem
from mctune.core.work import bound, work
from mctune.report.rows import Row, write_csv
from mctune.report.tables import results_readme

TUNED_SCHEMA = 1


@dataclass(frozen=True)
class Document:
    """One input: its rows, where they were measured, the tuned table if it is one, and the rates of a benchmark.

    ``rates`` are the fastest matrix product (operations/s) and copy (bytes/s) that the benchmark saw.
    """

    rows: tuple[Row, ...]
    environment: dict[str, Any]
    tuned: dict[str, Any] | None
    rates: tuple[float, float] | None = None


def read_document(path: Path) -> Document:
    """Read a package directory, its ``tuned.json``, or the JSON that ``mctune bench --json`` prints.

    Raises:
        UsageError: the file is absent or is none of these.
    """
    file = path / "tuned.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{file} does not exist; give a tuned package or the output of `mctune bench --json`"
        ) from None
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict) or not ({"entries", "rows"} & set(values)):
        raise UsageError(f"{file} is neither a tuned table (entries) nor benchmark output (rows, environment)")
    if "rows" in values:
        rows = tuple(Row.from_dict(row) for row in values["rows"])
        return Document(rows, values["environment"], None, _fastest(values.get("rates", [])))
    if values.get("schema") != TUNED_SCHEMA:
        raise UsageError(f"{file} has schema {values.get('schema')!r}; this mctune reads {TUNED_SCHEMA}")
    return Document(rows_of_tuned(values), {"target": values["target"], "versions": values["versions"]}, values)


def rows_of_tuned(tuned: dict[str, Any]) -> tuple[Row, ...]:
    """One row for each entry of a tuned table that has a time."""
    rows = []
    for entry in tuned["entries"]:
        timed = outcome.from_json(json.dumps(entry["outcome"]))
        if isinstance(timed, Timed | Predicted):
            rows.append(
                Row.of(
                    tuned["target"]["name"],
                    Problem.from_dict(entry["problem"]),
                    entry["backend"],
                    Config.of(entry["config"]),
                    timed,
                    versions=tuned["versions"],
                )
            )
    return tuple(rows)


def write_results(documents: Sequence[Document], results: Path) -> list[Path]:
    """Write ``results/<target>/`` for every target in ``documents``, replacing what was there; returns the folders.

    Where two documents have a row for the same kernel on the same problem, both measured or both predicted, one with
    baselines wins, then the later.
    """
    folders = []
    for name in sorted({document.environment["target"]["name"] for document in documents}):
        mine = [document for document in documents if document.environment["target"]["name"] == name]
        rates = next((document.rates for document in mine if document.rates is not None), None)
        rows = [_bounded(row, rates) for row in _merge([row for document in mine for row in document.rows])]
        if not rows:
            raise UsageError(f"nothing to report for {name}: no entry has a time")
        # Benchmark output describes its environment in more detail than a tuned table does.
        environment = max((document.environment for document in mine), key=len)
        folder = results / name
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "rows.csv", rows)
        (folder / "environment.json").write_text(json.dumps(environment, indent=2, sort_keys=True) + "\n")
        (folder / "README.md").write_text(results_readme(rows, environment))
        tables = [document.tuned for document in mine if document.tuned is not None]
        if tables:
            (folder / "tuned.json").write_text(json.dumps(tables[-1], indent=2, sort_keys=True) + "\n")
        folders.append(folder)
    return folders


def _fastest(rates: Sequence[dict[str, float]]) -> tuple[float, float] | None:
    if not rates:
        return None
    return max(rate["matrix_gflops"] for rate in rates) * 1e9, max(rate["copy_gbs"] for rate in rates) * 1e9


def _bounded(row: Row, rates: tuple[float, float] | None) -> Row:
    """The row with its fraction of the bound; one that was timed without rates of its own gets a benchmark's."""
    if row.fraction_of_bound is not None or rates is None or row.problem.deep:
        return row
    return replace(row, fraction_of_bound=bound(work(row.problem), *rates) * 1e3 / row.ms)


def _merge(rows: Sequence[Row]) -> list[Row]:
    kept: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        key = (row.problem.key, row.backend, row.config.key, row.how)
        if key not in kept or row.baselines or not kept[key].baselines:
            kept[key] = row
    return list(kept.values())
