"""Read what was tried already from the files that it is written down in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mctune.core import outcome
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.known import Known, Machine, Tuned
from mctune.core.outcome import Predicted, Timed
from mctune.core.problem import Problem
from mctune.report.write import Document, read_document


def read_known(path: Path) -> tuple[Known, ...]:
    """What a file, or a package's folder, says of configurations and their times.

    Args:
        path: a package or its ``tuned.json``, of ``results`` too, or the output of ``mctune bench --json``.

    Raises:
        UsageError: the file is absent, or is none of these.
    """
    return _of_document(str(path), read_document(path))


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
