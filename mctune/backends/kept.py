"""Kernels that are kept on disk between searches, each written whole."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from mctune.runtime.whole import note_of, take_note


def keep(scratch: Path, path: Path) -> None:
    """Move a file to ``path``, on the same disk, and note its SHA-256 beside it."""
    note = take_note(scratch)
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)
    note.replace(note_of(path))


def write_whole(path: Path, text: str) -> None:
    """Have a file say ``text``: it is written beside and moved there, unless it says so already."""
    with suppress(OSError, ValueError):
        if path.read_text(encoding="utf-8") == text:
            return
    scratch = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


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
