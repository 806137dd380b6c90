"""flash-linear-attention's benchmark JSON: rows come back, and its own documents are read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted, Timed
from mctune.core.problem import Problem
from mctune.report.fla import SHAPES, Result, from_fla, to_fla
from mctune.report.rows import Row
from mctune.report.write import Document
from mctune.runtime.traits import AGGREGATIONS, RECURRENCES
from tests.report.schemas import FLA

B, T, H, D = 4, 2048, 16, 128
GRM = Problem(B=B, T=T, H=H, Dk=D, Dv=D, segment_length=256, dtype="bfloat16")
ENVIRONMENT = {
    "target": {"name": "h100-sxm", "title": "NVIDIA H100", "kind": "cuda"}, "system": "Linux", "machine": "x86_64",
    "versions": {"torch": "2.13.0", "triton": "3.7.1"},
}  # fmt: skip
# As the runner writes it; names and times are made up.
THEIRS = {
    "machine_info": {
        "hostname": "node", "platform": "Linux-6.8", "pytorch_version": "2.7.1", "cuda_version": "12.8",
        "triton_version": "3.3.1", "gpu_name": "NVIDIA H100", "gpu_count": 8, "gpu_memory_gb": 79.1,
    },
    "results": [
        {"op": op, "mode": mode, "B": B, "T": T, "H": H, "D": D, "median_ms": ms, "p20_ms": ms - 0.01,
         "p80_ms": ms + 0.02}
        for op, mode, ms in (("chunk_linear_attn", "fwd", 0.25), ("chunk_simple_gla", "fwdbwd", 1.125))
    ],
}  # fmt: skip


def row(problem: Problem = GRM, time: float = 0.5, **changes: Any) -> Row:
    made = Row.of("h100-sxm", problem, "triton", Config.of({"BT": 64}), Timed(time, time - 0.1, time + 0.2, 9, 1e-3))
    return replace(made, **changes)


def document(*rows: Row) -> Document:
    return Document(rows, ENVIRONMENT, None)


def written(*rows: Row) -> tuple[Any, list[str]]:
    notes: list[str] = []
    plain = json.loads(json.dumps(to_fla(document(*rows), notes.append), allow_nan=False))
    jsonschema.Draft202012Validator(FLA).validate(plain)
    return plain, notes


def test_their_documents_are_read() -> None:
    jsonschema.Draft202012Validator(FLA).validate(THEIRS)
    found, rows = from_fla(THEIRS)
    assert found == (
        Result("chunk_linear_attn", "fwd", B, T, H, D, 0.25, 0.24, 0.27),
        Result("chunk_simple_gla", "fwdbwd", B, T, H, D, 1.125, 1.115, 1.145),
    )
    assert not rows and all(one.standard for one in found) and (B, T, H, D) in SHAPES


ms = st.floats(1e-6, 1e6)
problems = st.builds(
    lambda recurrence, aggregation, T, D, dtype, pass_: Problem(
        recurrence=recurrence, aggregation=aggregation, T=T, H=2, Dk=D, Dv=D, segment_length=16, dtype=dtype,
        pass_=pass_,
    ),
    st.sampled_from(list(RECURRENCES)), st.sampled_from(list(AGGREGATIONS)), st.integers(1, 99), st.integers(1, 9),
    st.sampled_from(("float32", "bfloat16")), st.sampled_from(("forward", "backward")),
)  # fmt: skip
rows = st.builds(
    lambda problem, backend, outcome, config, baselines: Row.of(
        "h100-sxm", problem, backend + " step" * (problem.pass_ == "backward"), Config.of(config), outcome,
        baselines=baselines,
    ),
    problems, st.sampled_from(("tvm", "triton")),
    st.builds(Timed, ms, ms, ms, st.integers(0, 99), ms, st.none() | ms, st.none() | ms),
    st.dictionaries(st.text(max_size=9), st.integers() | st.booleans() | st.text(max_size=9), max_size=3),
    st.dictionaries(st.sampled_from(("eager", "fla chunk_linear_attn")), ms),
)  # fmt: skip


@given(st.lists(rows, max_size=6, unique_by=lambda row: (row.problem, row.backend)))
def test_rows_come_back(made: list[Row]) -> None:
    plain, notes = written(*made)
    found, back = from_fla(plain)
    assert not notes and sorted(back, key=repr) == sorted(made, key=repr)
    keys = [(one.op, one.mode, one.B, one.T, one.H, one.D) for one in found]
    assert len(set(keys)) == len(keys)
    ours = {(one.median_ms, one.p20_ms, one.p80_ms) for one in found if one.op.startswith("mctune_")}
    assert ours == {(row.ms, row.low, row.high) for row in made}


def test_a_row_beside_theirs() -> None:
    """What was timed beside a row stands beside it, under their own name; of several times the least."""
    beside = {"fla chunk_linear_attn": 0.75, "eager": 9.0}
    plain, _ = written(
        row(baselines=tuple(beside.items())),
        row(GRM.replace(segment_length=512), baselines=(("fla chunk_linear_attn", 0.625),)),
    )
    found = {one.op: one for one in from_fla(plain)[0]}
    assert set(found) == {
        "mctune_linear_grm_constant_independent_c256_bfloat16_triton",
        "mctune_linear_grm_constant_independent_c512_bfloat16_triton", "chunk_linear_attn",
    }  # fmt: skip
    assert found["chunk_linear_attn"] == Result("chunk_linear_attn", "fwd", B, T, H, D, 0.625)
    assert plain["machine_info"]["gpu_name"] == "NVIDIA H100" and plain["machine_info"]["hostname"] == "N/A"


def test_what_is_left_out_is_said() -> None:
    predicted = Row.of("h100-sxm", GRM, "triton", Config.of({}), Predicted(0.1, "roofline"))
    plain, notes = written(
        row(), row(time=0.75, config=Config.of({"BT": 32})), predicted, row(GRM.replace(Dv=64)),
        row(GRM.replace(pass_="decode")), row(GRM.replace(pass_="backward")),
        row(GRM.replace(pass_="backward"), backend="triton step"),
    )  # fmt: skip
    assert [(one["mode"], one["median_ms"]) for one in plain["results"]] == [("fwdbwd", 0.5), ("fwd", 0.5)]
    assert sorted(note.removeprefix("h100-sxm: ") for note in notes) == [
        "1 of 7 rows left out: a faster one has the same op, mode and shape",
        "1 of 7 rows left out: the format has one width, D, and theirs are two",
        "1 of 7 rows left out: their times are predicted, and the format has measured ones alone",
        "2 of 7 rows left out: the format has forwards and training steps, no decode steps and no backward kernels "
        "alone",
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.pop("op"), lambda one: one.update(mode="bwd"), lambda one: one.update(B=True),
        lambda one: one.update(T=0), lambda one: one.update(median_ms=float("nan")), lambda one: one.update(p20_ms="x"),
        lambda one: one.update(mctune={"problem": {}}), lambda one: one.update(mctune=3),
    ],
)  # fmt: skip
def test_what_is_not_theirs(change: Callable[[Any], Any]) -> None:
    broken: Any = copy.deepcopy(THEIRS)
    change(broken["results"][1])
    with pytest.raises(UsageError, match=r"^result 1 is not one of flash-linear-attention's: [^\n]*$"):
        from_fla(broken)
    with pytest.raises(UsageError, match="no list of results"):
        from_fla({"results": {}})


def test_the_command(run: Callable[..., Any], tmp_path: Path) -> None:
    bench = {"rows": [row().to_dict()], "environment": ENVIRONMENT}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    ran = run("report", "--format", "FLA", str(tmp_path / "bench.json"), "--out", str(tmp_path), "--json")
    path = tmp_path / "h100-sxm" / "fla.json"
    assert ran.code == 0 and json.loads(ran.out) == [{"file": str(path), "rows": 1}]
    assert from_fla(json.loads(path.read_text()))[1] == (row(),)
    before = path.read_bytes()
    run("report", "--format", "fla", str(tmp_path / "bench.json"), "--out", str(tmp_path))
    assert path.read_bytes() == before
    bench["rows"] = [row(GRM.replace(pass_="decode")).to_dict()]
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    ran = run("report", "--format", "fla", str(tmp_path / "bench.json"), "--out", str(tmp_path))
    assert ran.code == 2 and "nothing of h100-sxm can be written as fla" in ran.err
