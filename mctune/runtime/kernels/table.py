"""The tuned table of an emitted package: which kernel serves which problem."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ..errors import PackageError
from ..manifest import Contents
from ..traits import AGGREGATIONS, PASSES, RECURRENCES, alike
from .hardware import Hardware, foreign
from .support import BACKENDS, Served, runs_on, served

NAME = "tuned.json"
FOLDER = "tuned"
"""Where a package that is for several targets has a table for each: ``tuned/<target>.json``."""
SCHEMA = 1
_REMEDY = "emit the package again with `mctune emit`"
_T = TypeVar("_T")
_SOMETIMES = ("segment_length", "top_k", "expansion", "inner_chunk")
"""Sizes of a problem that not every problem has."""
_NARROW = ("bfloat16", "float16")


@dataclass(frozen=True)
class Request:
    """What a call asks a kernel for. ``segment_length`` is ``None`` under logarithmic, ``top_k`` but for ssc, ``E`` and
    ``inner_chunk`` but for deep memories.

    ``pass_`` is ``forward``, ``backward`` or ``decode``. ``hardware`` is the call's device; ``None`` where it makes no
    difference.
    """

    pass_: str
    recurrence: str
    aggregation: str
    segmentation: str
    state_init: str
    B: int
    T: int
    H: int
    Dk: int
    Dv: int
    segment_length: int | None
    top_k: int | None
    dtype: str
    device: str = "cpu"
    E: int | None = None
    inner_chunk: int | None = None
    hardware: Hardware | None = None

    def to_json(self) -> str:
        """The problem in the form that `mctune search --problem` takes; float32 serves every dtype on a CPU."""
        given = {name: value for name, value in vars(self).items() if name != "hardware" and value is not None}
        fields = {name.rstrip("_"): value for name, value in given.items()}
        if self.E is not None:
            # A problem's hidden width is a whole multiple of its key width: the nearest one, where there is none.
            fields["expansion"] = max(1, round(fields.pop("E") / self.Dk))
        if fields.pop("device") == "cpu":
            fields["dtype"] = "float32"
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, eq=False)
class Entry:
    """One tuned kernel: the problem it was tuned at, its backend, its file, its record, and what it was tuned on."""

    problem: Mapping[str, Any]
    backend: str
    kernel: Path
    record: Mapping[str, Any]
    hardware: Hardware | None = None

    @property
    def pass_(self) -> str:
        """``forward``, ``backward`` or ``decode``."""
        pass_: str = self.problem.get("pass", "forward")
        return pass_

    @property
    def family(self) -> str:
        """The family of the memories that it computes."""
        return RECURRENCES[self.problem["recurrence"]].family

    @property
    def ms(self) -> float:
        """The time that it was tuned to, measured or predicted; 0 where the table has none."""
        ms = self.record.get("outcome", {}).get("ms", 0.0)
        return float(ms) if isinstance(ms, int | float) else 0.0

    @property
    def E(self) -> int | None:
        """Hidden width of a deep memory."""
        expansion = self.problem.get("expansion")
        return None if expansion is None else expansion * self.problem["Dk"]

    @property
    def row(self) -> Served:
        """What it was compiled for: by its backend, of its family, on its device kind."""
        rows = served(backend=self.backend, family=self.family)
        device = self.record.get("device")
        return next((row for row in rows if row.device == device), rows[0])

    def serves(self, request: Request) -> bool:
        """Whether the kernel computes what is asked for, at any B, T, H, top_k and any cut into segments."""
        same, row = ("recurrence", "state_init", "Dk", "Dv"), self.row
        return (
            self.pass_ == request.pass_
            and all(self.problem.get(name) == getattr(request, name) for name in same)
            and self.E == request.E
            and _same_read(self.problem["aggregation"], request.aggregation, request.recurrence)
            and runs_on(request.device, row)
            and self._reads(request.dtype, row)
            and self._fits(request, row.fixed)
        )

    def _reads(self, dtype: str, row: Served) -> bool:
        """Kernels that are given one dtype serve every call; others one of 16 bits both of those, unless exact."""
        own = self.problem.get("dtype", "float32")
        either = row.dtype is None and not row.exact
        return own in (row.dtype, dtype) or (either and own in _NARROW and dtype in _NARROW)

    def _fits(self, request: Request, fixed: tuple[str, ...]) -> bool:
        """Whether what the kernel is compiled for, besides widths, is what is asked for."""
        return all(self.problem.get(name) == getattr(request, name) for name in fixed)

    def distance(self, request: Request) -> float:
        """How far the tuned shape is from the asked one: the |log| of each ratio, summed.

        The ratios are those of B * H, T, top_k, the inner chunk, and the segment length; the longest span stands for a
        segment length under logarithmic.
        """
        problem = self.problem
        pairs = [
            (problem.get("B", 1) * problem["H"], request.B * request.H),
            (problem["T"], request.T),
            (
                problem.get("segment_length") or _longest_span(problem["T"]),
                request.segment_length or _longest_span(request.T),
            ),
        ]
        if request.top_k:
            pairs.append((problem.get("top_k") or 1, request.top_k))
        if request.inner_chunk:
            pairs.append((problem.get("inner_chunk") or 1, request.inner_chunk))
        return sum(abs(math.log(tuned / asked)) for tuned, asked in pairs)


def _longest_span(T: int) -> int:
    """The first span under logarithmic segmentation: the greatest power of two up to T."""
    return 1 << T.bit_length() - 1


def _same_read(tuned: str, asked: str, recurrence: str) -> bool:
    """Whether two aggregations are one computation."""
    family = RECURRENCES[recurrence].family
    return tuned == asked or (tuned in AGGREGATIONS and alike(tuned, family) == alike(asked, family))


@dataclass(frozen=True, eq=False)
class Table:
    """The entries of a package's tables in their order; ``target`` names the devices they were tuned on."""

    entries: tuple[Entry, ...] = ()
    target: str | None = None

    @cached_property
    def several(self) -> bool:
        """Whether the entries were tuned on several devices, so that a call's own decides between them."""
        return len({entry.hardware for entry in self.entries}) > 1

    @cached_property
    def numbers(self) -> dict[Entry, int]:
        """The place of each entry."""
        return {entry: number for number, entry in enumerate(self.entries)}


@lru_cache(maxsize=1024)
def find(table: Table, request: Request, backend: str | None = None) -> Entry | None:
    """The serving entry nearest to the request, of one backend if it is named; or ``None``.

    Those tuned on the device of the call come before all others. Of equals the one that took less time when it was
    tuned, then the first.
    """
    here = request.hardware

    def key(entry: Entry) -> tuple[float, float, float]:
        away = foreign(entry.hardware, here) if entry.hardware and here else 0.0
        return away, entry.distance(request), entry.ms

    return min(serving(table, request, backend), key=key, default=None)


def serving(table: Table, request: Request, backend: str | None = None) -> tuple[Entry, ...]:
    """The entries that serve the request, of one backend if it is named."""
    return tuple(entry for entry in table.entries if backend in (None, entry.backend) and entry.serves(request))


def load_table(contents: Contents | None) -> Table:
    """The tables of a verified package as one; empty for ``None``, which is mctune itself.

    Raises:
        PackageError: if there is no table, or one is not what this runtime reads.
    """
    if contents is None:
        return Table()
    names = [name for name in sorted(contents.files) if name == NAME or name.startswith(f"{FOLDER}/")]
    if not names:
        raise PackageError(f"{NAME} is not in the manifest of {contents.root}; {_REMEDY}")
    tables = [_table(name, contents) for name in names]
    entries = tuple(entry for table in tables for entry in table.entries)
    return Table(entries, ", ".join(str(table.target) for table in tables))


def _table(name: str, contents: Contents) -> Table:
    """One table of a package.

    Raises:
        PackageError: if it is not what this runtime reads.
    """
    try:
        data = json.loads(contents.files[name], parse_constant=_refuse)
        if not isinstance(data, dict) or not isinstance(data.get("target"), dict):
            raise ValueError("it has no target")
        if data.get("schema") != SCHEMA:
            raise ValueError(f"it has schema {data.get('schema')!r}, this runtime reads {SCHEMA}")
        if not isinstance(data.get("entries"), list):
            raise ValueError("it has no entries")
        hardware = Hardware.of(data["target"])
        entries = tuple(_entry(record, contents, hardware) for record in data["entries"])
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{contents.root / name} is not a tuned table: {error}; {_REMEDY}") from error
    return Table(entries, str(data["target"].get("name")))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _entry(record: Any, contents: Contents, hardware: Hardware) -> Entry:
    """An entry of the table.

    Raises:
        ValueError: if a field that a call or a launcher reads is missing or of another type, or a file is not listed.
    """
    record = _typed("an entry", record, dict)
    problem = _typed("problem", record.get("problem"), dict)
    for name, known in (("recurrence", RECURRENCES), ("aggregation", AGGREGATIONS)):
        if _typed(name, problem.get(name), str) not in known:
            raise ValueError(f"{name} {problem[name]!r} is not one of {', '.join(known)}")
    if problem.get("pass", "forward") not in PASSES:
        raise ValueError(f"pass {problem['pass']!r} is not one of {', '.join(PASSES)}")
    for name in ("segmentation", "state_init"):
        _typed(name, problem.get(name), str)
    _typed("dtype", problem.get("dtype", "float32"), str)
    for name, value in (
        ("B", problem.get("B", 1)),
        *((name, problem.get(name)) for name in ("T", "H", "Dk", "Dv")),
        *((name, problem[name]) for name in _SOMETIMES if problem.get(name) is not None),
    ):
        if _typed(name, value, int) < 1 or isinstance(value, bool) or value >= 1 << 62:
            raise ValueError(f"{name}={value!r} is not a size")
    backend = _typed("backend", record.get("backend"), str)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    devices = [row.device for row in served(family=RECURRENCES[problem["recurrence"]].family, backend=backend)]
    if record.get("device", *devices[:1]) not in devices:
        raise ValueError(f"device {record['device']!r:.60} is not one of {', '.join(devices)}")
    kernel = _typed("kernel", record.get("kernel"), str)
    _typed("config", record.get("config", {}), dict)
    parts = _typed("parts", record.get("parts", {}), dict)
    if any(not isinstance(flag, str) for flag in _typed("cpu_flags", record.get("cpu_flags", []), list)):
        raise ValueError("cpu_flags are not strings")
    files = [kernel, *(f"{kernel.rpartition('/')[0]}/{_typed('parts', part, str)}" for part in parts.values())]
    if record.get("portable") is not None:
        files.append(_typed("portable", record["portable"], str))
    for file in files:
        if file not in contents.files:
            raise ValueError(f"{file} is not in the manifest of {contents.root}")
    return Entry(problem, backend, contents.root / kernel, record, hardware)


def _typed(name: str, value: Any, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r:.60}, which is not of type {kind.__name__}")
    return value
