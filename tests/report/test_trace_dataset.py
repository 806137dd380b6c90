"""FlashInfer-Trace datasets: flashinfer-bench's models take them, rows come back, solutions run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mctune.backends.tvm import TvmBackend
from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted, Timed
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.core.winner import Winner
from mctune.emit import emit_package
from mctune.report.rows import sort_key
from mctune.report.trace.dataset import FOLDER, Package, from_flashinfer_trace, write_flashinfer_trace
from mctune.report.trace.definition import definition, problem_of, workload
from mctune.report.write import Document, rows_of_tuned
from mctune.runtime.traits import AGGREGATIONS, PASSES, RECURRENCES
from tests.report.flashinfer import module

GRM = Problem(T=64, H=2, Dk=8, Dv=8, segment_length=16)
FILES = {
    "__init__.py": b"from .runtime import x\n", "runtime/__init__.py": b"", "runtime/x.py": b"x = 1\n",
    "kernels/k.py": b"source", "kernels/k.so": b"\x7fELF\0\xff", "kernels/threads.so": b"\x7fELF\0",
}  # fmt: skip

text = st.text(max_size=20)
ms = st.floats(1e-6, 1e6)
names = st.from_regex(r"[a-z][ -~]{0,9}", fullmatch=True)
parts = st.dictionaries(names, ms, max_size=3).map(lambda one: tuple(one.items()))
problems = st.builds(
    lambda recurrence, aggregation, pass_, state_init, T, sizes, dtype: Problem(
        recurrence=recurrence, aggregation=aggregation, pass_=pass_, state_init=state_init, dtype=dtype, T=T,
        B=sizes[0], H=sizes[1], Dk=sizes[2], Dv=sizes[3], segment_length=16,
    ),
    st.sampled_from([name for name, row in RECURRENCES.items() if not row.deep]), st.sampled_from(list(AGGREGATIONS)),
    st.sampled_from(PASSES), st.sampled_from(("independent", "checkpoint")), st.integers(1, 70),
    st.tuples(*[st.integers(1, 4)] * 4), st.sampled_from(("float32", "bfloat16", "float16")),
)  # fmt: skip
outcomes = st.one_of(
    st.builds(Timed, ms, ms, ms, st.integers(0, 99), ms, st.none() | ms, st.none() | ms, st.tuples(text), parts),
    st.builds(Predicted, ms, text, st.none() | ms, st.tuples(text), parts),
)
configs = st.dictionaries(text, st.one_of(st.integers(), st.booleans(), text), max_size=4)


def entry(problem: Problem, outcome: Timed | Predicted, **changes: Any) -> dict[str, Any]:
    kind = "timed" if isinstance(outcome, Timed) else "predicted"
    return {
        "problem": problem.to_dict(), "config": {"chunk": 8}, "kernel": "kernels/k.so", "source": "kernels/k.py",
        "parts": {}, "portable": None, "backend": "tvm", "outcome": {"kind": kind, **vars(outcome)}, **changes,
    }  # fmt: skip


def package(entries: Sequence[dict[str, Any]], title: str = "Test CPU", versions: Any = ()) -> Package:
    tuned = {
        "schema": 1, "target": {"name": "cpu", "title": title, "kind": "cpu"}, "entries": list(entries),
        "versions": dict(versions),
        "date": "2026-11-23",
    }  # fmt: skip
    environment = {"target": tuned["target"], "versions": tuned["versions"]}
    return Package(Document(rows_of_tuned(tuned), environment, tuned), FILES)


def timed(time: float = 2.0) -> Timed:
    return Timed(time, 1.9, 2.5, 7, 3e-7, parts=(("write", 0.5), ("a read", 1.0)))


def write(out: Path, entries: Sequence[dict[str, Any]], notes: list[str] | None = None) -> Path:
    found = [] if notes is None else notes
    (folder,) = write_flashinfer_trace([package(entries)], out, found.append)
    return folder


def every(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@given(st.lists(st.tuples(problems, outcomes, configs), min_size=1, max_size=4), text, st.dictionaries(names, text))
def test_rows_come_back_and_their_models_take_everything(
    tmp_path_factory: pytest.TempPathFactory, made: list[Any], title: str, versions: dict[str, str]
) -> None:
    entries = [entry(problem, outcome, config=config) for problem, outcome, config in made]
    forwards = {(problem.replace(pass_="forward"), "forward") for problem, *_ in made if problem.pass_ == "backward"}
    entries += [entry(problem, timed()) for problem, _ in forwards]
    one = package(entries, title, versions)
    out = tmp_path_factory.mktemp("out")
    notes: list[str] = []
    (folder,) = write_flashinfer_trace([one], out, notes.append)
    assert not notes and folder == out / "cpu" / FOLDER
    # The same row twice is one.
    rows = sorted(set(one.document.rows), key=lambda row: (sort_key(row), row.config.to_json()))
    back = sorted(from_flashinfer_trace(folder), key=lambda row: (sort_key(row), row.config.to_json()))
    latest = {(row.problem, row.config, row.how): row for row in one.document.rows}
    assert {(row.problem, row.config, row.how) for row in back} == set(latest)
    if len(latest) == len(rows):
        assert back == rows
    their = module("data").TraceSet.from_path(str(folder))
    assert {name for name in their.definitions} == {json.loads(data)["name"] for path, data in every(folder).items()
                                                     if path.startswith("definitions/")}  # fmt: skip
    for name, sets in their.workloads.items():
        for set_up in sets:
            shapes = their.definitions[name].get_input_shapes(set_up.workload.axes)
            assert their.definitions[name].get_axes_values(shapes) == set_up.workload.axes
    measured = [trace for traces in their.traces.values() for trace in traces]
    assert len(measured) == len({key for key in latest if key[2] == "measured"})
    assert all(trace.is_successful() and their.get_solution(trace.solution) for trace in measured)


def test_what_a_measured_row_becomes(tmp_path: Path) -> None:
    folder = write(tmp_path, [entry(GRM, timed(3.0)), entry(GRM, timed(2.0), config={"chunk": 4})])
    their = module("data").TraceSet.from_path(str(folder))
    (traces,) = their.traces.values()
    assert [trace.evaluation.performance.latency_ms for trace in traces] == [2.0, 3.0]
    evaluation = traces[0].evaluation
    assert evaluation.performance.reference_latency_ms == evaluation.performance.speedup_factor == 0.0
    assert evaluation.correctness.max_relative_error == 3e-7 and evaluation.environment.hardware == "Test CPU"
    assert "the reference was not timed" in evaluation.log
    solution = their.get_solution(traces[0].solution)
    sources = {source.path: source.content for source in solution.sources}
    assert sources["package/kernels/k.py"] == "source" and "binaries/k.so.b64" in sources
    assert set(json.loads(sources["package/manifest.json"])["files"]) == {*FILES, "tuned.json"}


def test_a_predicted_time_is_no_evaluation(tmp_path: Path) -> None:
    folder = write(tmp_path, [entry(GRM, Predicted(1.5, "roofline"))])
    their = module("data").TraceSet.from_path(str(folder))
    assert not their.traces and not (folder / "traces").exists()
    (solution,), (name,) = *their.solutions.values(), their.definitions
    assert "was not measured: a cost model predicts 1.5 ms" in solution.description
    assert their.workloads[name][0].is_workload_trace()
    (row,) = from_flashinfer_trace(folder)
    assert (row.how, row.ms) == ("predicted", 1.5)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    swla = next(name for name, row in RECURRENCES.items() if row.convolves)
    entries = [entry(GRM.replace(recurrence=swla), timed()), entry(GRM, timed(), config={"chunk": 4})]
    first = every(write(tmp_path, entries))
    assert first == every(write(tmp_path, entries[::-1])) == every(write(tmp_path / "x", entries))
    assert {path.name for path in (tmp_path / "cpu").iterdir()} == {FOLDER}
    # Gates are no normal numbers: they are in a file.
    (blob,) = [path for path in first if path.startswith("blob/")]
    safetensors = pytest.importorskip("safetensors.torch")
    gates = safetensors.load(first[blob])
    assert set(gates) == set(RECURRENCES[swla].gates)
    assert all(gate.shape == (1, 64, 2) and gate.dtype == torch.float32 for gate in gates.values())
    assert gates["g"].max() <= 0 and gates["g"].unique().numel() > 100
    # What is there no more is gone.
    assert not any(path.startswith("blob/") for path in every(write(tmp_path, entries[1:])))


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    deep = next(name for name, row in RECURRENCES.items() if row.deep)
    entries = [
        entry(GRM.replace(recurrence=deep), timed()), entry(GRM.replace(segmentation="packed"), timed()),
        entry(GRM.replace(pass_="backward", Dv=9), timed()), entry(GRM, timed(), kernel="kernels/gone.so"),
    ]  # fmt: skip
    notes: list[str] = []
    with pytest.raises(UsageError, match="nothing of cpu can be written as flashinfer-trace"):
        write(tmp_path, entries, notes)
    for message, note in zip(
        ("deep memories", "segmentation='packed'", "no forward kernel by tvm", "kernels/gone.so is not in the package"),
        notes, strict=True,
    ):  # fmt: skip
        assert message in note and "\n" not in note
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way(tmp_path: Path) -> None:
    folder = write(tmp_path, [entry(GRM, timed())])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt is in the way"):
        write(tmp_path, [entry(GRM, timed())])
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("definitions", lambda one: one.pop("tags")), ("definitions", lambda one: one["axes"].pop("H")),
        ("definitions", lambda one: one.pop("name")),
        ("solutions", lambda one: one.update(sources=[{"path": "mctune.json"}])),
        ("solutions", lambda one: one["sources"][1].update(content="{")), ("traces", lambda one: one.pop("evaluation")),
        ("solutions", lambda one: one.update(definition="another")),
        ("traces", lambda one: one["evaluation"].update(status="TIMEOUT")),
        ("traces", lambda one: one["workload"]["axes"].update(T="many")),
        ("traces", lambda one: one["evaluation"]["performance"].update(latency_ms=-1.0)),
    ],
)  # fmt: skip
def test_a_dataset_that_is_malformed_is_one_line(tmp_path: Path, part: str, change: Callable[[Any], Any]) -> None:
    folder = write(tmp_path, [entry(GRM, timed())])
    (path,) = (folder / part).rglob("*.json*")
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError) as raised:
        from_flashinfer_trace(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_solutions_of_others_have_no_row(tmp_path: Path) -> None:
    folder = write(tmp_path, [entry(GRM, timed())])
    (path,) = (folder / "solutions").rglob("*.json")
    values = json.loads(path.read_text())
    theirs = {**values, "name": "theirs", "sources": [{"path": "main.py", "content": "def run(): ..."}]}
    path.with_name("theirs.json").write_text(json.dumps(theirs))
    assert len(from_flashinfer_trace(folder)) == 1


@given(problems)
def test_a_problem_follows_from_its_definition_and_workload(problem: Problem) -> None:
    assert problem_of(definition(problem), workload(problem)) == problem


def test_solutions_run(
    run: Callable[..., Any], tmp_path: Path, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real package: its solutions, built by flashinfer-bench, compute what the references of their definitions do."""
    backend, (target, _) = TvmBackend(), resolve("cpu")
    winners = []
    for pass_ in PASSES:
        problem = GRM.replace(pass_=pass_)
        space = backend.space(problem)
        config = space.first_valid(lambda one, space=space, problem=problem: space.valid(one, problem, target))
        assert config is not None
        built = backend.build(problem, config, target, kernel_folder)
        winners.append(Winner(problem, config, timed(), "tvm", "cpu", built.library, built.source, None, (), True, {}))
    emit_package(tmp_path / "tuned_for_trace", target, winners)
    where = (str(tmp_path / "tuned_for_trace"), "--out", str(tmp_path / "out"))
    ran = run("report", "--format", "flashinfer-trace", *where, "--json")
    folder = tmp_path / "out" / "cpu" / FOLDER
    assert ran.code == 0 and json.loads(ran.out) == [{"folder": str(folder), "rows": 3}]
    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path / "cache"))
    their = module("data").TraceSet.from_path(str(folder))
    builder = module("compile.builders.python_builder").PythonBuilder()
    assert len(their.definitions) == 3
    for name, defined in their.definitions.items():
        set_up = their.workloads[name][0].workload
        shapes = defined.get_input_shapes(set_up.axes)
        inputs = [
            set_up.inputs[one].value if shape is None else torch.randn(shape)
            for one, shape in zip(defined.inputs, shapes, strict=True)
        ]
        runnable = builder.build(defined, their.solutions[name][0])
        with torch.no_grad():
            found = runnable(*inputs)
        there: dict[str, Any] = {}
        exec(defined.reference, there)
        wanted = there["run"](*inputs)
        pairs = list(zip(*(x if isinstance(x, tuple) else (x,) for x in (found, wanted)), strict=True))
        assert len(pairs) == len(defined.outputs)
        for one, other in pairs:
            torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()), rtol=0)
        runnable.cleanup()


@pytest.mark.parametrize("format_", ("flashinfer-trace", "fla"))
def test_what_is_no_input(run: Callable[..., Any], tmp_path: Path, format_: str) -> None:
    absent = run("report", "--format", format_, str(tmp_path / "absent"))
    assert absent.code == 2 and absent.err.count("\n") == 1
    mixed = run("report", "--format", format_, "--format", "t4", str(tmp_path))
    assert mixed.code == 2 and f"--format {format_} is made from packages" in mixed.err
    tuned = package([entry(GRM, timed())]).document.tuned
    (tmp_path / "tuned.json").write_text(json.dumps(tuned))
    bare = run("report", "--format", "flashinfer-trace", str(tmp_path))
    assert bare.code == 2 and "manifest.json is missing" in bare.err and bare.err.count("\n") == 1
