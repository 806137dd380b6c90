"""The manifest of an emitted package: the SHA-256 of every file, checked before any of them is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .errors import PackageError

NAME = "manifest.json"
ROOT = Path(__file__).resolve().parent.parent
"""What holds the runtime's folder: an emitted package keeps tuned.json, manifest.json and the kernels there."""
PACKAGE = __name__.rsplit(".", 2)[0]
"""The name of what holds the runtime's folder: ``mctune``, or the emitted package."""


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_manifest(root: Path) -> frozenset[str]:
    """Hold the files under ``root`` to ``root / "manifest.json"``, ``{"files": {relative path: sha256}}``.

    Returns:
        The relative paths that the manifest vouches for.

    Raises:
        PackageError: naming the file that is missing or has changed, or the manifest if it is missing or unreadable.
    """
    path = root / NAME
    remedy = "emit the package again with `mctune emit`"
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        expected = {str(name): str(value) for name, value in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackageError(f"{path} is missing or unreadable ({error!r}); {remedy}") from error
    for name, value in expected.items():
        if not (root / name).is_file():
            raise PackageError(f"{name} is in the manifest of {root} and missing from it; {remedy}")
        if (found := digest(root / name)) != value:
            raise PackageError(
                f"{name} has changed since the package {root} was emitted (SHA-256 {found[:12]}..., the manifest says "
                f"{value[:12]}...); {remedy}"
            )
    return frozenset(expected)
