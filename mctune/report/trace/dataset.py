"""A dataset of flashinfer-bench: packages written as one, and read back."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mctune.core.errors import UsageError
from mctune.report.rows import Row, sort_key
from mctune.report.trace.definition import OP_TYPE, definition, problem_of, workload
from mctune.report.trace.evaluation import measured_row, predicted_row, trace
from mctune.report.trace.gates import gates_file
from mctune.report.trace.reference import check_written
from mctune.report.trace.solution import AUTHOR, TOLD, solution
from mctune.report.write import Document, of_targets, row_of_entry

FOLDER = "flashinfer-trace"
_PARTS = ("definitions", "workloads", "solutions", "traces", "blob")
_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
Note = Callable[[str], None]
Object = dict[str, Any]


@dataclass(frozen=True)
class Package:
    """A tuned package: its table, and the bytes of each of its files by their paths there."""

    document: Document
    files: Mapping[str, bytes]


def write_flashinfer_trace(packages: Sequence[Package], out: Path, note: Note) -> dict[Path, int]:
    """Write ``out/<target>/flashinfer-trace`` for every target, in the place of what was there.

    Args:
        packages: what to write; those of one target become one dataset.
        out: the folder of results.
        note: is told of every entry that is left out, and why.

    Returns:
        The Solutions of each folder.

    Raises:
        UsageError: if nothing of a target can be written, or a folder holds something else.
    """
    written = {}
    for target in of_targets([package.document for package in packages]):
        mine = [one for one in packages if one.document.environment["target"]["name"] == target]
        folder, files, count = out / target / FOLDER, *_files(mine, note)
        if not count:
            raise UsageError(f"nothing of {target} can be written as {FOLDER}")
        _check_place(folder)
        try:
            _replace(folder, files)
        except OSError as error:
            raise UsageError(f"{error.filename or folder} cannot be written: {error.strerror}") from error
        written[folder] = count
    return written


def _files(packages: Sequence[Package], note: Note) -> tuple[dict[str, bytes], int]:
    """Every file of a dataset by its path, and the number of Solutions."""
    files: dict[str, bytes] = {}
    workloads: dict[str, dict[str, Object]] = {}
    traces: dict[str, dict[str, Object]] = {}
    solutions = set()
    for row, made, target in _made(packages, note):
        name, set_up = made["definition"], workload(row.problem)
        files[f"definitions/{OP_TYPE}/{name}.json"] = _json(definition(row.problem))
        files[f"solutions/{AUTHOR}/{OP_TYPE}/{name}/{made['name']}.json"] = _json(made)
        solutions.add(made["name"])
        bare = {"definition": name, "workload": set_up, "solution": None, "evaluation": None}
        workloads.setdefault(name, {})[set_up["uuid"]] = bare
        blobs = {one["path"] for one in set_up["inputs"].values() if one["type"] == "safetensors"}
        files |= {path: gates_file(row.problem, set_up["uuid"]) for path in blobs}
        if row.how == "measured":
            traces.setdefault(name, {})[made["name"]] = trace(row, made, target)
    for folder, lists in ((f"workloads/{OP_TYPE}", workloads), (f"traces/{AUTHOR}/{OP_TYPE}", traces)):
        for name, found in lists.items():
            ordered = sorted(found.values(), key=_latency)
            files[f"{folder}/{name}.jsonl"] = "".join(json.dumps(one) + "\n" for one in ordered).encode()
    return files, len(solutions)


def _latency(one: Object) -> tuple[float, str]:
    """The fastest first: where speedups are unknown, a reader takes the first as the best."""
    evaluation = one["evaluation"]
    return evaluation["performance"]["latency_ms"] if evaluation else 0.0, one["workload"]["uuid"]


def _made(packages: Sequence[Package], note: Note) -> Iterator[tuple[Row, Object, Object]]:
    """Each entry's row, its Solution and its target, in reading order."""
    found = []
    for package in packages:
        tuned = package.document.tuned or {"entries": ()}
        for entry in tuned["entries"]:
            row = row_of_entry(tuned, entry)
            if row is None:
                continue
            try:
                check_written(row.problem)
                found.append((row, solution(row, tuned, entry, package.files), dict(tuned["target"])))
            except UsageError as error:
                note(f"left out of {FOLDER}: {error}")
    yield from sorted(found, key=lambda one: (sort_key(one[0]), one[1]["name"]))


def _json(values: Object) -> bytes:
    """As it is: the order of inputs and outputs is an interface's."""
    return (json.dumps(values, indent=1, allow_nan=False) + "\n").encode()


def _check_place(folder: Path) -> None:
    """Whether a dataset can be written there: nothing is, or one of ours.

    Raises:
        UsageError: naming what is in the way.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder} is no folder; give another --out, or remove it")
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in _PARTS) if folder.is_dir() else ()
    if strangers:
        raise UsageError(f"{folder / strangers[0]} is in the way: mctune did not write it; give another --out")


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``folder`` beside its place, and put it there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    beside, before = (folder.with_name(f".{word}-{mark}-{folder.name}") for word in ("new", "old"))
    try:
        for name, data in files.items():
            path = beside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if folder.exists():
            os.replace(folder, before)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def from_flashinfer_trace(folder: Path) -> tuple[Row, ...]:
    """The rows of a dataset that :func:`write_flashinfer_trace` wrote, in reading order.

    Solutions of others, which do not say how they were tuned, have no row.

    Raises:
        UsageError: naming the file that is not what it should be.
    """
    definitions = {one["name"]: one for one in _read(folder, "definitions", "*.json")}
    told: dict[str, tuple[Object, Object]] = {}
    rows = []
    for made in _read(folder, "solutions", "*.json"):
        with _Blame(folder, made["name"]):
            said = next((json.loads(one["content"]) for one in made["sources"] if one["path"] == TOLD), None)
            if said is None:
                continue
            told[made["name"]] = said, definitions[made["definition"]]
            if "predicted" in said:
                rows.append(predicted_row(said, problem_of(told[made["name"]][1], said["workload"])))
    for one in _read(folder, "traces", "*.jsonl"):
        if one["solution"] in told:
            with _Blame(folder, f"the trace of {one['solution']}"):
                said, defined = told[one["solution"]]
                rows.append(measured_row(said, problem_of(defined, one["workload"]), one["evaluation"]))
    return tuple(sorted(rows, key=sort_key))


class _Blame:
    """Turns what malformed data raises into one line that names where it stands."""

    def __init__(self, folder: Path, what: str) -> None:
        self._where = f"{folder}: {what:.200}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (*_MALFORMED, UsageError)):
            text = " ".join(str(error).split())[:200]
            raise UsageError(f"{self._where} is malformed: {type(error).__name__} {text}") from error


def _read(folder: Path, part: str, pattern: str) -> Iterator[Object]:
    """Every object of a part of a dataset, from files with one each, or one a line."""
    for path in sorted((folder / part).rglob(pattern)):
        with _Blame(folder, str(path.relative_to(folder))):
            text = path.read_text(encoding="utf-8")
            texts = [text] if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
            values = [json.loads(one) for one in texts]
            needed = {"definitions": ("name",), "solutions": ("name", "definition", "sources")}.get(part, ())
            for one in values:
                if not isinstance(one, dict) or any(name not in one for name in needed):
                    raise UsageError(f"is no object of {part}")
        yield from values
