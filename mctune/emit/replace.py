"""Put a package in the place of the one before it, so that at every moment one of the two can be imported.

A whole package is written beside, in ``.new-...``, and becomes ``.next`` by one rename: from then on it is the package,
wherever the files around it are (:func:`mctune.runtime.manifest.verify` looks there first). They are replaced one by
one, each by a rename, and ``.next`` goes. Emission that was killed in between is finished by the next one.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mctune.runtime import manifest

_INIT = "__init__.py"
_OURS = (_INIT, "README.md", "tuned.json", manifest.NAME, manifest.SIGNATURE, "__pycache__")
"""What a package has at its top, but for its folders."""


def replace_package(out: Path, files: Mapping[str, bytes]) -> None:
    """Make ``files``, by their paths, the package at ``out``; what is not a package's stays. Modes are the umask's.

    Raises:
        OSError: if it cannot be written; the package is the old one then, or the new one.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _settle(out)
        _sweep(out)
        staged = out / f".new-{secrets.token_hex(4)}"
        try:
            for name, data in files.items():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).write_bytes(data)
            _tell_apart(staged / _INIT, out / _INIT)
            staged.rename(out / manifest.NEXT)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        _settle(out)
        _sweep(out)


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in its place by a rename: at every moment there is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".new-{secrets.token_hex(4)}-{path.name}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def settle(out: Path) -> None:
    """Finish what an emission that was killed has left undone in ``out``, if there is such a thing."""
    if (out / manifest.NEXT).is_dir():
        with _alone(out):
            _settle(out)


def _settle(out: Path) -> None:
    waiting = out / manifest.NEXT
    if not waiting.is_dir():
        return
    names = {path.relative_to(waiting).as_posix() for path in waiting.rglob("*") if path.is_file()}
    # Whichever of the two __init__.py runs, it finds its own runtime/manifest.py: the old one while that is in place,
    # the new one in .next.
    for name in sorted(names, key=lambda name: (name != _INIT, name)):
        _put(waiting / name, out / name)
    for name in _OURS:
        if name not in names:
            _remove(out / name)
    for folder in manifest.FOLDERS:
        for path in (out / folder).rglob("*"):
            if path.relative_to(out).as_posix() not in names and not (path.is_dir() and not path.is_symlink()):
                _remove(path)
        for path in sorted((out / folder).rglob("*"), reverse=True):
            with suppress(OSError):  # a folder that still holds something
                path.rmdir()
    waiting.rename(out / f".old-{secrets.token_hex(4)}")


def _put(source: Path, place: Path) -> None:
    """Put a file in its place too, by a rename: a process that has the old one mapped or open keeps that."""
    for parent in reversed(place.parents):
        if parent.is_symlink() and not parent.exists():
            parent.unlink()
    if place.parent.exists() and not place.parent.is_dir():
        place.parent.unlink()
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():
        _remove(place)
    beside = place.with_name(f".new-{secrets.token_hex(4)}-{place.name}")
    try:
        try:
            os.link(source, beside)  # takes no room
        except OSError:  # where the file system has no links
            shutil.copyfile(source, beside)
            shutil.copystat(source, beside)
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def _tell_apart(new: Path, old: Path) -> None:
    """Bytecode is told from its source's by the size and the second of its change: two within one would be mixed up."""
    with suppress(OSError):
        then, now = old.stat().st_mtime, new.stat().st_mtime
        if int(then) >= int(now):
            os.utime(new, (int(then) + 1, int(then) + 1))


def _sweep(out: Path) -> None:
    """Remove what emissions that were killed have written beside."""
    for path in (*out.glob(".new-*"), *out.glob(".old-*")):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # network file systems keep what is in use
            path.unlink()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Other emissions into ``out`` wait."""
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # where the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
