"""The tuned table and its manifest: what is loaded, and which entry serves a request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tables import PROBLEM, entry

from mctune.core.problem import Problem
from mctune.runtime.errors import PackageError
from mctune.runtime.kernels.table import Entry, Request, Table, find, load_table
from mctune.runtime.manifest import digest, verify

REQUEST = Request("forward", "linear", "grm", "constant", "independent", 1, 1024, 4, 4, 4, 4, None, "float32")


def write_package(root: Path, **data: Any) -> Path:
    (root / "kernels").mkdir()
    (root / "kernels" / "a.so").write_bytes(b"kernel")
    record = {"problem": PROBLEM, "backend": "tvm", "kernel": "kernels/a.so", "config": {}}
    (root / "tuned.json").write_text(json.dumps({"schema": 1, "target": {"name": "host"}, "entries": [record]} | data))
    files = {name: digest((root / name).read_bytes()) for name in ("kernels/a.so", "tuned.json")}
    (root / "manifest.json").write_text(json.dumps({"files": files}))
    return root


def test_table_loads(tmp_path: Path) -> None:
    table = load_table(verify(write_package(tmp_path)))
    assert table.target == "host"
    assert [(e.backend, e.kernel) for e in table.entries] == [("tvm", tmp_path / "kernels" / "a.so")]
    assert find(table, REQUEST) is table.entries[0]


def test_mctune_itself_has_no_kernels() -> None:
    assert load_table(None).entries == ()


def test_changed_file_is_refused(tmp_path: Path) -> None:
    (write_package(tmp_path) / "kernels" / "a.so").write_bytes(b"kernel!")
    with pytest.raises(PackageError, match=r"kernels/a\.so has changed since .* `mctune emit`"):
        load_table(verify(tmp_path))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    (write_package(tmp_path) / "kernels" / "a.so").unlink()
    with pytest.raises(PackageError, match=r"kernels/a\.so is in the manifest of .* and missing from it"):
        load_table(verify(tmp_path))


def test_missing_or_broken_manifest_is_refused(tmp_path: Path) -> None:
    manifest = write_package(tmp_path) / "manifest.json"
    manifest.write_text('{"files": []}')
    with pytest.raises(PackageError, match=r"manifest\.json is missing or unreadable"):
        verify(tmp_path)
    manifest.unlink()
    with pytest.raises(PackageError, match=r"manifest\.json is missing or unreadable"):
        load_table(verify(tmp_path))


@pytest.mark.parametrize("left_out", ("kernels/a.so", "tuned.json"))
def test_file_outside_the_manifest_is_refused(tmp_path: Path, left_out: str) -> None:
    manifest = write_package(tmp_path) / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    del files[left_out]
    manifest.write_text(json.dumps({"files": files}))
    with pytest.raises(PackageError, match=f"{left_out} (is not in the manifest|was added to the package)"):
        load_table(verify(tmp_path))


def test_unknown_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="schema 2, this runtime reads 1"):
        load_table(verify(write_package(tmp_path, schema=2)))


@pytest.mark.parametrize("value", (None, True, 0, 1.5, "1", [1], 10**400))
@pytest.mark.parametrize("name", ("B", "T", "H", "Dk", "Dv"))
def test_what_is_no_size_is_refused(tmp_path: Path, name: str, value: object) -> None:
    record = {"problem": PROBLEM | {name: value}, "backend": "tvm", "kernel": "kernels/a.so", "config": {}}
    with pytest.raises(PackageError, match=f"{name} ?(is|=).*(not a size|not of type int)"):
        load_table(verify(write_package(tmp_path, entries=[record])))


@pytest.mark.parametrize(
    "change",
    (
        {"recurrence": "swla"}, {"aggregation": "ssc", "top_k": 2}, {"state_init": "checkpoint"}, {"Dk": 8}, {"Dv": 8},
        {"pass_": "backward"}, {"pass_": "decode"},
    ),
    ids=str,
)  # fmt: skip
def test_another_problem_is_not_served(change: dict[str, Any]) -> None:
    assert find(Table((entry(),)), replace(REQUEST, **change)) is None


@pytest.mark.parametrize(
    "change",
    (
        {"B": 3}, {"T": 7}, {"H": 9}, {"dtype": "bfloat16"}, {"aggregation": "soup"}, {"segment_length": 8},
        {"segmentation": "packed"}, {"segmentation": "logarithmic", "segment_length": None},
    ),
    ids=str,
)  # fmt: skip
def test_other_sizes_segments_dtypes_and_soup_are_served(change: dict[str, Any]) -> None:
    assert find(Table((entry(),)), replace(REQUEST, **change)) is not None


def test_soup_of_a_deep_memory_is_not_grm() -> None:
    assert find(Table((entry(recurrence="dla"),)), replace(REQUEST, recurrence="dla", aggregation="soup")) is None


def test_command_names_a_problem_that_would_serve() -> None:
    request = replace(REQUEST, dtype="bfloat16", aggregation="ssc", top_k=3)
    problem = Problem.from_json(request.to_json())
    assert (problem.dtype, problem.top_k, problem.segment_length) == ("float32", 3, 4)
    assert Entry(problem.to_dict(), "tvm", Path("a.so"), {}).serves(request)
    backward = replace(request, pass_="backward")
    assert Problem.from_json(backward.to_json()).pass_ == "backward"


def test_each_pass_has_its_kernel() -> None:
    table = Table((entry("step", **{"pass": "decode"}), entry("back", **{"pass": "backward"}), entry()))
    for pass_, at in (("decode", 0), ("backward", 1), ("forward", 2)):
        assert find(table, replace(REQUEST, pass_=pass_)) is table.entries[at]


def test_other_backends_do_not_serve() -> None:
    assert find(Table((entry(backend="triton"),)), REQUEST) is None
    assert find(Table((entry(),)), REQUEST, "triton") is None


def test_nearest_entry_serves() -> None:
    table = Table((entry("short", T=128), entry("long", T=8192), entry("wide", H=64), entry("same"), entry("again")))
    assert find(table, REQUEST) is table.entries[3]
    assert find(table, replace(REQUEST, T=100)) is table.entries[0]
    assert find(table, replace(REQUEST, T=100_000)) is table.entries[1]
    assert find(table, replace(REQUEST, B=16)) is table.entries[2]
    few, many = (entry(str(k), aggregation="ssc", top_k=k) for k in (2, 16))
    assert find(Table((few, many)), replace(REQUEST, aggregation="ssc", top_k=12)) is many


def test_nearest_segment_length_serves() -> None:
    """Under logarithmic segmentation the longest span, here 1024 of 1024 + 4 tokens, is compared."""
    short, long = entry("short", segment_length=16), entry("long", segment_length=512)
    log = entry("log", segmentation="logarithmic", segment_length=None, T=1028)
    table = Table((short, long, log))
    for length, nearest in ((4, short), (40, short), (200, long), (4000, log)):
        assert find(table, replace(REQUEST, segment_length=length)) is nearest
    assert find(table, replace(REQUEST, segmentation="logarithmic", segment_length=None, T=1028)) is log
    assert find(table, replace(REQUEST, segmentation="logarithmic", segment_length=None, T=31)) is short


@pytest.mark.parametrize(
    ("backend", "own", "device", "dtype", "served"),
    (
        ("tvm", "float32", "cpu", "bfloat16", True),
        ("tvm", "float32", "cuda", "float32", False),
        ("triton", "bfloat16", "cuda", "float16", True),
        ("triton", "bfloat16", "cuda", "float32", False),
        ("triton", "float32", "cuda", "bfloat16", False),
        ("triton", "bfloat16", "cpu", "bfloat16", False),
    ),
)
def test_kernels_serve_their_device_and_dtype(backend: str, own: str, device: str, dtype: str, served: bool) -> None:
    assert entry(backend=backend, dtype=own).serves(replace(REQUEST, device=device, dtype=dtype)) == served
