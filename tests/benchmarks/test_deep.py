"""The benchmark of deep memories: what is compared, what is said without kernels. Tiny shapes, one round."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mctune.core.work import work
from mctune.measure import bench
from mctune.report.write import read_document
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.kernels.support import Support

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/deep.py, with small products and copies, and small problems."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(bench, "_SGEMM", ((64, 64, 64), (128, 64, 16)))
    monkeypatch.setattr(bench, "COPY_BYTES", 1 << 16)
    module = importlib.import_module("deep")
    small = {"T": 40, "H": 1, "Dk": 8, "Dv": 8, "segment_length": 16, "inner_chunk": 4}
    for name in ("GRM", "SSC"):
        monkeypatch.setattr(module, name, getattr(module, name).replace(**small))
    monkeypatch.setattr(module, "STEPS", tuple(problem.replace(**small) for problem in module.STEPS))
    yield module
    for name in ("deep", "training", "forward"):
        sys.modules.pop(name, None)


def test_all_of_it_without_kernels(
    deep: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deep, "kernels", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["deep.py", "--rounds", "1", "--out", str(tmp_path / "deep.json")])
    deep.main()
    said = capsys.readouterr().out
    assert said.count("\neager ") == said.count("\nvmap(grad) ") == 4
    assert said.count("forward + backward ") == 2 and "GFLOP/s" in said
    document = read_document(tmp_path / "deep.json")
    assert [row.backend for row in document.rows] == ["eager"] * 2 + ["eager step"] * 2
    assert all(dict(row.baselines).keys() == {"vmap(grad)"} for row in document.rows)
    peaks = json.loads((tmp_path / "deep.json").read_text())["peaks"]
    assert [set(one["bytes"]) for one in peaks] == [{"eager", "vmap(grad)"}] * 2
    assert all(size > 0 for one in peaks for size in one["bytes"].values())


def test_a_kernel_is_what_the_others_are_set_against(deep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*, backend: str, **arguments: object) -> torch.Tensor:
        assert backend == "tvm"
        return memory_caching(**arguments, backend="eager")  # type: ignore[arg-type]

    monkeypatch.setattr(deep, "kernels", lambda *_: SimpleNamespace(memory_caching=kernel))
    monkeypatch.setattr(deep, "find_entry", lambda *_: SimpleNamespace(record={"config": {"rows": 4}}))
    found = deep.bench(deep.STEPS[0], None, 1)
    assert found.result.backend == "tvm step" and found.result.config["rows"] == 4
    assert set(found.peaks) == {"tvm", "eager", "vmap(grad)"} == {"tvm", *found.result.baselines}
    first = deep.table(found).splitlines()[1].split()
    rate = work(deep.STEPS[0]).operations / found.result.timed.ms / 1e6
    assert first[0] == "tvm" and f"{rate:.1f}" in first


def test_what_has_no_kernel_is_said(deep: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notes: list[str] = []
    monkeypatch.setattr(deep, "say", notes.append)
    monkeypatch.setattr(deep, "computes", lambda backend, problem: Support.no("no template"))
    assert deep.kernels(deep.GRM, bench.resolve("cpu")[0], None, tmp_path) is None
    assert notes == ["no kernel: no template"]
