"""Where tests keep what they compile from one run to the next: what is found there must be what they would compile."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
SOURCES = ("templates/tvm", "mctune/backends", "mctune/core", "mctune/runtime/kernels", "mctune/runtime/traits.py")
"""All that a library depends on beside what its name says: how a template becomes one, and what it is told."""
_KEPT_S = 14 * 24 * 3600.0


@cache
def kernels() -> Path:
    """The folder of TVM's libraries: of these sources and this compiler alone, shared by the processes of a run."""
    digest = hashlib.sha256()
    for name in ("apache-tvm", "apache-tvm-ffi"):
        digest.update(metadata.version(name).encode())
    for source in SOURCES:
        place = ROOT / source
        files = [place] if place.is_file() else sorted(place.rglob("*.py"))
        assert files, f"{source} has moved: say in {Path(__file__).name} what compiled kernels depend on"
        for file in files:
            digest.update(file.read_bytes())
    folder = BUILD / "test-kernels" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for other in folder.parent.iterdir():
        if other != folder and time.time() - other.stat().st_mtime > _KEPT_S:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def keep() -> None:
    """Triton and Inductor, which name what they keep by its content, do so in the checkout, for children too."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(BUILD / "test-triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(BUILD / "test-inductor"))
