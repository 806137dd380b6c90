"""Kernels that are kept on disk between searches: written whole, and looked at before they are used.

A machine that stops half-way through a write, or a full disk, leaves files that end early; loading one may well be a
bus error, which would count as the candidate's.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path


def keep(scratch: Path, path: Path) -> None:
    """Move a file to ``path``, on the same disk, and note its SHA-256 beside it."""
    note = scratch.with_name(f"{scratch.name}.sha256")
    note.write_text(_digest(scratch), encoding="ascii")
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)
    note.replace(_note(path))


def write_whole(path: Path, text: str) -> None:
    """Have a file say ``text``: it is written beside and moved there, unless it says so already."""
    with suppress(OSError, ValueError):
        if path.read_text(encoding="utf-8") == text:
            return
    scratch = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def is_whole(*paths: Path) -> bool:
    """Whether all of these are what :func:`keep` has left."""
    try:
        return all(_note(path).read_text(encoding="ascii") == _digest(path) for path in paths)
    except (OSError, ValueError):
        return False


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def scratch_in(folder: Path, what: str) -> tempfile.TemporaryDirectory[str]:
    """A directory for what is not finished yet; should this process be killed, :func:`sweep` finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f"{what}-{os.getpid()}-", dir=folder)


def sweep(folder: Path, but: str = "") -> None:
    """Remove what processes that are no more have left of :func:`scratch_in`, except for one purpose."""
    for path in folder.glob("*-*"):
        found = re.fullmatch(r"([a-z]+)-(\d+)(-\w+)?", path.name)
        if found and found[1] != but and path.is_dir() and not Path("/proc", found[2]).exists():
            shutil.rmtree(path, ignore_errors=True)
