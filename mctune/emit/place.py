"""Whether a package can go where it is asked for: looked at before a search, and again before it is written."""

from __future__ import annotations

import importlib.util
import json
import keyword
import os
import sys
import tempfile
import unicodedata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from mctune.core.errors import UsageError
from mctune.core.target import Target
from mctune.emit.replace import settle
from mctune.runtime import manifest
from mctune.runtime.kernels.table import NAME as TABLE

_FILES = (manifest.NAME, "__init__.py", "README.md")


def check_out(out: Path, target: Target, *, replace: bool) -> None:
    """Make the folder ``out``, and see that a package for ``target`` can be written there.

    Raises:
        UsageError: if it cannot be imported by that name, holds files that are not a package's or, unless ``replace``,
            a package for another target, or cannot be written to.
    """
    check_name(out)
    check_place(out)
    if not replace:
        _check_target(out, target)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for folder in (out, *(out / name for name in manifest.FOLDERS)):
            if folder.is_dir():
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(bytes(1 << 16))
                    file.flush()
        settle(out)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written to: {error.strerror or error}") from error


def check_name(out: Path) -> None:
    """Whether ``from <name> import ...`` finds a package at ``out``, and nothing else that has its name.

    Raises:
        UsageError: if not.
    """
    name, remedy = out.name, "name the directory like a Python module (mctune_cpu)"
    if not name.isidentifier() or keyword.iskeyword(name) or unicodedata.normalize("NFKC", name) != name:
        raise UsageError(f"{name or str(out)!r} cannot be imported: {remedy}")
    if name in sys.stdlib_module_names or name in sys.builtin_module_names or name == "__main__":
        raise UsageError(f"{name!r} is a module of Python's standard library, and would hide it: {remedy}")
    if (found := _elsewhere(out)) is not None:
        raise UsageError(f"{name!r} is a module that is installed here ({found}), and would hide it: {remedy}")
    if name not in sys.modules and name in _operators():
        raise UsageError(f"torch has operators under the name {name!r} already: {remedy}")


def _elsewhere(out: Path) -> str | None:
    """Where a module of that name is found that is not ``out`` itself."""
    try:
        spec: ModuleSpec | None = importlib.util.find_spec(out.name)
    except (ImportError, ValueError):
        return "it is imported already"
    if spec is None or spec.origin is None or not spec.has_location:
        return None  # none, or folders without an __init__.py, which any package of the name comes before
    origin = os.path.abspath(spec.origin)
    here = os.path.realpath(out)
    return None if os.path.realpath(os.path.dirname(origin)) == here or _package(Path(origin).parent) else origin


def _package(folder: Path) -> bool:
    """Whether an emitted package lies there; another of the name may be on the path too."""
    return (folder / TABLE).is_file() and (folder / manifest.NAME).is_file()


def _operators() -> frozenset[str]:
    """The namespaces of torch's operators: a package has one of its own name."""
    import torch

    return frozenset(name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names())


def check_place(out: Path) -> None:
    """Whether ``out`` is free for a package, or holds an earlier one.

    Raises:
        UsageError: if it holds files that are in the way.
    """
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file; give a directory")
        strangers = [out / name for name in (*manifest.FOLDERS, *_FILES, TABLE) if os.path.lexists(out / name)]
    except OSError as error:
        raise UsageError(f"--out {out} cannot be looked at: {error.strerror}") from error
    if strangers and not _is_ours(out):
        raise UsageError(
            f"{strangers[0]} is in the way: {out} is not a package that mctune wrote (it has no {TABLE} of one); give "
            "another --out"
        )


def _is_ours(out: Path) -> bool:
    """One of its two documents is enough: emission mends a package that has lost the other."""
    table, listing = read_json(out / TABLE), read_json(out / manifest.NAME)
    return {"schema", "entries"} <= set(table) or TABLE in (listing.get("files") or ())


def _check_target(out: Path, target: Target) -> None:
    """Whether a package at ``out`` is for that target, and can be added to."""
    known = read_json(out / TABLE).get("target")
    if not isinstance(known, dict):
        return
    theirs = [str(known.get(name)) for name in ("name", "title", "arch")]
    ours = [target.name, target.title, target.arch]
    if theirs != ours:
        raise UsageError(
            f"{out} is a package for another target, {', '.join(theirs)}, not {', '.join(ours)}: give another --out, "
            "or --replace to write over it"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
