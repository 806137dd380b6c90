"""What an emitted package holds: every file is held to the manifest before any of it runs, and is read once.

Nothing but the standard library, and nothing of ours: a package's ``__init__.py`` runs this file before any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec, all_suffixes
from importlib.util import spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType

NAME = "manifest.json"
SIGNATURE = "manifest.sig"
"""64 bytes: the Ed25519 signature of the manifest's bytes."""
KEY = "MCTUNE_PUBLIC_KEY"
"""The environment variable that names a file with a public key; packages that it did not sign are refused then."""
NEXT = ".next"
"""A whole package that is about to take the place of the one around it; it stands for it until it has."""
FOLDERS = ("runtime", "kernels", "tuned")
ROOT = Path(os.path.abspath(__file__)).parent.parent
"""What holds the runtime's folder, as it was imported: links are not followed, each file may be one of its own."""
PACKAGE = __name__.rsplit(".", 2)[0]
"""The name of what holds the runtime's folder: ``mctune``, or the emitted package."""
_REMEDY = "emit the package again with `mctune emit`"
_LARGEST = 1 << 28  # bytes of a file
_DEEPEST = 16  # folders; links may form a ring
_PATIENCE_S = 2.0


class PackageError(RuntimeError):
    """A file of an emitted package is missing, has changed, or cannot be read."""


@dataclass(frozen=True, eq=False)
class Contents:
    """A package whose files are what its manifest says: where it is, and the bytes of each file by its path there."""

    root: Path
    files: Mapping[str, bytes]

    def of(self, path: Path) -> bytes | None:
        """The bytes of a file by its whole path; ``None`` for one that is not the package's."""
        try:
            return self.files.get(path.relative_to(self.root).as_posix())
        except ValueError:
            return None


CONTENTS: Contents | None = None
"""Of the emitted package that this is part of; ``None`` in mctune itself, which holds no kernels."""
if globals().get("__spec__") is not None and (ROOT / NAME).exists():  # not run by an __init__.py that mctune wrote
    raise PackageError(f"__init__.py of the package {ROOT} is not the one that it was emitted with; {_REMEDY}")


def guard(package: str, root: str) -> None:
    """Verify the package at ``root`` that is being imported; from now on its modules come from what was verified.

    Raises:
        PackageError: naming the file that is missing, has changed or was added, or what is wrong with the signature.
    """
    global CONTENTS
    CONTENTS = verify(Path(root))
    sys.meta_path[:] = [other for other in sys.meta_path if getattr(other, "package", None) != f"mctune:{package}"]
    sys.meta_path.insert(0, Finder(package, CONTENTS))
    # No other finder may look into the folder: stale bytecode and files that nobody listed lie there.
    sys.modules[package].__path__ = []


# --- verification


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def verify(root: Path) -> Contents:
    """Hold the files under ``root`` to ``root / "manifest.json"``, ``{"files": {relative path: sha256}}``.

    Every listed file is there and unchanged, and the folders of a package hold no other; beside them may lie what
    Python cannot import. Bytecode in ``__pycache__`` is nobody's concern: it is never read. Where ``MCTUNE_PUBLIC_KEY``
    names a key, the manifest must be signed by it.

    Raises:
        PackageError: naming the file that is missing, has changed or was added, or the manifest or the signature.
    """
    until = time.monotonic() + _PATIENCE_S
    while True:
        before = _version(root)
        try:
            return _verified(root)
        except PackageError:
            # Emission may have put another package in its place meanwhile.
            if before == _version(root) or time.monotonic() > until:
                raise
        time.sleep(0.02)


def _version(root: Path) -> list[tuple[int, int] | None]:
    found: list[tuple[int, int] | None] = []
    for path in (root / NEXT / NAME, root / NAME):
        try:
            seen = path.stat()
            found.append((seen.st_ino, seen.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def _verified(root: Path) -> Contents:
    base = root / NEXT if (root / NEXT / NAME).is_file() else root
    try:
        listing = _read(base / NAME)
        expected = _listed(listing)
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(f"{root / NAME} is missing or unreadable ({error}); {_REMEDY}") from error
    if key := os.environ.get(KEY):
        check_signature(base, listing, Path(key))
    files = {}
    for name, value in expected.items():
        try:
            data = _read(base / name)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PackageError(f"{name} is in the manifest of {root} and missing from it; {_REMEDY}") from error
        except (OSError, ValueError) as error:
            raise PackageError(f"{name} of the package {root} cannot be read: {error}; {_REMEDY}") from error
        if (found := digest(data)) != value:
            raise PackageError(
                f"{name} has changed since the package {root} was emitted (SHA-256 {found[:12]}..., the manifest says "
                f"{value[:12]}...); {_REMEDY}"
            )
        files[name] = data
    for name in unlisted(base, expected):
        raise PackageError(f"{name} was added to the package {root}: its manifest does not list it; remove it")
    return Contents(root, files)


def _read(path: Path) -> bytes:
    """A file's bytes, opened once.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is a pipe, a device or a folder, or larger than any file of a package.
    """
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a file")
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST} bytes")
    return data


def _listed(listing: bytes) -> dict[str, str]:
    """The digests of a manifest by the files' names.

    Raises:
        ValueError: if it is no manifest.
    """
    values = json.loads(listing)
    files = values.get("files") if isinstance(values, dict) else None
    if not isinstance(files, dict):
        raise ValueError('it has no "files"')
    for name, value in files.items():
        if not all(re.fullmatch(r"[^/\\\0]+", part) and part not in (".", "..") for part in name.split("/")):
            raise ValueError(f"{name!r} is not the path of a file in a package")
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            raise ValueError(f"{name} has no SHA-256")
    return files


def unlisted(base: Path, listed: Mapping[str, str]) -> Iterator[str]:
    """What lies in a package and is not ``listed``, but for what Python cannot import at its top."""
    for folder in FOLDERS:
        for name in _walk(base, folder, 0):
            if name not in listed:
                yield name
    for name in _names(base):
        if name not in listed and name.endswith(tuple(all_suffixes())):
            yield name
        init = f"{name}/__init__.py"
        if name not in (*FOLDERS, "search") and init not in listed and (base / init).is_file():
            yield init


def _names(folder: Path) -> list[str]:
    """What lies in a folder, but for what is hidden: no module's name, and network file systems hide what is in use."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise PackageError(f"{folder} cannot be read: {error.strerror}; {_REMEDY}") from error


def _walk(base: Path, folder: str, depth: int) -> Iterator[str]:
    """Files below a folder, links followed; of bytecode only what lies where Python would not keep it."""
    if depth > _DEEPEST:
        yield folder
        return
    for one in _names(base / folder) if (base / folder).is_dir() else ():
        name = f"{folder}/{one}"
        if (base / name).is_dir():
            yield from _walk(base, name, depth + 1)
        elif not (folder.endswith("/__pycache__") and one.endswith(".pyc")):
            yield name


def check_signature(base: Path, listing: bytes, key: Path) -> None:
    """Hold a manifest to its signature, by a file with an Ed25519 public key in PEM.

    Raises:
        PackageError: if it is not signed, or not by that key; or the key or ``cryptography`` cannot be had.
    """
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise PackageError(f"{KEY} is set, and checking a signature needs: pip install cryptography") from error
    try:
        public = load_pem_public_key(_read(key))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise PackageError(f"{KEY}={key} is not a file with a public key in PEM: {error}") from error
    if not isinstance(public, Ed25519PublicKey):
        raise PackageError(f"{KEY}={key} is not an Ed25519 key: `openssl genpkey -algorithm ed25519` makes one")
    try:
        public.verify(_read(base / SIGNATURE), listing)
    except (OSError, ValueError) as error:
        raise PackageError(
            f"{base} is not signed ({SIGNATURE}: {error}), and {KEY} asks for it: `mctune emit --sign`"
        ) from error
    except InvalidSignature as error:
        raise PackageError(f"{SIGNATURE} of {base} was not made for its {NAME} by the key {key} ({KEY})") from error


# --- importing what was verified


@dataclass(frozen=True)
class _Loader(InspectLoader):
    """A module from the bytes that were verified: compiled here, no bytecode is read or written."""

    contents: Contents
    name: str
    """The path of the source in the package; a folder's without one, if it has no ``__init__.py``."""

    def get_source(self, fullname: str) -> str:
        return self.contents.files.get(self.name, b"").decode()

    def is_package(self, fullname: str) -> bool:
        return self.name.endswith("/__init__.py") or not self.name.endswith(".py")

    def get_code(self, fullname: str) -> CodeType:
        path = self.contents.root / self.name
        code: CodeType = compile(self.contents.files.get(self.name, b""), str(path), "exec", dont_inherit=True)
        if self.name.startswith("kernels/"):
            # Triton compiles a function from its source, which it asks linecache for: what was verified, not the file.
            import linecache

            source = self.get_source(fullname)
            linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
        return code


class Finder(MetaPathFinder):
    """Finds the modules of a package among the files that were verified, and no others."""

    def __init__(self, name: str, contents: Contents) -> None:
        self.package, self._prefix, self._contents = f"mctune:{name}", f"{name}.", contents

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a listed module; ``None`` for every other name."""
        if not fullname.startswith(self._prefix):
            return None
        stem, files = fullname.removeprefix(self._prefix).replace(".", "/"), self._contents.files
        if f"{stem}/__init__.py" in files:
            name = f"{stem}/__init__.py"
        elif f"{stem}.py" in files:
            name = f"{stem}.py"
        elif any(file.startswith(f"{stem}/") and file.endswith(".py") for file in files):
            name = stem
        else:
            return None
        spec = spec_from_loader(fullname, _Loader(self._contents, name), origin=str(self._contents.root / name))
        if spec is not None:
            spec.has_location = True
        return spec
