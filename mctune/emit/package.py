"""Write a package directory: the runtime as it is, the kernels, the tuned table, the manifest, a card."""

from __future__ import annotations

import json
import keyword
import shutil
from collections.abc import Sequence
from pathlib import Path

from mctune.core.environment import environment
from mctune.core.errors import UsageError
from mctune.core.target import Target
from mctune.core.winner import Winner
from mctune.emit.card import card
from mctune.runtime import manifest
from mctune.runtime.kernels.table import NAME as TABLE
from mctune.runtime.kernels.table import SCHEMA
from mctune.runtime.kernels.tvm.loader import build_threads_library

_RUNTIME = Path(manifest.__file__).parent
_FILES = (manifest.NAME, "__init__.py", "huggingface.py", "README.md")
_FOLDERS = ("runtime", "kernels")
_INIT = '''"""Memory Caching with the kernels tuned for {target}; see README.md."""

from .runtime.api.attach import attach_memory_caching
from .runtime.cache import MemoryCache
from .runtime.api.functional import memory_caching
from .runtime.api.module import MemoryCaching

__all__ = ["MemoryCache", "MemoryCaching", "attach_memory_caching", "memory_caching"]
'''
_HUGGING_FACE = '''"""The Hugging Face model on this package's kernels; importing it needs transformers 5."""

from .runtime.api.huggingface import MemoryCachingConfig, MemoryCachingForCausalLM, MemoryCachingModel

__all__ = ["MemoryCachingConfig", "MemoryCachingForCausalLM", "MemoryCachingModel"]
'''


def emit_package(out: Path, target: Target, winners: Sequence[Winner]) -> Path:
    """Write the package into ``out`` and return it; what else is in ``out`` (a study, say) stays.

    The manifest goes first and comes back last, and the table is there from the start: a package that was interrupted
    while it was written is refused when it is imported, and writing it again mends it.

    Raises:
        UsageError: without winners, or if ``out`` holds files that are not a package's.
    """
    if not winners:
        raise UsageError("nothing to emit: the studies have no candidate that was verified and has a time")
    if not out.name.isidentifier() or keyword.iskeyword(out.name):
        raise UsageError(f"{out.name!r} cannot be imported: name the directory like a Python module (mctune_cpu)")
    made_with = environment(target)
    table = {
        "schema": SCHEMA,
        "target": made_with["target"],
        "versions": made_with["versions"],
        "entries": [winner.record() for winner in winners],
    }
    _make_room(out)
    (out / TABLE).write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copytree(_RUNTIME, out / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    kernels = out / "kernels"
    kernels.mkdir()
    for winner in winners:
        for path in (winner.library, winner.source, winner.portable, *(part for _, part in winner.parts)):
            if path is not None:
                shutil.copyfile(path, kernels / path.name)
    if target.on_cpu:
        build_threads_library(kernels / "threads.so")
    (out / "__init__.py").write_text(_INIT.format(target=target.name), encoding="utf-8")
    (out / "huggingface.py").write_text(_HUGGING_FACE, encoding="utf-8")
    (out / "README.md").write_text(card(out.name, table), encoding="utf-8")
    _write_manifest(out)
    return out


def _make_room(out: Path) -> None:
    """Remove an earlier package from ``out``, and nothing else: only a package of ours has a tuned table."""
    strangers = [out / name for name in (*_FOLDERS, *_FILES) if (out / name).exists()]
    if strangers and not (out / TABLE).is_file():
        raise UsageError(
            f"{strangers[0]} is in the way: {out} is not a package that mctune wrote (it has no {TABLE}); give another "
            "--out"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        (out / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        if (out / name).exists():
            shutil.rmtree(out / name)


def _write_manifest(out: Path) -> None:
    """SHA-256 of every file of the package."""
    paths = [out / "__init__.py", out / "huggingface.py", out / "README.md", out / TABLE]
    paths += sorted(path for name in _FOLDERS for path in (out / name).rglob("*") if path.is_file())
    files = {path.relative_to(out).as_posix(): manifest.digest(path) for path in paths}
    (out / manifest.NAME).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
