"""Read what was tried already from the files that it is written down in."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from mctune.core import outcome
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.known import Known, Machine, Tuned
from mctune.core.outcome import Predicted, Timed
from mctune.core.problem import Problem
from mctune.report.cachefile import known_of_cache
from mctune.report.t4 import from_t4, known_of_t4
from mctune.report.write import Document, read_document


def read_known(path: Path) -> tuple[Known, ...]:
    """What a file, or a package's folder, says of configurations and their times.

    Args:
        path: a package or its ``tuned.json``, of ``results`` too, the output of ``mctune bench --json``, a file of T4
            results, or one of kernel_tuner's cache; the last two may be gzipped.

    Raises:
        UsageError: the file is absent, or is none of these.
    """
    values = _exchanged(path)
    if values is not None:
        try:
            if "cache" in values:
                return known_of_cache(str(path), values)
            return known_of_t4(str(path), from_t4(values))
        except (UsageError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} {error}") from error
    return _of_document(str(path), read_document(path))


def _exchanged(path: Path) -> dict[str, Any] | None:
    """The document of a file in a format that others write too; ``None`` for every other file."""
    try:
        data = path.read_bytes()
        values = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (OSError, EOFError, ValueError, RecursionError):
        return None  # the reader of tables says what is the matter
    known = isinstance(values, dict) and ("results" in values or {"cache", "tune_params_keys"} <= set(values))
    return values if known else None


def _of_document(source: str, document: Document) -> tuple[Known, ...]:
    target = document.environment["target"]
    machine = machine_of(target)
    return tuple(
        Known(row.config, row.ms, row.how == "measured", source, row.problem, machine, row.backend)
        for row in document.rows
    )


def tuned_entries(path: Path) -> tuple[dict[str, Any], tuple[Tuned, ...]]:
    """The target that a tuned table describes, and every entry of it that has a time.

    Raises:
        UsageError: the file is absent, or no tuned table.
    """
    tuned = read_document(path).tuned
    if tuned is None:
        raise UsageError(f"{path} is no tuned table; give a tuned.json, of a package or of results")
    entries = []
    for one in tuned["entries"]:
        timed = outcome.from_dict(one["outcome"])
        if isinstance(timed, Timed | Predicted):
            problem, config = Problem.from_dict(one["problem"]), Config.of(one["config"])
            entries.append(Tuned(problem, config, str(one["backend"]), timed))
    return dict(tuned["target"]), tuple(entries)


def machine_of(target: dict[str, Any]) -> Machine:
    """The machine that a document's ``target`` describes."""
    cores = target.get("cores")
    return Machine(
        str(target["name"]), str(target.get("title", "")), str(target.get("arch", "")),
        cores if isinstance(cores, int) else 0,
    )  # fmt: skip


def published(results: Path | None) -> tuple[Known, ...]:
    """What the tuned tables of a folder of results hold; one that cannot be read is left out."""
    found: list[Known] = []
    for path in sorted(results.glob("*/tuned.json")) if results else ():
        try:
            found += read_known(path)
        except UsageError:  # of another version: nobody has asked for it
            continue
    return tuple(found)
