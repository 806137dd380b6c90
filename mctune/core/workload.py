"""Named sets of problems to search: ``search_spaces/workloads/*.toml``."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mctune.core.errors import UsageError
from mctune.core.paths import search_spaces_dir
from mctune.core.problem import Problem
from mctune.core.toml import read_toml


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "description": ("a text", lambda value: isinstance(value, str)),
    "trials": ("a number of at least 1", _count),
    "timeout_s": ("a number of seconds over 0", _seconds),
    "segment_lengths": (
        "a list of numbers of at least 1",
        lambda value: isinstance(value, list) and all(map(_count, value)),
    ),
    "gpu": ("a table", lambda value: isinstance(value, dict)),
    "problems": (
        "a list of tables",
        lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value),
    ),
}
_KEYS = tuple(_TYPES)


@dataclass(frozen=True)
class Case:
    """One study: a problem, and the segment lengths it may be computed with, in increasing order.

    ``problem.segment_length`` is the first of them. Both are absent under logarithmic segmentation. ``trials`` is how
    many candidates it has, if not as many as all others.
    """

    problem: Problem
    segment_lengths: tuple[int, ...]
    trials: int | None = field(default=None, compare=False)

    @classmethod
    def of(cls, fields: dict[str, Any], segment_lengths: tuple[int, ...]) -> Case:
        """The case of a problem's public fields; a ``segment_length`` among them is the only candidate.

        Raises:
            UsageError: without any segment length, or if the problem is not valid.
        """
        if fields.get("segmentation") == "logarithmic":
            return cls(Problem.from_dict(fields), ())
        lengths = (fields["segment_length"],) if "segment_length" in fields else tuple(sorted(set(segment_lengths)))
        if not lengths:
            raise UsageError("no segment length to try: give segment_length or at least one of segment_lengths")
        problems = [Problem.from_dict({**fields, "segment_length": length}) for length in lengths]
        return cls(problems[0], lengths)

    def __str__(self) -> str:
        if len(self.segment_lengths) < 2:
            return str(self.problem)
        tried = ",".join(str(length) for length in self.segment_lengths)
        return str(self.problem).replace(f" C{self.problem.segment_length} ", f" C{tried} ")


@dataclass(frozen=True)
class Workload:
    """A named set of cases, and how long to search it.

    Attributes:
        name, description: as ``mctune spaces`` lists it.
        trials: candidates for each case that does not say how many it has.
        timeout_s: seconds for all cases together; ``None`` is no limit.
        cases: each is one study.
    """

    name: str
    description: str
    trials: int
    timeout_s: float | None
    cases: tuple[Case, ...]


def workload_names() -> tuple[str, ...]:
    """The names that :func:`load_workload` knows."""
    return tuple(sorted(path.stem for path in (search_spaces_dir() / "workloads").glob("*.toml")))


def load_workload(name: str, gpu: bool = False, dtype: str = "bfloat16") -> Workload:
    """The workload of that name, for a CPU or for a GPU.

    Raises:
        UsageError: for an unknown name or key, or a problem that is not valid.

    Examples:
        >>> quick = load_workload("quick")
        >>> quick.cases[0].segment_lengths
        (64, 128, 256, 512)
    """
    known = workload_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        raise UsageError(f"unknown workload {name!r}; {hint}")
    return read_workload(search_spaces_dir() / "workloads" / f"{name}.toml", gpu, dtype)


def read_workload(path: Path, gpu: bool = False, dtype: str = "bfloat16") -> Workload:
    """Read one file. A field whose value is a list stands for one problem per value.

    With ``gpu``, the fields of the table ``gpu`` replace those of every problem and the file's own ``timeout_s``, and
    problems that state no dtype are in ``dtype``, that of the GPU's matrix units.

    Raises:
        UsageError: for an unknown or missing key, or a problem that is not valid.
    """
    try:
        values = read_toml(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path.name} is not TOML: {error}") from error
    unknown = sorted(set(values) - set(_KEYS))
    if unknown:
        raise UsageError(f"{path.name}: unknown key {unknown[0]!r}; the keys are {', '.join(_KEYS)}")
    absent = [key for key in ("description", "trials", "problems") if key not in values]
    if absent:
        raise UsageError(f"{path.name}: {absent[0]!r} is missing")
    for key, value in values.items():
        wanted, is_so = _TYPES[key]
        if not is_so(value):
            raise UsageError(f"{path.name}: {key} = {value!r} is not {wanted}")
    lengths = tuple(values.get("segment_lengths", ()))
    replaced = dict(values.get("gpu", {}))
    own_timeout = replaced.pop("timeout_s", values.get("timeout_s"))
    if not (own_timeout is None or _seconds(own_timeout)):
        raise UsageError(f"{path.name}: timeout_s = {own_timeout!r} is not a number of seconds over 0")
    try:
        entries = [on_gpu(entry, dtype) | replaced if gpu else entry for entry in values["problems"]]
        cases = tuple(_case(fields, lengths) for entry in entries for fields in _expand(entry))
    except UsageError as error:
        raise UsageError(f"{path.name}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path.name}: a problem cannot be read ({error}); see `mctune spaces`") from error
    if not cases:
        raise UsageError(f"{path.name}: there is no problem in it")
    return Workload(
        path.stem, values["description"], values["trials"], own_timeout if gpu else values.get("timeout_s"), cases
    )


def _case(fields: dict[str, Any], segment_lengths: tuple[int, ...]) -> Case:
    """The case of a file's problem, which may say how many trials it has.

    Raises:
        UsageError: if it cannot be one.
    """
    fields = dict(fields)
    trials = fields.pop("trials", None)
    if trials is not None and not _count(trials):
        raise UsageError(f"trials = {trials!r} is not a number of at least 1")
    return replace(Case.of(fields, segment_lengths), trials=trials)


def on_gpu(fields: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    """A problem's fields, in the dtype that models are trained in on a GPU unless they state one."""
    return {"dtype": dtype} | fields


def _expand(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    lists = [value if isinstance(value, list) else [value] for value in entry.values()]
    for choice in itertools.product(*lists):
        yield dict(zip(entry, choice, strict=True))
