"""Two packages' kernels for the same problems, timed by turns in one process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mctune.core.config import Config
from mctune.core.errors import DeviceError, MctuneError, UsageError
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.measure.bench import Note, threads
from mctune.measure.side_by_side import side_by_side
from mctune.measure.timing import ratio, summary
from mctune.report.compare import ONLY_NEW, ONLY_OLD, Pair, timed_by_turns
from mctune.report.rows import Row, sort_key
from mctune.report.write import rows_of_tuned
from mctune.verify.at_size import make
from mctune.verify.package import launcher_of, load_package, read_entries
from mctune.verify.passes import wants

_LIMIT_S = 120.0
_Key = tuple[Problem, str, str]
"""A problem, a backend, and the kind of device."""


@dataclass(frozen=True)
class _Package:
    """A package: what its user calls it, its module, and its fastest entry for each key."""

    path: Path
    module: ModuleType
    entries: dict[_Key, Any]

    @property
    def target(self) -> str:
        return str(self.module.runtime.kernels.dispatch.TABLE.target)


def packages_by_turns(old: Path, new: Path, *, rounds: int, threshold: float, note: Note) -> list[Pair]:
    """Time what both packages have a kernel for: each kernel alone, as a search times its finalists.

    Every kernel is held to mctune's PyTorch path on the inputs that it is timed on. What only one package has a kernel
    for has the time that its search saw, where it has one.

    Args:
        threshold: the share by which a time must differ, beyond what the sign test says.

    Raises:
        UsageError: if one of them is not a package, or they have no problem, backend and device in common.
        DeviceError: if they are for a GPU, and there is none here.
        MctuneError: if a kernel cannot be run here, or is wrong.
    """
    for path in (old, new):
        read_entries(path)
    with tempfile.TemporaryDirectory(prefix="mctune_") as folder:
        before, after = (_loaded(path, Path(folder), side) for path, side in ((old, "old"), (new, "new")))
        both = [key for key in after.entries if key in before.entries]
        if not both:
            raise UsageError(f"{old} and {new} have no problem and backend in common")
        if not torch.cuda.is_available() and any(device != "cpu" for _, _, device in both):
            raise DeviceError(f"{old} and {new} have kernels for a GPU, and there is none here; leave --measure out")
        pairs = []
        with threads(resolve("cpu")[0].cores):
            for number, key in enumerate(both):
                note(f"{number + 1}/{len(both)} {key[0]} by {key[1]}")
                pairs.append(_pair(before, after, key, rounds, threshold))
    pairs += [Pair(row, None, None, ONLY_OLD) for row in _alone(before, after)]
    pairs += [Pair(None, row, None, ONLY_NEW) for row in _alone(after, before)]
    return sorted(pairs, key=lambda pair: sort_key(pair.row))


def _loaded(path: Path, folder: Path, side: str) -> _Package:
    """The package under a name of its own: two of one name cannot be imported, nor can their operators."""
    copy = folder / f"{folder.name}_{side}"
    try:
        shutil.copytree(path, copy, symlinks=True, ignore=shutil.ignore_patterns("search", "__pycache__"))
    except (OSError, shutil.Error) as error:
        raise MctuneError(f"{path} cannot be copied to be imported: {str(error)[:200]}") from error
    module = load_package(copy)
    found: dict[_Key, Any] = {}
    for entry in module.runtime.kernels.dispatch.TABLE.entries:
        key = Problem.from_dict(dict(entry.problem)), entry.backend, entry.row.device
        if key not in found or entry.ms < found[key].ms:
            found[key] = entry
    return _Package(path, module, found)


def _pair(old: _Package, new: _Package, key: _Key, rounds: int, threshold: float) -> Pair:
    problem, backend, _ = key
    entries = old.entries[key], new.entries[key]
    kernels = [launcher_of(package.module, entry) for package, entry in zip((old, new), entries, strict=True)]
    # What a backward is given of its forward is each kernel's own choice.
    names = [wants(kernel, problem) if problem.pass_ == "backward" else () for kernel in kernels]
    cases = {of: make(problem, 0, of, kernels[0].device) for of in dict.fromkeys(names)}
    samples, wrong = side_by_side(kernels, [cases[of] for of in names], rounds=rounds, limit_s=_LIMIT_S)
    for number, why in wrong.items():
        path = (old, new)[number].path
        raise MctuneError(f"{path}, {problem}: {why}; `mctune verify {path}` holds the whole package")
    rows = []
    for entry, of in zip(entries, samples, strict=True):
        ms, low, high = summary(of)
        config = Config.of(dict(entry.record["config"]))
        rows.append(Row(new.target, problem, backend, config, "measured", ms, low, high, len(of)))
    return timed_by_turns(rows[0], rows[1], (samples[0], samples[1]), ratio(samples[1], samples[0]), threshold)


def _alone(mine: _Package, other: _Package) -> Iterator[Row]:
    """What one package has and the other has not, with the times that its search saw."""
    records = [dict(entry.record) for key, entry in mine.entries.items() if key not in other.entries]
    yield from rows_of_tuned({"entries": records, "target": {"name": mine.target}, "versions": {}})
