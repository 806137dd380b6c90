"""Emission: what it leaves however it ends, what it keeps of the package before, and what it signs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from packages import forget

from mctune.core.config import Config
from mctune.core.errors import MctuneError, UsageError
from mctune.core.outcome import Predicted, Timed
from mctune.core.target import Target
from mctune.core.winner import Winner
from mctune.emit import Signer, emit_package, merge, package_before
from mctune.emit import package as emitter
from mctune.emit.replace import replace_package, settle
from mctune.runtime import manifest
from mctune.runtime.kernels.tvm.loader import build_threads_library
from mctune.study.frontier import recommend
from mctune.verify.package import load_package

Files = Mapping[str, bytes]


def whole(out: Path) -> Files:
    """What an import of the package would verify and run."""
    contents = manifest.verify(out).files
    guards = [out / folder / "runtime" / "manifest.py" for folder in (".", manifest.NEXT)]
    init = (out / "__init__.py").read_text()
    assert any(path.is_file() and manifest.digest(path.read_bytes()) in init for path in guards)
    return contents


def killed(work: Callable[[], None], after: int) -> bool:
    """Do the work in a process that is killed before its operation number ``after`` on files; whether it was."""
    child = os.fork()
    if child == 0:
        left = [after]

        def count(event: str, _: object) -> None:
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.utime", "os.scandir"):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.fixture
def versions(out: Path, target: Target, winners: Sequence[Winner]) -> tuple[Files, Files]:
    """Two packages' files: other kernels, another table, and another runtime."""
    one = emitter._files(out.name, target, winners, None)
    with pytest.MonkeyPatch.context() as patch:
        runtime = emitter.runtime_files()
        runtime["manifest.py"] += b"# another\n"
        runtime["added.py"] = runtime.pop("call.py")
        patch.setattr(emitter, "runtime_files", lambda: runtime)
        other = emitter._files(out.name, target, winners[:1], None)
    assert one["__init__.py"] != other["__init__.py"] and len(one["__init__.py"]) == len(other["__init__.py"])
    return one, other


def _content(files: Files) -> Files:
    return {name: data for name, data in files.items() if name != manifest.NAME}


def test_emission_that_is_killed_leaves_the_old_or_the_new_package(out: Path, versions: tuple[Files, Files]) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    replace_package(out, versions[0])
    (out / "search").mkdir()
    (out / "search" / "study.db").write_text("trials")
    now, until, most, ends = 0, time.monotonic() + 5, 2000, set()
    while time.monotonic() < until:
        after = draw.randrange(most)
        if killed(partial(replace_package, out, versions[1 - now]), after):
            found = whole(out)
            ends.add(found == _content(versions[now]))
            assert found in [_content(files) for files in versions]
            now = int(found == _content(versions[1]))
        else:
            most, now = min(most, after), 1 - now
            assert whole(out) == _content(versions[now])
            assert not list(out.glob(".*"))
        if draw.random() < 0.3:
            settle(out)
            assert whole(out) == _content(versions[now])
        assert (out / "search" / "study.db").read_text() == "trials"
    assert ends == {True, False}, "killed before it was decided, and after"


def test_a_package_that_a_kill_has_left_can_be_imported(
    out: Path, versions: tuple[Files, Files], importer: Callable[[Path], dict[str, object]]
) -> None:
    """Where the new one waits in its folder, with the old __init__.py beside it and with the new one."""
    replace_package(out, versions[1])
    for name, data in versions[0].items():
        (out / manifest.NEXT / name).parent.mkdir(parents=True, exist_ok=True)
        (out / manifest.NEXT / name).write_bytes(data)
    for init in versions:
        (out / "__init__.py").write_bytes(init["__init__.py"])
        assert importer(out).get("kernels") == 2
    settle(out)
    assert whole(out) == _content(versions[0]) and not (out / "runtime" / "added.py").exists()


def test_who_imports_while_it_is_written_gets_one_of_the_two(out: Path, versions: tuple[Files, Files]) -> None:
    replace_package(out, versions[0])
    child = os.fork()
    if child == 0:
        try:
            for number in range(100_000):
                replace_package(out, versions[number % 2])
        finally:
            os._exit(0)
    try:
        until, seen = time.monotonic() + 3, set()
        while time.monotonic() < until:
            seen.add(manifest.verify(out).files["tuned.json"])
        assert seen == {files["tuned.json"] for files in versions}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("step", ("build_threads_library", "card", "replace_package"))
@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), KeyboardInterrupt()), ids=("full", "ctrl-c"))
def test_emission_that_fails_leaves_the_package_as_it_was(
    step: str, error: BaseException, out: Path, target: Target, winners: Sequence[Winner]
) -> None:
    emit_package(out, target, winners)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*_: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"mctune.emit.package.{step}", fail)
        with pytest.raises((MctuneError, KeyboardInterrupt)):
            emit_package(out, target, winners[:1])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("links", (True, False))
def test_a_full_disk_leaves_the_package_as_it_was(links: bool, out: Path, versions: tuple[Files, Files]) -> None:
    """Links take no room: where there are such, what has been written beside is in its place too."""
    replace_package(out, versions[0])
    real, copy, left = Path.write_bytes, shutil.copyfile, [20]

    def take() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    def write(self: Path, data: bytes) -> int:
        take()
        return real(self, data)

    def copied(source: Path, place: Path) -> Path:
        take()
        return copy(source, place)

    def refused(*_: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    for room in (0, 20, len(versions[1]) - 1, len(versions[1]), len(versions[1]) + 5):
        with pytest.MonkeyPatch.context() as patch:
            left[0] = room
            patch.setattr(Path, "write_bytes", write)
            patch.setattr(shutil, "copyfile", copied)
            if not links:
                patch.setattr(os, "link", refused)
            if links and room >= len(versions[1]):
                replace_package(out, versions[1])
            else:
                with pytest.raises(OSError, match="No space"):
                    replace_package(out, versions[1])
        assert whole(out) == _content(versions[room >= len(versions[1])])


@pytest.mark.parametrize("mask", (0o022, 0o077, 0o002))
def test_files_have_the_modes_of_the_umask(mask: int, out: Path, target: Target, winners: Sequence[Winner]) -> None:
    before = os.umask(mask)
    try:
        emit_package(out, target, winners)
        build_threads_library(out.parent / "cache" / "threads.so")
    finally:
        os.umask(before)
    for path in (out, *out.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, f"{path} has {mode:o}"
    assert stat.S_IMODE((out.parent / "cache" / "threads.so").stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("compiler", ("/bin/false", "no-such-compiler", "/bin/true", "'"))
def test_a_compiler_that_fails_leaves_the_package_as_it_was(
    compiler: str, out: Path, target: Target, winners: Sequence[Winner], monkeypatch: pytest.MonkeyPatch
) -> None:
    emit_package(out, target, winners)
    before = whole(out)
    monkeypatch.setenv("CC", compiler)
    with pytest.raises((MctuneError, RuntimeError)):
        emit_package(out, target, winners[:1])
    assert whole(out) == before
    monkeypatch.setenv("CC", "gcc -O1")
    emit_package(out, target, winners[:1])
    assert whole(out) != before


def test_a_process_that_has_a_kernel_keeps_it(out: Path, target: Target, winners: Sequence[Winner]) -> None:
    emit_package(out, target, winners)
    held = {path: os.open(path, os.O_RDONLY) for path in (out / "kernels").glob("*.so")}
    data = {path: path.read_bytes() for path in held}
    emit_package(out, target, winners[:1])
    for path, descriptor in held.items():
        assert os.pread(descriptor, 1 << 24, 0) == data[path]
        assert not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino
        os.close(descriptor)


# --- the package before


def _recommend(winners: Sequence[Winner]) -> Winner:
    return recommend(winners, 1.1)


def _at(winner: Winner, length: int, ms: float, predicted: bool = False, **config: int) -> Winner:
    outcome = Predicted(ms, "model") if predicted else Timed(ms, ms, ms, 9, 1e-7)
    problem = replace(winner.problem, segment_length=length)
    return replace(winner, problem=problem, outcome=outcome, config=Config.of(config), recommended=False)


def test_what_is_found_is_added_to_the_package_before(out: Path, target: Target, winners: Sequence[Winner]) -> None:
    emit_package(out, target, winners[:1])
    before = package_before(out, pytest.fail)
    assert [winner.record() for winner in before.winners] == [winners[0].record()] and not before.stale
    emit_package(out, target, merge(before.winners, winners[1:], _recommend))
    assert len(load_package(out).runtime.kernels.dispatch.TABLE.entries) == 2
    forget(out.name)
    said: list[str] = []
    spoilt = out / "kernels" / winners[0].library.name
    spoilt.write_bytes(spoilt.read_bytes() + b"x")
    before = package_before(out, said.append)
    assert not before.winners and {winner.problem for winner in before.stale} == {w.problem for w in winners}
    assert spoilt.name in said[0] and "built again" in said[0]
    (out / "tuned.json").write_text('{"schema": 1, "entries": [3, {}]}')
    assert package_before(out, said.append).stale == () and "entry 1 of the package before this one" in said[-1]
    assert package_before(out.parent / "none", pytest.fail).winners == ()


def test_a_package_of_another_runtime_is_built_again(
    out: Path, versions: tuple[Files, Files], winners: Sequence[Winner]
) -> None:
    replace_package(out, versions[1])
    before = package_before(out, pytest.fail)
    assert not before.winners and [winner.config for winner in before.stale] == [winners[0].config]


def test_the_better_one_stays_for_each_problem(winners: Sequence[Winner]) -> None:
    """Whatever comes after what: the fastest measured one, a measured one before any predicted one."""
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(200):
        found = [
            _at(winners[0], draw.choice((16, 32, 64)), draw.uniform(1, 2), draw.random() < 0.3, chunk=number)
            for number in range(draw.randrange(1, 8))
        ]
        held: list[Winner] = []
        for one in found:
            held = merge(held, [one], _recommend)
        for winner in held:
            rivals = [one for one in found if one.problem == winner.problem]
            measured = [one for one in rivals if isinstance(one.outcome, Timed)] or rivals
            assert winner.outcome == min(measured, key=lambda one: one.outcome.ms).outcome
        assert {winner.problem for winner in held} == {one.problem for one in found}
        comparable = [w for w in held if isinstance(w.outcome, Timed)] or held
        (best,) = [winner for winner in held if winner.recommended]
        assert best.problem == recommend(comparable, 1.1).problem


def test_what_is_not_touched_is_recommended_as_before(winners: Sequence[Winner]) -> None:
    other = replace(winners[0], problem=replace(winners[0].problem, H=7))
    again = _at(winners[0], 32, 9.0, chunk=1)
    merged = merge([winners[0], other], [again], _recommend)
    assert merged == [winners[0], other]
    same = replace(again, config=winners[0].config)
    assert merge([winners[0]], [same], _recommend) == [replace(same, recommended=True)], "its time is the later one"


# --- signatures


def _keys(folder: Path) -> tuple[Path, Path]:
    """Files with a private key and its public one."""
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from cryptography.hazmat.primitives import serialization as form

    key = ed25519.Ed25519PrivateKey.generate()
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_a_signed_package(
    out: Path, target: Target, winners: Sequence[Winner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    private, public = _keys(tmp_path)
    emit_package(out, target, winners, Signer.of(private))
    assert len((out / manifest.SIGNATURE).read_bytes()) == 64
    monkeypatch.setenv(manifest.KEY, str(public))
    command = [sys.executable, "-c", f"import {out.name} as package; print(len(package.__all__))"]
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, check=False)
    assert done.stdout == "4\n", done.stderr
    listing = json.loads((out / manifest.NAME).read_text())
    copy = Path(shutil.copytree(out, tmp_path / "other" / out.name))
    # Whoever changes a file can write its digest into the manifest, and cannot sign it.
    (copy / "README.md").write_text("mine")
    listing["files"]["README.md"] = manifest.digest(b"mine")
    (copy / manifest.NAME).write_text(json.dumps(listing))
    with pytest.raises(MctuneError, match=r"manifest\.sig of .* was not made for its manifest\.json by the key"):
        load_package(copy)
    for spoilt in (b"", bytes(64), bytes(65)):
        (copy / manifest.SIGNATURE).write_bytes(spoilt)
        with pytest.raises(MctuneError, match=r"manifest\.sig of"):
            load_package(copy)
    (copy / manifest.SIGNATURE).unlink()
    with pytest.raises(MctuneError, match="is not signed"):
        load_package(copy)
    for path in (private, tmp_path / "none", out / "README.md"):
        monkeypatch.setenv(manifest.KEY, str(path))
        with pytest.raises(MctuneError, match="is not a file with a public key in PEM"):
            load_package(out)
    emit_package(out, target, winners)
    assert not (out / manifest.SIGNATURE).exists(), "a signature of another manifest"


def test_keys_that_cannot_sign(tmp_path: Path) -> None:
    _, public = _keys(tmp_path)
    for path in (public, tmp_path / "none"):
        with pytest.raises(UsageError, match="is not a private key in PEM"):
            Signer.of(path)


def test_without_cryptography_a_signature_is_refused_and_says_what_to_install(
    out: Path, target: Target, winners: Sequence[Winner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emit_package(out, target, winners)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(UsageError, match="pip install"):
        Signer.of(tmp_path / "key")
    monkeypatch.setenv(manifest.KEY, str(tmp_path / "key"))
    with pytest.raises(MctuneError, match="pip install cryptography"):
        load_package(out)
