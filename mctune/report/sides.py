"""One side of a comparison: rows by target, each with where they were measured."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mctune.core.errors import UsageError
from mctune.report.markdown import one_line
from mctune.report.rows import Row, check_name, read_csv
from mctune.report.write import Document, read_document

_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, csv.Error)


@dataclass(frozen=True)
class Side:
    """What was found under a name: one document a target, in the order of the targets' names.

    Args:
        called: what its user calls it.
    """

    called: str
    documents: tuple[Document, ...]

    def of(self, target: str) -> Document | None:
        """The document of a target, if there is one."""
        return next((one for one in self.documents if target_of(one) == target), None)


def target_of(document: Document) -> str:
    """The name of the target that a document is of."""
    return str(document.environment["target"]["name"])


def read_side(path: Path, called: str = "") -> Side:
    """Read a folder of results, or of several of them; a ``rows.csv``; a package or its ``tuned.json``; or the output
    of ``mctune bench --json``.

    Args:
        called: what messages call ``path``, where that is not its own name.

    Raises:
        UsageError: if ``path`` is none of these, or holds two documents of one target.
    """
    called = called or str(path)
    try:
        documents = [_checked(one) for one in _documents(path)]
    except UsageError as error:
        raise UsageError(str(error).replace(str(path), called)) from error
    documents.sort(key=target_of)
    names = [target_of(one) for one in documents]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{called} holds {names.count(name)} folders with rows of {name}: give one of them")
    return Side(called, tuple(documents))


def _documents(path: Path) -> list[Document]:
    try:
        if path.is_file() and path.suffix == ".csv":
            return [_of_csv(path)]
        if not path.is_dir():
            return [read_document(path)]
        tables = [path / "rows.csv"] if (path / "rows.csv").is_file() else sorted(path.glob("*/rows.csv"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    if tables:
        return [_of_csv(table) for table in tables]
    if not (path / "tuned.json").is_file():
        raise UsageError(
            f"{path} holds no results: neither rows.csv, here or one folder down, nor a package's tuned.json"
        )
    return [read_document(path)]


def _of_csv(path: Path) -> Document:
    """A ``rows.csv`` with the ``environment.json`` beside it, if there is one."""
    rows = tuple(_read(path, read_csv))
    if not rows:
        raise UsageError(f"{path} has no rows")
    beside = path.with_name("environment.json")
    return Document(rows, _read(beside, _object) if beside.exists() else {"target": {"name": rows[0].target}}, None)


def _read(path: Path, reader: Any) -> Any:
    try:
        return reader(path)
    except UsageError as error:
        raise UsageError(f"{path}: {one_line(error)}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (*_MALFORMED, RecursionError) as error:
        raise UsageError(f"{path} is malformed: {type(error).__name__} {one_line(error)}") from error


def _object(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_bytes())
    if not isinstance(values, dict) or not isinstance(values.get("target"), dict):
        raise UsageError("it has no target")
    return values


def _checked(document: Document) -> Document:
    """A document whose rows are all of its own target."""
    name = check_name("target", document.environment["target"].get("name"))
    stranger = next((row for row in document.rows if row.target != name), None)
    if stranger is not None:
        raise UsageError(f"a row is of {stranger.target}, its environment of {name}: they do not belong together")
    return document


def fastest(rows: tuple[Row, ...]) -> dict[tuple[Any, str], dict[str, Row]]:
    """The fastest row of each problem by each backend: first by (problem, backend), then by ``how``."""
    found: dict[tuple[Any, str], dict[str, Row]] = {}
    for row in rows:
        of = found.setdefault((row.problem, row.backend), {})
        # If two are as fast, the same one counts in whatever order they come.
        of[row.how] = min(of.get(row.how, row), row, key=_speed)
    return found


def _speed(row: Row) -> tuple[Any, ...]:
    return row.ms, row.high or row.ms, row.low or row.ms, row.config.to_json(), row.baselines
