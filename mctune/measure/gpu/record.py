"""What `mctune bench` keeps from run to run: rows, what may not be tried again, and what is being tried."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mctune.backends import get_backend
from mctune.backends.presence import here, seen
from mctune.core.environment import version
from mctune.core.errors import DeviceError
from mctune.core.outcome import Timed
from mctune.core.target import Target, resolve
from mctune.measure.gpu.goals import Timing
from mctune.measure.gpu.others import DISTRIBUTIONS
from mctune.measure.gpu.shapes import KINDS, Shape

TRIES = 2
ALL = "*"
"""In place of a contender: the whole shape."""
Identity = dict[str, Any]


def this_target() -> Target:
    """This machine's GPU; for a rehearsal without one, any."""
    found = here(seen())
    if found is not None:
        return found
    if os.environ.get("TRITON_INTERPRET") == "1":
        return resolve("h200")[0]
    raise DeviceError(
        "there is no GPU here that mctune knows (`mctune targets`); TRITON_INTERPRET=1 with --small rehearses without"
    )


def identity(package: Path | None) -> Identity:
    """What rows depend on besides their shape: of another identity they are measured again."""
    gpu = seen()
    some = [Shape(kind, 1, 16384, 16, 128, 256) for kind in KINDS]
    return {
        "gpu": gpu.name if gpu else "none: Triton's interpreter, a rehearsal",
        "backend": get_backend("triton").identity(),
        "computes": {name: [str(shape.problem(name)) for shape in some] for name in ("grm", "ssc", "base")},
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "package": json.loads((package / "manifest.json").read_text())["files"]["tuned.json"] if package else None,
    }


@dataclass
class Record:
    """What was found so far; every addition is a line of the file at ``path``.

    Attributes:
        found: the timings of a shape.
        partial: shapes that were measured without what had no time to compile.
        late: the timings of a shape at which what compiles longest was compared with mctune's, later.
        bad: why a contender is not tried again at a shape.
        slow: how often it was given up while it compiled.
    """

    path: Path
    made_by: Identity
    found: dict[Shape, list[Timing]] = field(default_factory=dict)
    partial: set[Shape] = field(default_factory=set)
    late: dict[Shape, list[Timing]] = field(default_factory=dict)
    bad: dict[tuple[Shape, str], str] = field(default_factory=dict)
    slow: Counter[tuple[Shape, str]] = field(default_factory=Counter)

    @classmethod
    def read(cls, path: Path, made_by: Identity, decisive: Sequence[Shape]) -> Record:
        """That of earlier runs; rows of the decisive shapes only with the same package, which a search improves.

        What was compared late is no matter of the package.
        """
        record = cls(path, made_by)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines:
            values = json.loads(line)
            shape, was = Shape(**values["shape"]), values["identity"]
            alike = {**was, "package": made_by["package"]} == made_by
            if "bad" in values or "slow" in values:
                kind = "bad" if "bad" in values else "slow"
                known = {
                    n: w for n, w in values[kind].items() if was == made_by or (alike and not n.startswith("mctune"))
                }
                record._leave_out(shape, known, kind == "slow")
                continue
            late = values.get("late", False)
            if was == made_by or (alike and (late or shape not in decisive)):
                timings = [Timing(**{**t, "timed": Timed(**t["timed"])}) for t in values["timings"]]
                others = [timing for timing in timings if not timing.name.startswith("mctune")]
                record._take(
                    shape, timings if was == made_by or not late else others, late, values.get("partial", False)
                )
        return record

    def add(self, shape: Shape, timings: Sequence[Timing], *, late: bool = False, partial: bool = False) -> None:
        """A shape was measured."""
        self._take(shape, timings, late, partial)
        self._write(shape, {"timings": [asdict(t) for t in timings], "late": late, "partial": partial})

    def leave_out(self, shape: Shape, why: Mapping[str, str], *, slow: bool = False) -> None:
        """Contenders by name, or ``ALL``, are not tried again at a shape; slow ones are the second time: what they
        have compiled is on disk."""
        self._leave_out(shape, why, slow)
        self._write(shape, {"slow" if slow else "bad": dict(why)})

    def _leave_out(self, shape: Shape, why: Mapping[str, str], slow: bool) -> None:
        for name, reason in why.items():
            self.slow[shape, name] += slow
            if not slow or self.slow[shape, name] >= TRIES:
                self.bad[shape, name] = reason

    def everything(self) -> dict[Shape, list[Timing]]:
        """What was found, with what was compared late beside it, where anything was."""
        return {shape: [*early, *_further(self.late.get(shape, []), early)] for shape, early in self.found.items()}

    def _take(self, shape: Shape, timings: Sequence[Timing], late: bool, partial: bool) -> None:
        (self.late if late else self.found)[shape] = list(timings)
        if not late:
            (self.partial.add if partial else self.partial.discard)(shape)

    def _write(self, shape: Shape, values: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"shape": asdict(shape), **values, "identity": self.made_by}) + "\n")


def _further(timings: Sequence[Timing], known: Sequence[Timing]) -> list[Timing]:
    return [timing for timing in timings if timing.name not in {other.name for other in known}]


@dataclass(frozen=True)
class Trying:
    """A file that names what is being tried, for whoever looks after the process that tries it."""

    path: Path

    def begin(self, shape: Shape, name: str) -> None:
        """It is this contender's turn, or, with ``ALL``, that of all that are timed together."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps([asdict(shape), name]), encoding="utf-8")

    def end(self) -> None:
        """Nothing is being tried."""
        self.path.unlink(missing_ok=True)

    def now(self) -> tuple[Shape, str] | None:
        """What is being tried."""
        try:
            shape, name = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return Shape(**shape), name

    def since(self) -> float | None:
        """When that began, of ``time.time``."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return None
