"""Write a repository that Hugging Face's `kernels` library loads: a package for each kind of device, and a card.

The packages lie in ``build/<variant>``, one for each framework and backend as the library names them. Each is what
`mctune emit` writes otherwise, under a name that is unique to its content, with a table for every target in ``tuned``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mctune.core.errors import MctuneError, UsageError
from mctune.core.target import Target
from mctune.core.winner import Winner
from mctune.emit.hub_card import hub_card
from mctune.emit.hub_text import EXPORTED, IMPORTS, LAYERS, ONE_DOWN, OPS, benchmark
from mctune.emit.package import EXPORTED as OF_A_PACKAGE
from mctune.emit.package import json_bytes, kernel_files, runtime_files, sealed, table_of
from mctune.emit.place import read_json
from mctune.emit.replace import replace_file, replace_package, settle
from mctune.emit.sign import Signer
from mctune.runtime import manifest
from mctune.runtime.errors import PackageError
from mctune.runtime.kernels.table import FOLDER, SCHEMA
from mctune.runtime.kernels.table import NAME as TABLE

VERSION = 0
"""Of the interface, a repository's branch: by the library's convention 0 is for what may still change."""
METADATA = "metadata.json"
LICENSE = "Apache-2.0"


@dataclass(frozen=True)
class Variant:
    """A folder of a repository: its name in ``build``, the library's name of its backend, the kind of its targets."""

    folder: str
    backend: str
    kind: str | None


VARIANTS = (
    Variant("torch-cuda", "cuda", "cuda"),
    Variant("torch-rocm", "rocm", "hip"),
    # Machine code for one system. It has no extension of torch, so it serves every torch from the first one supported.
    Variant("torch-stable-abi211-cpu-x86_64-linux", "cpu", "cpu"),
)
PLAIN = Variant("torch-cpu", "cpu", None)
"""No kernels: the PyTorch path, for machines that have no device of the other variants."""
_RESERVED = {*manifest.FOLDERS, *(name.lower() for name in (*OF_A_PACKAGE, *EXPORTED)), "huggingface", "search"}
"""What a variant holds under that name already, as a file or in its ``__init__.py``."""
_ADDED = ("build", "benchmarks", "README.md")


def check_repository(out: Path, target: Target, *, replace: bool) -> None:
    """See that a repository for ``target`` can be written to the folder ``out``, or the target added to the one there.

    Raises:
        UsageError: if the name is not a kernel's, or the folder holds other files, a repository that was renamed or,
            unless ``replace``, kernels of other targets that cannot be kept.
    """
    name = out.name
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,62}[a-z0-9]", name) or name.replace("-", "_") in _RESERVED:
        raise UsageError(
            f"--out {str(out)!r:.200}: the folder's name is the kernel's: 2 to 64 of a-z, 0-9 and '-', a letter first, "
            f"no '-' last, and no name that a package uses ({', '.join(sorted(_RESERVED))}); name it like mctune-mc"
        )
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file; give a directory")
        if (out / manifest.NAME).exists():
            raise UsageError(f"--out {out} holds a package; give the repository a directory of its own")
        strangers = [out / one for one in _ADDED if (out / one).exists() or (out / one).is_symlink()]
        ours = list(_ours(out))
        if strangers and not ours:
            raise UsageError(
                f"{strangers[0]} is in the way: {out} is no repository that mctune wrote; give another --out"
            )
        for folder in ours:
            settle(folder)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written to: {error.strerror or error}") from error
    if not replace:
        for folder in ours:
            if (theirs := read_json(folder / METADATA).get("name")) != name:
                raise UsageError(f"{out} was emitted under the name {theirs!r:.80}: name it so again, or --replace it")
        _kept(out, target)


def place_of(out: Path, target: Target) -> tuple[Path, str]:
    """Where in a repository the kernels of a target lie: the folder of its variant, and its table there."""
    return out / "build" / _variant(target).folder, f"{FOLDER}/{_slug(target)}.json"


def emit_repository(
    out: Path, target: Target, winners: Sequence[Winner], signer: Signer | None = None, *, replace: bool = False
) -> Path:
    """Write the winners as the repository's kernels for ``target``, and return ``out``.

    Kernels of other targets that are there stay, unless it is to be ``replace``\\d. At every moment each variant can be
    loaded, the one that was there before or the new one.

    Raises:
        UsageError: without winners, or as :func:`check_repository`.
        MctuneError: if it cannot be written.
    """
    if not winners:
        raise UsageError("nothing to emit: there is no kernel that was verified and has a time")
    check_repository(out, target, replace=replace)
    kept = {} if replace else _kept(out, target)
    place, table = place_of(out, target)
    own = kernel_files(target, winners) | {table: json_bytes(table_of(target, winners))}
    for name in set(kept) & set(own) - {"kernels/threads.so"}:
        if kept[name] != own[name]:
            raise MctuneError(f"{place / name} is another kernel of the same name; emit with --replace")
    none = {"schema": SCHEMA, "target": {"name": "none"}, "entries": [], "versions": {}}
    variants = {
        _variant(target): _whole(out.name, _variant(target), kept | own, signer),
        PLAIN: _whole(out.name, PLAIN, {TABLE: json_bytes(none)}, signer),
    }
    try:
        if replace:
            for folder in _ours(out):
                renamed = read_json(folder / METADATA).get("name") != out.name
                if renamed or folder.name not in {variant.folder for variant in variants}:
                    shutil.rmtree(folder)
        for variant, files in variants.items():
            replace_package(out / "build" / variant.folder, files)
        tables = _tables(out)
        script = benchmark([document for documents in tables.values() for document in documents])
        replace_file(out / "benchmarks" / "benchmark.py", script.encode())
        replace_file(out / "README.md", hub_card(out.name, VERSION, tables, PLAIN.folder).encode())
    except OSError as error:
        raise MctuneError(
            f"{out} cannot be written: {error.strerror or error}; see that there is room and that it may be written, "
            "and emit again"
        ) from error
    return out


def _variant(target: Target) -> Variant:
    return next(variant for variant in VARIANTS if variant.kind == target.kind)


def _slug(target: Target) -> str:
    """The name of a target's table; CPUs are told apart by what they are."""
    text = f"{target.name} {target.title} {target.arch}" if target.on_cpu else target.name
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _ours(out: Path) -> list[Path]:
    """The variants in a folder that mctune wrote."""
    names = [variant.folder for variant in (*VARIANTS, PLAIN)]
    folders = [out / "build" / name for name in names]
    return [
        folder for folder in folders if "runtime/manifest.py" in (read_json(folder / manifest.NAME).get("files") or ())
    ]


def _kept(out: Path, target: Target) -> dict[str, bytes]:
    """The tables of other targets in the variant of ``target``, and their kernels, by their paths there.

    Raises:
        UsageError: if there are some that cannot go on beside new ones.
    """
    place, own = place_of(out, target)
    if place not in _ours(out):
        return {}
    remedy = "emit with --replace, then the other targets again"
    try:
        files = manifest.verify(place).files
    except PackageError as error:
        raise UsageError(f"{error}; or {remedy}") from error
    tables = [name for name in files if name.startswith(f"{FOLDER}/") and name != own]
    if not tables:
        return {}
    theirs = {name.removeprefix("runtime/"): data for name, data in files.items() if name.startswith("runtime/")}
    if theirs != runtime_files():
        raise UsageError(
            f"{tables[0]} of {place} was emitted by another mctune, whose kernels this one cannot keep; {remedy}"
        )
    wanted = {name for table in tables for record in json.loads(files[table])["entries"] for name in _files_of(record)}
    return {name: files[name] for name in (*tables, *sorted(wanted), "kernels/threads.so") if name in files}


def _files_of(record: Mapping[str, Any]) -> list[str]:
    """What an entry of a table has in a package."""
    parts = [f"kernels/{file}" for file in record["parts"].values()]
    return [name for name in (record["kernel"], record["source"], record["portable"], *parts) if name is not None]


def _whole(name: str, variant: Variant, files: Mapping[str, bytes], signer: Signer | None) -> dict[str, bytes]:
    """Every file of a variant: a package, and what the library wants beside it."""
    module = name.replace("-", "_")
    added = {"_ops.py": OPS, "layers.py": LAYERS, f"{module}/__init__.py": ONE_DOWN}
    own = {path: text.encode() for path, text in added.items()}
    whole = sealed({**files, **own}, variant.folder, signer, IMPORTS, EXPORTED)
    digests = {path: base64.b64encode(hashlib.sha256(data).digest()).decode() for path, data in whole.items()}
    metadata = {
        "name": name,
        "id": f"_{module}_{variant.backend}_{manifest.digest(whole[manifest.NAME])[:10]}",
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": variant.backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return whole | {METADATA: json_bytes(metadata)}


def _tables(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The tuned tables of a repository by the folder of their variant."""
    found = {}
    for variant in VARIANTS:
        paths = sorted((out / "build" / variant.folder / FOLDER).glob("*.json"))
        if paths:
            found[variant.folder] = [read_json(path) for path in paths]
    return found
