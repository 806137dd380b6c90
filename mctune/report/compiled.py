"""What the compiler made of the kernels of a table: ``compiled.json``, which `mctune explain --package` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.problem import Problem
from mctune.report.rows import check_name

COMPILED = "compiled.json"
_IS_NOT = "is not what `mctune explain --package DIR --json` prints"
COLUMNS = (
    ("kernel", "kernel"), ("blocks", "blocks"), ("warps", "warps"), ("regs", "registers"), ("stack", "spilled B"),
    ("KiB", "shared KiB"), ("res", "resident blocks"), ("occupancy", "occupancy"), ("bound", "bound by"),
    ("us", "predicted us"),
)  # fmt: skip
"""Names of a launch in the document, and what they are called on a page; the last is added over equal launches."""


@dataclass(frozen=True)
class Compiled:
    """One pass: a mapping for each of its launches, by the names of :data:`COLUMNS` and more."""

    problem: Problem
    config: Config
    backend: str
    launches: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Explanation:
    """A whole document, as it was printed, and the target that it is about."""

    target: str
    document: Mapping[str, Any]


def read_explanation(path: Path) -> Explanation | None:
    """The document at ``path`` if it says what a compiler made of kernels; ``None`` for every other file.

    Raises:
        UsageError: if it is one and malformed.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # the reader of tables says what is the matter
    if not isinstance(document, dict) or "explained" not in document:
        return None
    _compiled(path, document)
    return Explanation(check_name("target", document.get("target")), document)


def read_compiled(path: Path) -> tuple[Compiled, ...]:
    """Read ``compiled.json``.

    Raises:
        UsageError: if it is absent or malformed.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path} {_IS_NOT}: {str(error)[:200]}") from error
    return _compiled(path, document)


def _compiled(path: Path, document: Any) -> tuple[Compiled, ...]:
    try:
        return compiled_of(document)
    except (UsageError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{path} {_IS_NOT}: {str(error)[:200]}") from error


def compiled_of(document: Mapping[str, Any]) -> tuple[Compiled, ...]:
    """The inverse of the document."""
    return tuple(
        Compiled(
            Problem.from_dict(one["problem"]), Config.of(one["config"]), str(one["backend"]),
            tuple(dict(launch) for launch in one["launches"]),
        )
        for one in document["explained"]
    )  # fmt: skip
