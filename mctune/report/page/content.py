"""What a page shows of one target: what lies in its folder of results, read once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mctune.core.errors import UsageError
from mctune.core.target import peaks
from mctune.report.compiled import COMPILED, Compiled, read_compiled
from mctune.report.history import Record, read_history
from mctune.report.kept import SUFFIX, read_study, study_files
from mctune.report.rows import Row, read_csv
from mctune.report.sides import fastest
from mctune.report.t4 import Results

ROWS, HISTORY = "rows.csv", "history.jsonl"


@dataclass(frozen=True)
class Study:
    """A study's trials, by the study's name."""

    name: str
    results: Results


@dataclass(frozen=True)
class Content:
    """One folder of results.

    Args:
        name: the folder's path below the results, ``avx2/cpu``.
        rows: of its ``rows.csv``.
        environment: what they were measured on, or predicted with.
        studies: the searches that found them, where they were kept.
        compiled: what the compiler says of the kernels, where that was asked.
        history: what `mctune compare --history` has written down of the target, day by day.
    """

    name: str
    rows: tuple[Row, ...]
    environment: dict[str, Any]
    studies: tuple[Study, ...] = ()
    compiled: tuple[Compiled, ...] = ()
    history: tuple[Record, ...] = ()

    @property
    def title(self) -> str:
        """The product's name."""
        target = self.environment["target"]
        return str(target.get("title") or target["name"])

    @property
    def measured(self) -> int:
        """How many rows are measured; the others are predicted."""
        return sum(row.how == "measured" for row in self.rows)

    @cached_property
    def fastest(self) -> tuple[Row, ...]:
        """Of each problem and backend the fastest measured row and the fastest predicted one, in the rows' order."""
        return tuple(row for of in fastest(self.rows).values() for row in of.values())

    @property
    def rates(self) -> tuple[float, float, str] | None:
        """Operations/s of matrix products, bytes/s of memory, and where both come from; ``None`` where not known."""
        matrix, copy = (self.environment.get(name) for name in ("matrix_gflops", "copy_gbs"))
        if matrix and copy:
            return (
                float(matrix) * 1e9,
                float(copy) * 1e9,
                "torch's own matrix product and copy, measured in the same run",
            )
        known = peaks(str(self.environment["target"]["name"]))
        return (*known, "the data sheet's peaks") if known else None


def folders(results: Path) -> Iterator[Path]:
    """The folders of ``results`` that hold rows, in order."""
    yield from sorted(path.parent for path in results.rglob(ROWS))


def read_content(folder: Path, results: Path) -> Content:
    """Read one folder.

    Raises:
        UsageError: naming the file that is missing or malformed.
    """
    name = folder.relative_to(results).as_posix()
    rows = _read(folder / ROWS, lambda path: tuple(read_csv(path)))
    environment = _read(folder / "environment.json", lambda path: json.loads(path.read_bytes()))
    if not isinstance(environment, dict) or not isinstance(environment.get("target"), dict):
        raise UsageError(f"{folder / 'environment.json'} has no target; `mctune report` writes it")
    studies = tuple(Study(path.name.removesuffix(SUFFIX), _read(path, read_study)) for path in study_files(folder))
    compiled, days = folder / COMPILED, folder / HISTORY
    return Content(
        name, rows, environment, studies,
        compiled=read_compiled(compiled) if compiled.exists() else (),
        history=read_history(days) if days.exists() else (),
    )  # fmt: skip


def _read(path: Path, reader: Any) -> Any:
    try:
        return reader(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (UsageError, ArithmeticError, AttributeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is malformed: {' '.join(str(error).split())[:200]}") from error
