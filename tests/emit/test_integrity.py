"""Whatever happens to the files of a package, none of what changed runs: it is refused by name, or it is harmless."""

from __future__ import annotations

import importlib._bootstrap_external
import importlib.util
import json
import os
import py_compile
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from packages import forget

from mctune.core.errors import MctuneError
from mctune.core.target import Target
from mctune.core.winner import Winner
from mctune.emit import emit_package
from mctune.runtime import manifest
from mctune.runtime.errors import PackageError
from mctune.runtime.kernels.table import load_table
from mctune.verify.package import load_package

NAME = "emitted_whole"
MARK = "it_ran"
REFUSED = "PackageError"
SECONDS = 6.0


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, target: Target, winners: Sequence[Winner]) -> Path:
    return emit_package(tmp_path_factory.mktemp("whole") / NAME, target, winners)


def poison(folder: Path) -> bytes:
    """Python that leaves a mark when it runs."""
    return f"open({str(folder / MARK)!r}, 'w')\n".encode()


class Changes:
    """Ways to change a copy of a package; each answers with names of which one must be told, or none if harmless."""

    def __init__(self, copy: Path, draw: random.Random) -> None:
        self.copy, self.draw, self.poison = copy, draw, poison(copy.parent)
        self.listed = sorted(json.loads((copy / manifest.NAME).read_text())["files"])

    def file(self, *endings: str) -> str:
        names = [name for name in self.listed if name != "__init__.py" and name.endswith(endings or ("",))]
        return self.draw.choice(names)

    def folder(self) -> str:
        return self.draw.choice([name.rpartition("/")[0] for name in self.listed if "/" in name])

    def changed(self) -> set[str]:
        name = self.file()
        data = bytearray((self.copy / name).read_bytes() or b" ")
        data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        (self.copy / name).write_bytes(data)
        return {name}

    def poisoned(self) -> set[str]:
        name = self.file(".py")
        (self.copy / name).write_bytes((self.copy / name).read_bytes() + self.poison)
        return {name}

    def truncated(self) -> set[str]:
        name = self.draw.choice(
            [name for name in self.listed if (self.copy / name).stat().st_size and name != "__init__.py"]
        )
        os.truncate(self.copy / name, self.draw.randrange((self.copy / name).stat().st_size))
        return {name}

    def removed(self) -> set[str]:
        name = self.file()
        (self.copy / name).unlink()
        return {name}

    def swapped(self) -> set[str]:
        one, other = self.draw.sample([name for name in self.listed if name.endswith((".py", ".so"))], 2)
        ones, others = ((self.copy / name).read_bytes() for name in (one, other))
        if ones == others or "__init__.py" in (one, other):
            return self.removed()
        (self.copy / one).write_bytes(others)
        (self.copy / other).write_bytes(ones)
        return {one, other}

    def added(self) -> set[str]:
        ending = self.draw.choice((".py", ".so", ".pyc", ".txt", ".abi3.so", ""))
        name = f"{self.folder()}/{self.draw.choice(('torch', 'functional', 'zz', 'threads', 'call'))}{ending}"
        if (self.copy / name).exists():
            name += ".py"
        (self.copy / name).write_bytes(self.poison)
        return {name}

    def shadowed(self) -> set[str]:
        """A package in front of a module, or of the whole runtime; or one below a module, which nothing imports."""
        module = self.file(".py").removesuffix(".py")
        name = f"{module.removesuffix('/__init__')}/added/__init__.py"
        if self.draw.random() < 0.5:
            name = f"{module}/__init__.py"
        (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
        (self.copy / name).write_bytes(self.poison)
        return set() if name == f"{module}/added/__init__.py" and "/" not in module else {name}

    def added_at_the_top(self) -> set[str]:
        name = self.draw.choice(("runtime.py", "kernels.so", "torch.py", "mine/__init__.py", "json.pyc"))
        (self.copy / name).parent.mkdir(exist_ok=True)
        (self.copy / name).write_bytes(self.poison)
        return {name}

    def beside(self) -> set[str]:
        (self.copy / "notes.txt").write_text("mine")
        (self.copy / "search").mkdir()
        (self.copy / "search" / "study.py").write_bytes(self.poison)
        (self.copy / "runtime" / ".nfs0001").write_bytes(self.poison)
        return set()

    def stale_bytecode(self) -> set[str]:
        """Bytecode that Python would take for the module's own, whatever the source says."""
        name = self.draw.choice([name for name in self.listed if name.endswith(".py") and name != "__init__.py"])
        source = self.copy / name
        other = self.copy.parent / "other.py"
        other.write_bytes(self.poison)
        cached = importlib.util.cache_from_source(str(source))
        os.makedirs(os.path.dirname(cached), exist_ok=True)
        if self.draw.random() < 0.5:
            py_compile.compile(
                str(other), cached, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH, doraise=True
            )
        else:
            code = compile(self.poison, str(source), "exec")
            seen = source.stat()
            data = importlib._bootstrap_external._code_to_timestamp_pyc(code, int(seen.st_mtime), seen.st_size)  # type: ignore[attr-defined]
            Path(cached).write_bytes(data)
        return set()

    def link(self) -> set[str]:
        """A file that is a link to the same bytes elsewhere, as caches lay packages out."""
        name = self.file()
        (self.copy / name).rename(self.copy.parent / "blob")
        (self.copy / name).symlink_to(self.copy.parent / "blob")
        return set()

    def link_to_another(self) -> set[str]:
        name = self.file()
        (self.copy / name).unlink()
        (self.copy.parent / "blob").write_bytes(self.poison)
        (self.copy / name).symlink_to(self.copy.parent / self.draw.choice(("blob", "nowhere")))
        return {name}

    def ring(self) -> set[str]:
        folder = self.folder()
        (self.copy / folder / "ring").symlink_to(self.copy / folder)
        return {f"{folder}/ring"}

    def no_file(self) -> set[str]:
        name = self.file()
        (self.copy / name).unlink()
        if self.draw.random() < 0.5:
            os.mkfifo(self.copy / name)
        else:
            (self.copy / name).mkdir()
        return {name}

    def manifest(self) -> set[str]:
        path = self.copy / manifest.NAME
        data = bytearray(path.read_bytes())
        how = self.draw.randrange(3)
        if how == 0:
            path.write_bytes(data[: self.draw.randrange(len(data) - 2)])
        elif how == 1:
            path.unlink()
        else:
            at = self.draw.choice([at for at, byte in enumerate(data) if chr(byte).isalnum()])
            data[at] ^= 1
            path.write_bytes(data)
            return {""}
        return {manifest.NAME}


HOW = sorted(
    name for name, value in vars(Changes).items() if callable(value) and name not in ("__init__", "file", "folder")
)


def changed_copy(package: Path, folder: Path, how: str, draw: random.Random) -> tuple[Path, set[str]]:
    copy = folder / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy, getattr(Changes(copy, draw), how)()


def test_a_changed_package_is_refused_by_name_or_harmless(
    package: Path, importer: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """Every kind of change at least once, then random ones for some seconds: in a process that imports it."""
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    whole = importer(package)
    assert whole["kernels"] == 2, whole
    until, kinds = time.monotonic() + SECONDS, list(HOW)
    draw.shuffle(kinds)
    while kinds or time.monotonic() < until:
        how = kinds.pop() if kinds else draw.choice(HOW)
        folder = tmp_path / f"{how}{time.monotonic_ns()}"
        copy, told = changed_copy(package, folder, how, draw)
        answer = importer(copy)
        said = f"{how} {told}: {answer}"
        assert not (folder / MARK).exists(), f"it ran: {said}"
        if told:
            assert answer.get("error") == REFUSED, said
            assert any(name in answer["message"] for name in told), said
        else:
            assert answer == whole, said
        shutil.rmtree(folder)


def test_many_changes_are_refused_by_name(package: Path, tmp_path: Path) -> None:
    """The same without a process for each, the package's __init__.py included: as `mctune verify` would load it."""
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    until = time.monotonic() + SECONDS / 2
    while time.monotonic() < until:
        folder = tmp_path / f"copy{time.monotonic_ns()}"
        how = draw.choice([how for how in HOW if how not in ("beside", "stale_bytecode", "link")])
        copy, told = changed_copy(package, folder, how, draw)
        if draw.random() < 0.2:
            (copy / "__init__.py").write_bytes(poison(folder))
            told.add("__init__.py")
        if not told:
            continue
        with pytest.raises(MctuneError) as refused:
            load_package(copy)
        assert any(name in str(refused.value) for name in told), f"{how} {told}: {refused.value}"
        assert not (folder / MARK).exists() and NAME not in sys.modules
        shutil.rmtree(folder)


def test_stale_bytecode_of_the_init_does_not_run_under_verify(package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "emitted_stale_init"))
    other = tmp_path / "other.py"
    other.write_bytes(poison(tmp_path))
    cached = importlib.util.cache_from_source(str(copy / "__init__.py"))
    os.makedirs(os.path.dirname(cached), exist_ok=True)
    py_compile.compile(str(other), cached, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert callable(load_package(copy).memory_caching)
    assert not (tmp_path / MARK).exists()
    forget(copy.name)


@pytest.mark.parametrize("init", (b"", b"from .runtime.api.functional import memory_caching\n"))
def test_an_init_that_does_not_verify_is_refused_by_the_runtime(
    init: bytes, package: Path, importer: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(package, tmp_path / NAME))
    (copy / "__init__.py").write_bytes(init)
    answer = importer(copy)
    assert answer["error"] == REFUSED and "__init__.py of the package" in answer["message"], answer


@pytest.mark.parametrize("folders", (False, True), ids=("files", "folders"))
def test_a_package_that_is_laid_out_by_links_has_its_kernels(
    folders: bool, package: Path, importer: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123" / NAME
    shutil.copytree(package, blobs)
    if folders:
        snapshot.mkdir(parents=True)
        for path in blobs.iterdir():
            (snapshot / path.name).symlink_to(path)
    else:
        for number, path in enumerate(path for path in package.rglob("*") if path.is_file()):
            place = snapshot / path.relative_to(package)
            place.parent.mkdir(parents=True, exist_ok=True)
            (blobs / str(number)).write_bytes(path.read_bytes())
            place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    assert importer(snapshot)["kernels"] == 2
    (snapshot / "tuned.json").unlink()
    assert importer(snapshot)["error"] == REFUSED


def test_kernels_run_from_what_was_verified(package: Path, tmp_path: Path) -> None:
    """Whatever becomes of the files after the import; a kernel that was never launched before it included."""
    copy = Path(shutil.copytree(package, tmp_path / NAME))
    code = f"""
import shutil, sys
import torch, {NAME} as package
shutil.rmtree({str(copy)!r})
x = torch.ones(1, 40, 2, 16)
print(package.memory_caching(x, x, x, segment_length=32, backend="tvm").shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "torch.Size([1, 40, 2, 16])" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2}, {"entries": {}}, {"entries": [1]}, {"target": "cpu"}, {"entries": None}, {"entries": [[]]},
        *({"problem": value} for value in (None, [], {}, {"recurrence": "grm"})),
        *({name: value} for name in ("T", "H", "Dk", "Dv") for value in (0, -1, 1.5, "64", None, True, 10**30)),
        *({"aggregation": value} for value in (None, 1, "fast")), {"pass": "sideways"}, {"pass": []}, {"dtype": 3},
        *({name: value} for name in ("kernel", "portable") for value in (1, "../other.so", "kernels/none.so", [])),
        {"backend": "cuda"}, {"backend": None}, {"parts": ["a"]}, {"parts": {"read": 1}},
        {"parts": {"read": "none.py"}},
        {"cpu_flags": "avx2"}, {"cpu_flags": [1]}, {"config": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_table_is_a_package_error(change: dict[str, Any], package: Path) -> None:
    contents = manifest.verify(package)
    table = json.loads(contents.files["tuned.json"])
    for place in (table, table["entries"][0], table["entries"][0]["problem"]):
        if set(change) & set(place):
            place |= change
            break
    else:
        table["entries"][0]["problem"] |= change
    data = json.dumps(table).encode()
    with pytest.raises(PackageError, match=r"tuned\.json is not a tuned table: .*emit the package again"):
        load_table(manifest.Contents(contents.root, {**contents.files, "tuned.json": data}))


@pytest.mark.parametrize(
    "data",
    (b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"schema": NaN}', b'{"schema": ' + b"1" * 5000 + b"}"),
)
def test_what_is_no_table_is_a_package_error(data: bytes, package: Path) -> None:
    contents = manifest.verify(package)
    with pytest.raises(PackageError, match=r"tuned\.json is not a tuned table"):
        load_table(manifest.Contents(contents.root, {**contents.files, "tuned.json": data}))
    with pytest.raises(PackageError, match="is not in the manifest"):
        load_table(manifest.Contents(contents.root, {}))


@pytest.mark.parametrize(
    "files",
    (
        None,
        [],
        {"../x": "0" * 64},
        {"/etc/passwd": "0" * 64},
        {"a//b": "0" * 64},
        {"a": 1},
        {"a": "0"},
        {"a\0": "0" * 64},
    ),
    ids=str,
)
def test_a_malformed_manifest_is_a_package_error(files: object, tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).write_text(json.dumps({"files": files}))
    with pytest.raises(PackageError, match=r"manifest\.json is missing or unreadable"):
        manifest.verify(tmp_path)
