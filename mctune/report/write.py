"""From the documents that searches and benchmarks leave to ``results/<target>/``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timezone
from pathlib import Path
from typing import Any

from mctune.core import outcome
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted, Timed
from mctune.core.problem import Problem
from mctune.core.target import peaks
from mctune.core.work import bound, work
from mctune.report.compiled import COMPILED, Explanation
from mctune.report.files import write_whole
from mctune.report.kept import write_studies
from mctune.report.markdown import one_line
from mctune.report.rows import Row, check_name, write_csv
from mctune.report.t4 import Results
from mctune.report.tables import results_readme

TUNED_SCHEMA = 1
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


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
        # Rows are made while the text is parsed: their objects, one for each, would take most of the memory.
        values = json.loads(file.read_bytes(), object_hook=_row_or_object, parse_constant=_refuse)
    except FileNotFoundError:
        raise UsageError(
            f"{file} does not exist; give a tuned package or the output of `mctune bench --json`"
        ) from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except UsageError as error:
        raise UsageError(f"{file}: {one_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON: {one_line(error)}") from error
    if not isinstance(values, dict) or not ({"entries", "rows"} & set(values)):
        raise UsageError(f"{file} is neither a tuned table (entries) nor benchmark output (rows, environment)")
    try:
        return _document(values)
    except UsageError as error:
        raise UsageError(f"{file} {one_line(error)}") from error
    except _MALFORMED as error:
        raise UsageError(f"{file} is malformed: {type(error).__name__} {one_line(error)}") from error


def _row_or_object(values: dict[str, Any]) -> Any:
    if not {"problem", "config", "how", "ms"} <= set(values):
        return values
    try:
        return Row.from_dict(values)
    except UsageError:
        raise
    except _MALFORMED as error:
        raise UsageError(f"a row is malformed: {type(error).__name__} {error}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _document(values: dict[str, Any]) -> Document:
    if "rows" in values:
        rows = values["rows"]
        if not isinstance(rows, list) or not all(isinstance(row, Row) for row in rows):
            raise UsageError("has rows that are not rows: each needs problem, config, how, ms")
        rates = values.get("rates", [])
        return Document(tuple(rows), _environment(values.get("environment")), None, _fastest(rates))
    if values.get("schema") != TUNED_SCHEMA:
        raise UsageError(f"has schema {values.get('schema')!r:.60}; this mctune reads {TUNED_SCHEMA}")
    environment = _environment({"target": values.get("target"), "versions": values.get("versions")})
    return Document(rows_of_tuned(values), environment, values)


def _environment(values: Any) -> dict[str, Any]:
    """What a document says of where it was measured: a target with a name, and anything else."""
    if not isinstance(values, dict) or not isinstance(values.get("target"), dict):
        raise UsageError("has no environment with a target")
    check_name("target", values["target"].get("name"))
    return values


def rows_of_tuned(tuned: dict[str, Any]) -> tuple[Row, ...]:
    """One row for each entry of a tuned table that has a time."""
    rows = (row_of_entry(tuned, entry) for entry in tuned["entries"])
    return tuple(row for row in rows if row is not None)


def row_of_entry(tuned: dict[str, Any], entry: dict[str, Any]) -> Row | None:
    """The row of an entry of a tuned table; ``None`` where it has no time."""
    timed = outcome.from_dict(entry["outcome"])
    if not isinstance(timed, Timed | Predicted):
        return None
    row = Row.of(
        tuned["target"]["name"],
        Problem.from_dict(entry["problem"]),
        entry["backend"],
        Config.of(entry["config"]),
        timed,
        versions=tuned["versions"],
        date=tuned.get("date"),
    )
    # A predicted kernel was held to the oracle too, before it was shipped.
    return row if row.error is not None else replace(row, error=entry.get("verified", {}).get("error"))


def write_results(
    documents: Sequence[Document],
    results: Path,
    studies: Sequence[tuple[str, Results]] = (),
    compiled: Sequence[Explanation] = (),
) -> list[Path]:
    """Write ``results/<target>/`` for every target in ``documents``, replacing what was there; returns the folders.

    Where two documents have a row for the same kernel on the same problem, both measured or both predicted, one with
    baselines wins, then the later; the shares of its operations come from either.

    Args:
        documents: tuned tables and the output of benchmarks.
        results: the folder of all targets.
        studies: searches by their names; each is kept as T4 with its target's rows, which get the days of its trials.
        compiled: what the compiler says of kernels; each is kept with its target's rows.

    Raises:
        UsageError: if a target has no row, two documents are of different machines of its name, or its folder cannot be
            written.
    """
    try:
        return _write_results(documents, results, studies, compiled)
    except OSError as error:
        raise UsageError(f"{error.filename or results} cannot be written: {error.strerror}") from error


def _write_results(
    documents: Sequence[Document],
    results: Path,
    studies: Sequence[tuple[str, Results]],
    compiled: Sequence[Explanation],
) -> list[Path]:
    folders = []
    for name, document in of_targets(documents).items():
        searched = [(study, found) for study, found in studies if found.about["target"][0] == name]
        days = _days(searched)
        rows, environment = [_dated(row, days) for row in document.rows], document.environment
        folder = results / name
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "rows.csv", rows)
        _write_json(folder / "environment.json", environment)
        write_whole(folder / "README.md", results_readme(rows, environment))
        if document.tuned is not None:
            _write_json(folder / "tuned.json", document.tuned)
        if searched:
            write_studies(folder, searched)
        for explained in compiled:
            if explained.target == name:
                _write_json(folder / COMPILED, explained.document)
        folders.append(folder)
    return folders


def of_targets(documents: Sequence[Document]) -> dict[str, Document]:
    """One document a target, by its name: their rows merged, the last tuned table.

    Raises:
        UsageError: if a target has no row, or two documents are of different machines of its name.
    """
    found = {}
    for name in sorted({document.environment["target"]["name"] for document in documents}):
        mine = [document for document in documents if document.environment["target"]["name"] == name]
        _of_one_machine(name, mine)
        rates = next((document.rates for document in mine if document.rates is not None), None)
        rows = tuple(_bounded(row, rates) for row in _merge([row for document in mine for row in document.rows]))
        if not rows:
            raise UsageError(f"nothing to report for {name}: no entry has a time")
        # Benchmark output describes its environment in more detail than a tuned table does.
        environment = max((document.environment for document in mine), key=len)
        tables = [document.tuned for document in mine if document.tuned is not None]
        found[name] = Document(rows, environment, tables[-1] if tables else None, rates)
    return found


def _of_one_machine(name: str, documents: Sequence[Document]) -> None:
    """``cpu`` is whatever CPU there was; a folder has one environment."""
    for key in ("title", "arch"):
        found = {str(one.environment["target"][key]) for one in documents if key in one.environment["target"]}
        if len(found) > 1:
            machines = " and of ".join(sorted(found))
            raise UsageError(f"{name} is of {machines}; report each on its own, with another --out")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _fastest(rates: Sequence[dict[str, float]]) -> tuple[float, float] | None:
    if not rates:
        return None
    fastest = tuple(max(float(rate[name]) for rate in rates) for name in ("matrix_gflops", "copy_gbs"))
    if not all(0 < rate < float("inf") for rate in fastest):
        raise UsageError(f"has rates that are not positive: {fastest}")
    return fastest[0] * 1e9, fastest[1] * 1e9


def _bounded(row: Row, rates: tuple[float, float] | None) -> Row:
    """The row with its fraction of the bound; one without rates of its own gets a benchmark's, or the data sheet's."""
    rates = peaks(row.target) if row.how == "predicted" else rates
    if row.fraction_of_bound is not None or rates is None:
        return row
    return replace(row, fraction_of_bound=bound(work(row.problem), *rates) * 1e3 / row.ms)


def _days(studies: Sequence[tuple[str, Results]]) -> dict[tuple[str, str], str]:
    """The day of each trial, by its problem and configuration."""
    days = {}
    for _, results in studies:
        for trial in results.trials:
            problem = results.problem_of(trial.config)
            if trial.at is not None and problem is not None:
                days[problem.key, trial.config.key] = trial.at.astimezone(timezone.utc).date().isoformat()
    return days


def _dated(row: Row, days: Mapping[tuple[str, str], str]) -> Row:
    if row.date is not None:
        return row
    return replace(row, date=days.get((row.problem.key, row.config.key)))


def _merge(rows: Sequence[Row]) -> list[Row]:
    kept: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        key = (row.problem.key, row.backend, row.config.to_json(), row.how)
        shares = row.shares or (kept[key].shares if key in kept else ())
        if key not in kept or row.baselines or not kept[key].baselines:
            kept[key] = row
        kept[key] = replace(kept[key], shares=shares)
    return list(kept.values())
