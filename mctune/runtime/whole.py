"""Whether a file on disk is as it was written: its SHA-256 stands beside it.

A machine that stops half-way through a write, or a full disk, leaves files that end early; loading one may well be a
bus error.
"""

from __future__ import annotations

from pathlib import Path

from .manifest import digest


def note_of(path: Path) -> Path:
    """Where the SHA-256 of a file stands."""
    return path.with_name(f"{path.name}.sha256")


def take_note(path: Path) -> Path:
    """Write a file's SHA-256 beside it, and say where."""
    note = note_of(path)
    note.write_text(digest(path.read_bytes()), encoding="ascii")
    return note


def is_whole(*paths: Path) -> bool:
    """Whether all of these are what their notes say."""
    try:
        return all(note_of(path).read_text(encoding="ascii") == digest(path.read_bytes()) for path in paths)
    except (OSError, ValueError):
        return False
