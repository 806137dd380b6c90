"""Tuned table, manifest, and which implementation serves a call."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import arguments

from mctune.core.problem import Problem
from mctune.runtime import dispatch
from mctune.runtime.errors import BackendError, PackageError
from mctune.runtime.functional import memory_caching
from mctune.runtime.manifest import check_manifest, digest
from mctune.runtime.table import Entry, Request, Table, find, load_table
from mctune.runtime.tvm_loader import KernelError

PROBLEM = {
    "recurrence": "linear", "aggregation": "grm", "segmentation": "constant", "state_init": "independent",
    "pass": "forward", "B": 1, "T": 1024, "H": 4, "Dk": 4, "Dv": 4, "segment_length": 4, "dtype": "float32",
}  # fmt: skip
REQUEST = Request("linear", "grm", "constant", "independent", 1, 1024, 4, 4, 4, 4, None, "float32")


def entry(name: str = "a", backend: str = "tvm", **changes: Any) -> Entry:
    return Entry(PROBLEM | changes, backend, Path(f"{name}.so"), {})


def write_package(root: Path, **data: Any) -> Path:
    (root / "kernels").mkdir()
    (root / "kernels" / "a.so").write_bytes(b"kernel")
    record = {"problem": PROBLEM, "backend": "tvm", "kernel": "kernels/a.so", "config": {}}
    (root / "tuned.json").write_text(json.dumps({"schema": 1, "target": {"name": "host"}, "entries": [record]} | data))
    files = {name: digest(root / name) for name in ("kernels/a.so", "tuned.json")}
    (root / "manifest.json").write_text(json.dumps({"files": files}))
    return root


def test_table_loads(tmp_path: Path) -> None:
    table = load_table(write_package(tmp_path))
    assert table.target == "host"
    assert [(e.backend, e.kernel) for e in table.entries] == [("tvm", tmp_path / "kernels" / "a.so")]
    assert find(table, REQUEST) is table.entries[0]


def test_no_table_is_an_empty_table(tmp_path: Path) -> None:
    assert load_table(tmp_path).entries == ()


def test_changed_file_is_refused(tmp_path: Path) -> None:
    (write_package(tmp_path) / "kernels" / "a.so").write_bytes(b"kernel!")
    with pytest.raises(PackageError, match=r"kernels/a\.so has changed since .* `mctune emit`"):
        load_table(tmp_path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    (write_package(tmp_path) / "kernels" / "a.so").unlink()
    with pytest.raises(PackageError, match=r"kernels/a\.so is in the manifest of .* and missing from it"):
        load_table(tmp_path)


def test_missing_or_broken_manifest_is_refused(tmp_path: Path) -> None:
    manifest = write_package(tmp_path) / "manifest.json"
    manifest.write_text('{"files": []}')
    with pytest.raises(PackageError, match=r"manifest\.json is missing or unreadable"):
        check_manifest(tmp_path)
    manifest.unlink()
    with pytest.raises(PackageError, match=r"manifest\.json is missing or unreadable"):
        load_table(tmp_path)


@pytest.mark.parametrize("left_out", ("kernels/a.so", "tuned.json"))
def test_file_outside_the_manifest_is_refused(tmp_path: Path, left_out: str) -> None:
    manifest = write_package(tmp_path) / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    del files[left_out]
    manifest.write_text(json.dumps({"files": files}))
    with pytest.raises(PackageError, match=f"{left_out} is .*not in the manifest"):
        load_table(tmp_path)


def test_unknown_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="schema 2, this runtime reads 1"):
        load_table(write_package(tmp_path, schema=2))


@pytest.mark.parametrize(
    "change",
    (
        {"recurrence": "swla"}, {"aggregation": "ssc", "top_k": 2}, {"segmentation": "packed"},
        {"state_init": "checkpoint"}, {"Dk": 8}, {"Dv": 8}, {"segment_length": 8},
    ),
    ids=str,
)  # fmt: skip
def test_another_problem_is_not_served(change: dict[str, Any]) -> None:
    assert find(Table((entry(),)), replace(REQUEST, **change)) is None


@pytest.mark.parametrize(
    "change", ({"B": 3}, {"T": 7}, {"H": 9}, {"dtype": "bfloat16"}, {"aggregation": "soup"}), ids=str
)
def test_other_sizes_dtypes_and_soup_are_served(change: dict[str, Any]) -> None:
    assert find(Table((entry(),)), replace(REQUEST, **change)) is not None


def test_logarithmic_is_served_whatever_the_segment_length() -> None:
    table = Table((entry(segmentation="logarithmic", segment_length=None),))
    assert find(table, replace(REQUEST, segmentation="logarithmic", segment_length=None)) is not None


def test_command_names_a_problem_that_would_serve() -> None:
    request = replace(REQUEST, dtype="bfloat16", aggregation="ssc", top_k=3)
    problem = Problem.from_json(request.to_json())
    assert (problem.dtype, problem.top_k, problem.segment_length) == ("float32", 3, 4)
    assert Entry(problem.to_dict(), "tvm", Path("a.so"), {}).serves(request)


def test_other_passes_and_backends_do_not_serve() -> None:
    assert find(Table((entry(**{"pass": "decode"}), entry(backend="triton"))), REQUEST) is None
    assert find(Table((entry(),)), REQUEST, "triton") is None


def test_nearest_entry_serves() -> None:
    table = Table((entry("short", T=128), entry("long", T=8192), entry("wide", H=64), entry("same"), entry("again")))
    assert find(table, REQUEST) is table.entries[3]
    assert find(table, replace(REQUEST, T=100)) is table.entries[0]
    assert find(table, replace(REQUEST, T=100_000)) is table.entries[1]
    assert find(table, replace(REQUEST, B=16)) is table.entries[2]
    few, many = (entry(str(k), aggregation="ssc", top_k=k) for k in (2, 16))
    assert find(Table((few, many)), replace(REQUEST, aggregation="ssc", top_k=12)) is many


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A table of one kernel whose launches are recorded and answered with ones."""
    calls: list[dict[str, Any]] = []

    def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, u: torch.Tensor, **rest: Any) -> torch.Tensor:
        calls.append({"q": q, "k": k, "v": v, "u": u, **rest})
        return torch.ones_like(v)

    monkeypatch.setattr(dispatch, "TABLE", Table((entry(),)))
    monkeypatch.setattr(dispatch, "_kernel", lambda entry: launch)
    monkeypatch.setattr(dispatch, "_warned", set())
    return calls


def test_fitting_call_runs_the_kernel(tuned: list[dict[str, Any]]) -> None:
    tensors = arguments("linear", dtype=torch.bfloat16)
    y = memory_caching(**tensors, segment_length=4, scale=0.5)
    assert y.dtype == torch.bfloat16 and bool((y == 1).all())
    (call,) = tuned
    assert all(call[name].dtype == torch.float32 and call[name].is_contiguous() for name in ("q", "k", "v", "u"))
    assert torch.equal(call["u"], tensors["u"].float())
    assert (call["scale"], call["top_k"], call["segments"].count, call["g"]) == (0.5, 2, 3, None)


def test_connector_defaults_to_the_query(tuned: list[dict[str, Any]]) -> None:
    tensors = arguments("linear")
    memory_caching(tensors["q"], tensors["k"], tensors["v"], segment_length=4, backend="tvm")
    assert torch.equal(tuned[0]["u"], tensors["q"])


def test_gradients_deep_memories_and_float64_run_eagerly(tuned: list[dict[str, Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = arguments("linear")
        tensors["v"].requires_grad_()
        memory_caching(**tensors, segment_length=4).sum().backward()
        memory_caching(**arguments("dla"), recurrence="dla", segment_length=4)
        memory_caching(**{name: x.double() for name, x in arguments("linear").items()}, segment_length=4)
    assert not tuned
    with torch.no_grad():
        memory_caching(**tensors, segment_length=4)
    assert len(tuned) == 1


def test_misfit_warns_once_a_kind_with_the_command(tuned: list[dict[str, Any]]) -> None:
    tensors = arguments("linear")
    with pytest.warns(UserWarning, match=r"`mctune search --gpu cpu --problem '\{.*\"segment_length\":5") as caught:
        for _ in range(2):
            memory_caching(**tensors, segment_length=5)
        memory_caching(**tensors, segment_length=6)
        memory_caching(**tensors, segment_length=5, aggregation="ssc")
    assert len(caught) == 2
    assert caught[0].filename == __file__
    assert not tuned


def test_untuned_use_warns_once(tuned: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TABLE", Table())
    with pytest.warns(UserWarning, match="no tuned kernels here.*`mctune search --gpu cpu`") as caught:
        for length in (4, 5):
            memory_caching(**arguments("linear"), segment_length=length)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("backend", "options", "reason"),
    (
        ("tvm", {"segment_length": 5}, "none of the 1 tuned kernels fits"),
        ("triton", {"segment_length": 4}, "none of the 1 tuned kernels fits"),
        ("tvm", {"recurrence": "dla"}, "recurrence='dla' has no kernels yet"),
    ),
)
def test_forced_backend_that_cannot_serve(
    tuned: list[dict[str, Any]], backend: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BackendError, match=f'backend="{backend}" cannot serve this call: {reason}'):
        memory_caching(**arguments(options.get("recurrence", "linear")), **options, backend=backend)


def test_forced_backend_refuses_gradients(tuned: list[dict[str, Any]]) -> None:
    tensors = arguments("linear")
    tensors["q"].requires_grad_()
    with pytest.raises(BackendError, match="requires a gradient and kernels have no backward yet"):
        memory_caching(**tensors, segment_length=4, backend="tvm")


def test_unusable_kernel(tuned: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(entry: Entry) -> None:
        raise KernelError("the pair is wrong")

    monkeypatch.setattr(dispatch, "_kernel", refuse)
    tensors = arguments("linear")
    with pytest.warns(UserWarning, match="the eager path runs: the pair is wrong"):
        y = memory_caching(**tensors, segment_length=4)
    torch.testing.assert_close(y, memory_caching(**tensors, segment_length=4, backend="eager"))
    with pytest.raises(BackendError, match="the pair is wrong"):
        memory_caching(**tensors, segment_length=4, backend="tvm")
