"""The tuned table of an emitted package: which kernel serves which problem."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ..errors import PackageError
from ..manifest import NAME as MANIFEST
from ..manifest import check_manifest
from ..traits import AGGREGATIONS, RECURRENCES, alike
from .support import Served, served

NAME = "tuned.json"
SCHEMA = 1
_NARROW = ("bfloat16", "float16")


@dataclass(frozen=True)
class Request:
    """What a call asks a kernel for. ``segment_length`` is ``None`` under logarithmic, ``top_k`` but for ssc.

    ``pass_`` is ``forward``, ``backward`` or ``decode``.
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

    def to_json(self) -> str:
        """The problem in the form that `mctune search --problem` takes; float32 serves every dtype on a CPU."""
        fields = {name.rstrip("_"): value for name, value in vars(self).items() if value is not None}
        if fields.pop("device") == "cpu":
            fields["dtype"] = "float32"
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, eq=False)
class Entry:
    """One tuned kernel: the problem it was tuned at, its backend, its file, and its whole record in the table."""

    problem: Mapping[str, Any]
    backend: str
    kernel: Path
    record: Mapping[str, Any]

    @property
    def pass_(self) -> str:
        """``forward``, ``backward`` or ``decode``."""
        pass_: str = self.problem.get("pass", "forward")
        return pass_

    @property
    def rows(self) -> tuple[Served, ...]:
        """What its backend serves of its family: more than one row if it does so on several kinds of devices."""
        return served(backend=self.backend, family=RECURRENCES[self.problem["recurrence"]].family)

    def serves(self, request: Request) -> bool:
        """Whether the kernel computes what is asked for, at any B, T, H, top_k and any cut into segments."""
        same = ("recurrence", "state_init", "Dk", "Dv")
        return (
            self.pass_ == request.pass_
            and all(self.problem.get(name) == getattr(request, name) for name in same)
            and _same_read(self.problem["aggregation"], request.aggregation, request.recurrence)
            and any(
                self._reads(request.dtype, row.dtype) for row in self.rows if self._runs_on(request.device, row.device)
            )
        )

    def _reads(self, dtype: str, given: str | None) -> bool:
        """Kernels that are ``given`` one dtype serve every call; others one of 16 bits serve both of those."""
        own = self.problem.get("dtype", "float32")
        return own in (given, dtype) or (given is None and own in _NARROW and dtype in _NARROW)

    def _runs_on(self, device: str, own: str) -> bool:
        """Under Triton's interpreter, a GPU's kernels run on a CPU."""
        interpreted = self.backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        return device == own or (interpreted and device == "cpu")

    def distance(self, request: Request) -> float:
        """How far the tuned shape is from the asked one: the |log| of each ratio, summed.

        The ratios are those of B * H, T, top_k, and the segment length; the longest span stands for a segment length
        under logarithmic.
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
    """The entries of a tuned.json in its order; ``target`` names the device they were tuned on."""

    entries: tuple[Entry, ...] = ()
    target: str | None = None

    @cached_property
    def numbers(self) -> dict[Entry, int]:
        """The place of each entry."""
        return {entry: number for number, entry in enumerate(self.entries)}


@lru_cache(maxsize=1024)
def find(table: Table, request: Request, backend: str | None = None) -> Entry | None:
    """The serving entry nearest to the request (the first of equals), of one backend if it is named; or ``None``."""
    return min(serving(table, request, backend), key=lambda entry: entry.distance(request), default=None)


def serving(table: Table, request: Request, backend: str | None = None) -> tuple[Entry, ...]:
    """The entries that serve the request, of one backend if it is named."""
    return tuple(entry for entry in table.entries if backend in (None, entry.backend) and entry.serves(request))


def load_table(root: Path) -> Table:
    """The table of the package at ``root``, after checking every file against the manifest; empty without either.

    Raises:
        PackageError: if a file is missing, has changed, or is not what the table needs.
    """
    path = root / NAME
    if not path.is_file() and not (root / MANIFEST).is_file():
        return Table()
    vouched = check_manifest(root)
    if NAME not in vouched:
        raise PackageError(f"{NAME} is not in the manifest of {root}; emit the package again with `mctune emit`")
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("schema") != SCHEMA:
        raise PackageError(
            f"{path} has schema {data.get('schema')!r}, this runtime reads {SCHEMA}; emit the package again with "
            "`mctune emit`"
        )
    entries = []
    for record in data["entries"]:
        beside = Path(record["kernel"]).parent
        files = [record["kernel"], *((beside / part).as_posix() for part in record.get("parts", {}).values())]
        for file in files:
            if file not in vouched:
                raise PackageError(
                    f"{file} is in {NAME} and not in the manifest of {root}; emit the package again with `mctune emit`"
                )
        kernel = root / record["kernel"]
        entries.append(Entry(record["problem"], record["backend"], kernel, record))
    return Table(tuple(entries), str(data.get("target", {}).get("name")))
