"""Write a package directory: the runtime as it is, the kernels, the tuned table, the manifest, a card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mctune.core.environment import environment
from mctune.core.errors import MctuneError, UsageError
from mctune.core.target import Target
from mctune.core.winner import Winner
from mctune.emit.card import card
from mctune.emit.place import check_name, check_place
from mctune.emit.replace import replace_package
from mctune.emit.sign import Signer
from mctune.runtime import manifest
from mctune.runtime.kernels.table import NAME as TABLE
from mctune.runtime.kernels.table import SCHEMA
from mctune.runtime.kernels.tvm.loader import build_threads_library

_RUNTIME = Path(manifest.__file__).parent
_GUARD = "runtime/manifest.py"
_INIT = '''"""Memory Caching with the kernels tuned for {target}; see README.md."""

import hashlib as _hashlib
import os as _os
import sys as _sys
import types as _types


class PackageError(RuntimeError):
    """The file that verifies the others is missing or has changed."""


def _verify():
    """Hold every file to manifest.json before any other runs: {guard} does it, and is itself held to its digest."""
    root = _os.path.dirname(_os.path.abspath(__file__))
    for folder in (root, _os.path.join(root, "{next}")):
        path = _os.path.join(folder, *"{guard}".split("/"))
        if not _os.path.isfile(path):
            continue
        with open(path, "rb") as file:
            source = file.read()
        if _hashlib.sha256(source).hexdigest() == "{digest}":
            break
    else:
        raise PackageError(
            "{guard} is missing or has changed since the package " + root + " was emitted; emit the package again with "
            "`mctune emit`"
        )
    name = __name__ + ".runtime.manifest"
    module = _sys.modules[name] = _types.ModuleType(name)
    module.__file__ = _os.path.join(root, *"{guard}".split("/"))
    try:
        exec(compile(source, module.__file__, "exec", dont_inherit=True), module.__dict__)
        module.guard(__name__, root)
    except BaseException:
        del _sys.modules[name]
        raise


_verify()

from .runtime.api.attach import attach_memory_caching  # noqa: E402
from .runtime.cache import MemoryCache  # noqa: E402
from .runtime.api.functional import memory_caching  # noqa: E402
from .runtime.api.module import MemoryCaching  # noqa: E402
{imports}
__all__ = {exported}
'''
EXPORTED = ("MemoryCache", "MemoryCaching", "attach_memory_caching", "memory_caching")
_HUGGING_FACE = '''"""The Hugging Face model on this package's kernels; importing it needs transformers 5."""

from .runtime.api.huggingface import MemoryCachingConfig, MemoryCachingForCausalLM, MemoryCachingModel

__all__ = ["MemoryCachingConfig", "MemoryCachingForCausalLM", "MemoryCachingModel"]
'''


def emit_package(out: Path, target: Target, winners: Sequence[Winner], signer: Signer | None = None) -> Path:
    """Write the package into ``out`` and return it; what else is in ``out`` (a study, say) stays.

    At every moment the package that was there before can be imported, or the new one. With ``signer`` the manifest is
    signed.

    Raises:
        UsageError: without winners, or if ``out`` cannot be imported or holds files that are not a package's.
        MctuneError: if it cannot be written.
    """
    if not winners:
        raise UsageError("nothing to emit: the studies have no candidate that was verified and has a time")
    check_name(out)
    check_place(out)
    try:
        replace_package(out, _files(out.name, target, winners, signer))
    except OSError as error:
        raise MctuneError(
            f"{out} cannot be written: {error.strerror or error}; a package that was there still works. See that there "
            "is room and that it may be written, and emit again: what was searched is kept"
        ) from error
    return out


def _files(name: str, target: Target, winners: Sequence[Winner], signer: Signer | None) -> dict[str, bytes]:
    """Every file of the package by its path."""
    table = table_of(target, winners)
    files = kernel_files(target, winners) | {
        TABLE: json_bytes(table),
        "huggingface.py": _HUGGING_FACE.encode(),
        "README.md": card(name, table).encode(),
    }
    return sealed(files, target.name, signer)


def table_of(target: Target, winners: Sequence[Winner]) -> dict[str, Any]:
    """The tuned table: which kernel serves which problem, and what all of it was made with."""
    made_with = environment(target)
    return {
        "schema": SCHEMA,
        "target": made_with["target"],
        "versions": made_with["versions"],
        "entries": [winner.record() for winner in winners],
    }


def kernel_files(target: Target, winners: Sequence[Winner]) -> dict[str, bytes]:
    """The kernels' files by their paths in a package, and what a CPU's need beside them."""
    files = {}
    for winner in winners:
        for path in (winner.library, winner.source, winner.portable, *(part for _, part in winner.parts)):
            if path is not None:
                files[f"kernels/{path.name}"] = path.read_bytes()
    if target.on_cpu:
        files["kernels/threads.so"] = _threads_library()
    return files


def sealed(
    files: Mapping[str, bytes], target: str, signer: Signer | None, imports: str = "", exported: Sequence[str] = ()
) -> dict[str, bytes]:
    """``files`` with the runtime, the ``__init__.py`` that verifies all of them, the manifest and, by a signer, its
    signature. ``imports``: lines that are added to those of ``__init__.py``; ``exported``: the names that they bind."""
    whole = {f"runtime/{name}": data for name, data in runtime_files().items()} | dict(files)
    init = _INIT.format(
        target=target,
        guard=_GUARD,
        next=manifest.NEXT,
        digest=manifest.digest(whole[_GUARD]),
        imports=imports,
        exported=json.dumps(sorted((*EXPORTED, *exported))),
    )
    whole["__init__.py"] = init.encode()
    digests = {name: manifest.digest(data) for name, data in sorted(whole.items())}
    whole[manifest.NAME] = (json.dumps({"files": digests}, indent=1) + "\n").encode()
    if signer is not None:
        whole[manifest.SIGNATURE] = signer.sign(whole[manifest.NAME])
    return whole


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """A document as every package has it: sorted names, one a line."""
    return (json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def runtime_files() -> dict[str, bytes]:
    """The runtime's own files, by their paths in its folder."""
    paths = sorted(path for path in _RUNTIME.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(_RUNTIME).as_posix(): path.read_bytes() for path in paths}


def _threads_library() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "threads.so"
        build_threads_library(library)
        return library.read_bytes()
