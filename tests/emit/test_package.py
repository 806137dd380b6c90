"""What an emitted package holds, what it refuses to load, and what emission does to the folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packages import GRM

from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted
from mctune.core.target import Target
from mctune.core.winner import Winner
from mctune.emit import emit_package
from mctune.emit import package as emitter
from mctune.runtime.api import functional
from mctune.runtime.kernels import dispatch
from mctune.runtime.manifest import digest
from mctune.verify.inputs import make_inputs
from mctune.verify.package import check_package, load_package


def emitted(path: Path) -> set[str]:
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_contents(out: Path, target: Target, winners: Sequence[Winner]) -> None:
    assert emit_package(out, target, winners) == out
    runtime = {f"runtime/{name}" for name in emitted(emitter._RUNTIME)}
    names = {path.name for path in (winners[0].library, winners[0].source, winners[0].portable) if path}
    expected = runtime | {
        "__init__.py",
        "huggingface.py",
        "README.md",
        "tuned.json",
        "manifest.json",
        "kernels/threads.so",
    }
    assert emitted(out) == expected | {f"kernels/{name}" for name in names}
    assert {"runtime/api/functional.py", "runtime/kernels/tvm/threads.c"} <= runtime
    for name in runtime:
        assert (out / name).read_bytes() == (emitter._RUNTIME.parent / name).read_bytes()
    files = json.loads((out / "manifest.json").read_text())["files"]
    assert set(files) == emitted(out) - {"manifest.json"}
    assert all(digest((out / name).read_bytes()) == value for name, value in files.items())


def test_table(out: Path, target: Target, winners: Sequence[Winner]) -> None:
    emit_package(out, target, winners)
    table = json.loads((out / "tuned.json").read_text())
    assert table["schema"] == 1 and table["target"]["arch"] == target.arch
    assert table["versions"]["apache-tvm-ffi"].startswith("0.1.14") and "torch" in table["versions"]
    entry, other = table["entries"]
    assert entry["problem"] == GRM.to_dict() and entry["config"]["segment_length"] == 32
    assert entry["kernel"] == f"kernels/{winners[0].library.name}" and (out / entry["kernel"]).is_file()
    # On a CPU of just the portable level the two are one file.
    assert (entry["portable"] != entry["kernel"]) == (target.arch != "x86-64-v3")
    assert (out / entry["portable"]).is_file()
    assert "# forward linear grm" in (out / entry["source"]).read_text() and entry["source"].endswith(".py")
    timed = {"kind": "timed", "ms": 1.5, "low": 1.4, "high": 1.7, "repeats": 21, "error": 3e-7}
    assert entry["outcome"] == {**timed, "sm_mhz": None, "celsius": None, "notes": [], "parts": [], "pace": 1.0}
    assert entry["verified"] == {"error": 3e-7, "tolerance": 2e-5, "cases": 3}
    assert (entry["backend"], entry["recommended"], other["recommended"]) == ("tvm", True, False)
    assert other["problem"]["segmentation"] == "logarithmic"


def test_card(out: Path, target: Target, winners: Sequence[Winner]) -> None:
    predicted = replace(winners[1], outcome=Predicted(2.0, "roofline"), verified={}, portable=None)
    emit_package(out, target, [winners[0], predicted])
    text = (out / "README.md").read_text()
    assert f"from {out.name} import memory_caching, MemoryCaching" in text
    rows = [line for line in text.splitlines() if line.startswith("| forward")]
    assert "measured 1.500 ms (1.400 to 1.700) | 3.0e-07 | yes |" in rows[0] and "chunk=32" in rows[0]
    assert "predicted 2.000 ms (roofline) |  |  |" in rows[1]
    assert "apache-tvm-ffi==0.1.14" in text


def test_every_kernel_of_the_package_agrees_with_the_oracle(
    out: Path, target: Target, winners: Sequence[Winner]
) -> None:
    emit_package(out, target, winners)
    checks = list(check_package(out, 0))
    assert len(checks) == 10 and all(check.passed for check in checks)
    assert {check.problem.segmentation for check in checks} == {"constant", "logarithmic"}


def test_the_portable_build_serves_a_lesser_cpu(
    out: Path, target: Target, winners: Sequence[Winner], monkeypatch: pytest.MonkeyPatch
) -> None:
    emit_package(out, target, [replace(winners[0], cpu_flags=("avx2", "amx_of_tomorrow"))])
    package = load_package(out)
    loader, launcher = (
        __import__(f"{out.name}.runtime.{name}", fromlist=["x"])
        for name in ("kernels.tvm.loader", "kernels.tvm.matrix.forward")
    )
    loaded: list[str] = []
    real = loader.load_library
    monkeypatch.setattr(launcher, "load_library", lambda path: loaded.append(path.name) or real(path))
    monkeypatch.setattr(loader, "host_flags", lambda: frozenset({"avx2", "fma", "bmi2", "f16c"}))
    call = make_inputs(GRM, 0).arguments(GRM)
    assert package.memory_caching(**call, backend="tvm").shape == call["v"].shape
    assert winners[0].portable is not None and loaded == [winners[0].portable.name]


def test_operators_of_a_package_and_of_mctune_live_side_by_side(
    out: Path, target: Target, winners: Sequence[Winner]
) -> None:
    """Each has its own table; loading one must not put its operators in the place of the other's."""
    package = load_package(emit_package(out, target, winners))
    assert dispatch.NAMESPACE == "mctune"
    call = make_inputs(GRM, 0).arguments(GRM)
    expected = functional.memory_caching(**call, backend="eager")
    for namespace, memory_caching in ((out.name, package.memory_caching), ("mctune", functional.memory_caching)):
        torch._dynamo.reset()
        graphs: list[str] = []

        def keep(graph: torch.fx.GraphModule, _: object, graphs: list[str] = graphs) -> Any:
            graphs.append(graph.code)
            return graph.forward

        y = torch.compile(memory_caching, backend=keep, fullgraph=True)(**call)
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
        assert f"torch.ops.{namespace}.memory_caching_forward" in graphs[0]
        assert hasattr(getattr(torch.ops, namespace), "memory_caching_backward")
    torch._dynamo.reset()


def test_emitting_again_keeps_the_search_and_drops_stale_kernels(
    out: Path, target: Target, winners: Sequence[Winner]
) -> None:
    emit_package(out, target, winners)
    (out / "search").mkdir()
    (out / "search" / "study.db").write_text("trials")
    (out / "notes.txt").write_text("mine")
    stale = winners[0].library.with_name("other.so")
    stale.write_bytes(winners[0].library.read_bytes())
    emit_package(out, target, [replace(winners[0], library=stale)])
    assert (out / "kernels" / "other.so").is_file()
    (out / "runtime" / "left_over.py").write_text("")
    emit_package(out, target, winners)
    assert not (out / "kernels" / "other.so").exists() and not (out / "runtime" / "left_over.py").exists()
    assert (out / "search" / "study.db").read_text() == "trials" and (out / "notes.txt").read_text() == "mine"
    assert "search/study.db" not in (out / "manifest.json").read_text()
    load_package(out)


@pytest.mark.parametrize(
    "name", ("__init__.py", "README.md", "runtime/mine.py", "kernels/mine.cu", "manifest.json", "tuned.json")
)
def test_a_folder_of_others_is_left_alone(name: str, out: Path, target: Target, winners: Sequence[Winner]) -> None:
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(UsageError, match=r"is in the way: .* is not a package that mctune wrote .*--out"):
        emit_package(out, target, winners)
    assert emitted(out) == {name} and (out / name).read_text() == "mine"


def test_a_search_that_never_emitted_may_be_emitted_into(out: Path, target: Target, winners: Sequence[Winner]) -> None:
    (out / "search").mkdir(parents=True)
    emit_package(out, target, winners)
    load_package(out)


@pytest.mark.parametrize("name", ("mctune-cpu", "1st", ""))
def test_names_that_cannot_be_imported(name: str, tmp_path: Path, target: Target, winners: Sequence[Winner]) -> None:
    with pytest.raises(UsageError, match="cannot be imported: name the directory like a Python module"):
        emit_package(tmp_path / name if name else Path("/"), target, winners)
    with pytest.raises(UsageError, match="nothing to emit"):
        emit_package(tmp_path / "good", target, [])
    assert not list(tmp_path.iterdir())


def test_a_package_of_an_earlier_layout_is_told_from_others(tmp_path: Path) -> None:
    old = tmp_path / "mctune_old_layout"
    (old / "runtime").mkdir(parents=True)
    for path in ("__init__.py", "runtime/__init__.py", "runtime/dispatch.py"):
        (old / path).write_text("")
    (old / "tuned.json").write_text('{"schema": 1, "entries": []}')
    with pytest.raises(UsageError, match="was emitted by an earlier mctune: it still runs, but emit it again"):
        load_package(old)
    assert old.name not in sys.modules
