"""A history of times: a JSON-Lines file with one line for each time of each problem, in the order of being added."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mctune.core.errors import UsageError
from mctune.core.problem import Problem
from mctune.report.files import write_whole
from mctune.report.markdown import plain_text
from mctune.report.rows import HOW, Row, check_name

_LONGEST = 200


@dataclass(frozen=True)
class Record:
    """One time of one problem on one target at one commit.

    Args:
        date: when it was measured, in the form of ISO 8601: a day, or a time with or without an offset from UTC.
        commit: of the code that was measured, or empty.
        target, title: the target's name, and what its machine is called.
        backend: what produced the kernel.
        how: ``measured``, or ``predicted`` by a cost model.
        ms, low, high: median, 20th and 80th percentile in milliseconds; without a spread the last two are ``None``.

    Raises:
        UsageError: naming the field that is not what it must be.

    Examples:
        >>> problem = Problem(T=64, H=1, Dk=8, Dv=8, segment_length=16)
        >>> record = Record("2026-11-23", "3f2c1ab", "cpu", "AMD EPYC", problem, "tvm", "measured", 1.5)
        >>> record.when.isoformat()
        '2026-11-23T00:00:00+00:00'
        >>> Record.from_line(record.to_line()) == record
        True
    """

    date: str
    commit: str
    target: str
    title: str
    problem: Problem
    backend: str
    how: str
    ms: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        check_date(self.date)
        check_name("target", self.target)
        for name in ("commit", "title", "backend"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > _LONGEST or plain_text(value) != value:
                raise UsageError(f"{name} {value!r:.60} is not one line of at most {_LONGEST} characters")
        if self.how not in HOW:
            raise UsageError(f"how={self.how!r:.60} is not one of {', '.join(HOW)}")
        for name in ("ms", "low", "high"):
            value = getattr(self, name)
            if value is None and name != "ms":
                continue
            if not isinstance(value, float) or not 0 < value < math.inf:
                raise UsageError(f"{name}={value!r:.60} is not a positive time in milliseconds")

    @classmethod
    def of(cls, row: Row, *, date: str, commit: str = "", title: str = "") -> Record:
        """The record of a row."""
        low, high = (None if one is None else float(one) for one in (row.low, row.high))
        title = plain_text(title)[:_LONGEST]
        return cls(date, commit, row.target, title, row.problem, row.backend, row.how, float(row.ms), low, high)

    @property
    def when(self) -> datetime:
        """The date as a moment, in UTC where it does not say otherwise."""
        return check_date(self.date)

    def to_line(self) -> str:
        """One line of JSON, without its end."""
        values = {**vars(self), "problem": self.problem.to_dict()}
        return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> Record:
        """The inverse of :meth:`to_line`.

        Raises:
            UsageError: if the line is not one.
        """
        values = json.loads(line)
        if not isinstance(values, dict) or set(values) != set(cls.__dataclass_fields__):
            raise UsageError(f"it is not an object of {', '.join(cls.__dataclass_fields__)}")
        numbers = {name: float(values[name]) if type(values[name]) is int else values[name] for name in _TIMES}
        return cls(**{**values, **numbers, "problem": Problem.from_dict(values["problem"])})


_TIMES = ("ms", "low", "high")


def check_date(text: object) -> datetime:
    """A date in the form of ISO 8601 as a moment, in UTC where it does not say otherwise.

    Raises:
        UsageError: if it is none.
    """
    try:
        if not isinstance(text, str):
            raise ValueError
        # Python 3.10 knows no Z.
        moment = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        raise UsageError(f"date {text!r:.60} is not in the form of 2026-11-23 or 2026-11-23T04:00:00Z") from None


def read_history(path: Path) -> tuple[Record, ...]:
    """The records of a file, in its order.

    Raises:
        UsageError: if it cannot be read, or naming the line that is not a record.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file; a history is one line of JSON for each time")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    return tuple(_records(path, data))


def _records(path: Path, data: bytes) -> Iterator[Record]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield Record.from_line(line.decode())
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            told = " ".join(plain_text(str(error)).split())[:200]
            raise UsageError(f"{path}, line {number}: {type(error).__name__} {told}") from error


def check_history(path: Path) -> None:
    """See that a history can be appended to, before what will be appended is measured.

    Raises:
        UsageError: if what is there is not a history, or its folder takes no file.
    """
    real = Path(os.path.realpath(path))
    with _alone(real.parent):
        _known(real)
        try:
            with TemporaryFile(dir=real.parent):
                pass
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def _known(path: Path) -> tuple[Record, ...]:
    return read_history(path) if os.path.lexists(path) else ()


def append_history(path: Path, records: Iterable[Record]) -> int:
    """Add the records that are not there yet, and say how many were added; the file is made where it is absent.

    Whoever reads meanwhile sees the file as it was or as it will be, and two that append at once do so in turn.

    Raises:
        UsageError: if what is there is not a history, or the file cannot be written.
    """
    real = Path(os.path.realpath(path))
    with _alone(real.parent):
        known = set(_known(real))
        before = real.read_text(encoding="utf-8") if known else ""
        added = [one for one in dict.fromkeys(records) if one not in known]
        if added:
            lines = (before.rstrip("\n"), *(one.to_line() for one in added))
            write_whole(real, "\n".join(filter(None, lines)) + "\n")
    return len(added)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Others that append to a file of the folder wait."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to: {error.strerror or error}") from error
    try:
        with suppress(OSError):  # where the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def dated(environment: Mapping[str, Any], date: str | None, commit: str | None) -> tuple[str, str]:
    """The date and the commit of a result: what its user says, or what its environment does.

    Raises:
        UsageError: if neither says the date.
    """
    found = date or environment.get("date")
    if not found:
        raise UsageError("a history needs the date of the new times: give --date 2026-11-23, or a commit as NEW")
    check_date(found)
    return str(found), str(commit or environment.get("commit") or "")
