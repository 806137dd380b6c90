"""T1, T4 and cache files: they meet the published schemas, and what was written reads back."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.known import Machine
from mctune.core.outcome import Crashed, FailedBuild, Outcome, Predicted, Timed, TimedOut, TooLarge, Wrong, cost
from mctune.core.problem import Problem
from mctune.core.space import Choice, Int, Param, Pow2, SearchSpace
from mctune.core.target import resolve
from mctune.report.known import read_known
from mctune.report.t1 import Condition, Described, from_t1, to_t1
from mctune.report.t4 import Results, Tried, from_t4, invalidity, known_of_t4, to_t4
from tests.report.schemas import T1, T1_WITH_IDS, T4

CPU = resolve("cpu")[0]
PROBLEM = Problem(T=512, H=1, Dk=16, Dv=16, segment_length=32)
FIELDS = {name: value for name, value in PROBLEM.to_dict().items() if name != "segment_length"}
ABOUT = {
    "problem": FIELDS,
    "segment_lengths": [32, 64],
    "target": [CPU.name, CPU.title, CPU.arch, CPU.cores],
    "backend": {"name": "tvm", "tvm": "0"},
    "how": "measured",
}

text = st.text(max_size=20)
ms = st.floats(1e-6, 1e6)
error = st.floats()
outcomes: st.SearchStrategy[Outcome] = st.one_of(
    st.builds(FailedBuild, text),
    st.builds(TooLarge, text, st.integers(), st.integers(), text),
    st.builds(Crashed, text),
    st.builds(TimedOut, ms, text),
    st.builds(Wrong, error, ms, text),
    st.builds(Timed, ms, ms, ms, st.integers(0, 99), ms, st.none() | ms, st.none() | ms, st.tuples(text)),
    st.builds(Predicted, ms, text, st.none() | ms, st.tuples(text, text)),
)
configs = st.dictionaries(st.sampled_from("abcdef"), st.one_of(st.integers(), st.booleans(), text)).map(Config.of)
moments = st.none() | st.datetimes(timezones=st.just(timezone.utc)).map(lambda at: at.replace(fold=0))
trials = st.lists(st.builds(Tried, configs, outcomes, ms, moments), max_size=8).map(tuple)


def same(one: Any, other: Any) -> bool:
    """Equal, where NaN is itself."""
    return repr(one) == repr(other)


@given(trials)
@settings(max_examples=200, deadline=None)
def test_what_is_written_as_t4_meets_the_schema_and_reads_back(made: tuple[Tried, ...]) -> None:
    results = Results(ABOUT, made, "0.1.0")
    plain = json.loads(json.dumps(to_t4(results), allow_nan=False))
    jsonschema.Draft202012Validator(T4).validate(plain)
    back = from_t4(plain)
    assert same(back, results)
    # What others read of it: only what has a time is correct, and no predicted time is called a measured one.
    for trial, told in zip(made, plain["results"], strict=True):
        assert (told["invalidity"] == "correct") == (told["correctness"] == 1) == (cost(trial.outcome) is not None)
        assert told["configuration"] == trial.config.to_dict()
        predicted = isinstance(trial.outcome, Predicted)
        assert not (predicted and told["times"]["runtimes"]) and (told["objectives"] == ["predicted_time"]) == predicted
        stated = {one["name"]: one["value"] for one in told["measurements"]}
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in stated.values())
        if isinstance(trial.outcome, Timed | Wrong) and math.isfinite(trial.outcome.error):
            assert stated["error"] == trial.outcome.error


def test_every_kind_has_its_word() -> None:
    kinds = {
        "compile": FailedBuild("x"), "constraints": TooLarge("x", 2, 1, "B"), "runtime": Crashed("x"),
        "timeout": TimedOut(1.0, "build"), "correctness": Wrong(1.0, 0.1, "x"), "correct": Predicted(1.0, "m"),
    }  # fmt: skip
    assert {invalidity(outcome): outcome for outcome in kinds.values()} == kinds


def foreign(*results: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    return {"schema_version": "1.0.0", "metadata": metadata, "results": list(results)}


def one(value: Any, validity: str = "correct", **more: Any) -> dict[str, Any]:
    """A result as kernel_tuner writes it."""
    return {
        "configuration": {"rows": 8, "form": "gemm", "alpha": 0.5},
        "times": {"compilation": 1.0, "benchmark": 2.0, "runtimes": [3.0, 1.0, 2.0]},
        "invalidity": validity, "correctness": 1, "objectives": ["time"],
        "measurements": [{"name": "time", "value": value, "unit": "ms"}], **more,
    }  # fmt: skip


def test_another_tuners_results_are_read() -> None:
    made = foreign(one(1.5), one("", "compile"), one("", "constraints"), one("", measurements=[]))
    jsonschema.Draft202012Validator(T4).validate(made)
    back = from_t4(made)
    assert [type(trial.outcome) for trial in back.trials] == [Timed, FailedBuild, TooLarge, Timed]
    first, *_, last = known_of_t4("file", back)
    assert (first.config.to_dict(), first.ms, first.measured) == ({"rows": 8, "form": "gemm"}, 1.5, True)
    assert (first.problem, first.machine, first.backend, last.ms) == (None, None, "", 2.0)
    slow = known_of_t4("file", from_t4(foreign(one("", measurements=[]), timeunit="microseconds")))
    assert slow[0].ms == 2e-3


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"results": {}}, "no list of results"),
        (foreign({}), "result 0 is not T4"),
        (foreign(one(1.0), one(1.0, "lost")), "result 1 is not T4: ValueError invalidity 'lost'"),
        (foreign(one(1.0, objectives=["GFLOP/s"])), "its objective is 'GFLOP/s', not time"),
        (foreign(timeunit="days"), "timeunit 'days' is not one of"),
    ],
)
def test_what_is_not_t4(document: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        from_t4(document)
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=rf"r\.json .*{message}"):
        read_known(tmp_path / "r.json")


@given(trials)
@settings(max_examples=50, deadline=None)
def test_a_file_of_ours_says_what_problem_and_machine_it_is_of(made: tuple[Tried, ...]) -> None:
    lengths = [Tried(trial.config.replace(segment_length=64), trial.outcome, trial.seconds) for trial in made]
    known = known_of_t4("file", from_t4(to_t4(Results(ABOUT, tuple(lengths)))))
    assert [(k.config, k.ms, k.measured) for k in known] == [
        (t.config, t.outcome.ms, isinstance(t.outcome, Timed))
        for t in lengths
        if isinstance(t.outcome, Timed | Predicted)
    ]
    for found in known:
        assert found.problem == PROBLEM.replace(segment_length=64)
        assert found.machine == Machine.of(CPU) and found.backend == "tvm"


def test_a_cache_file_is_read(tmp_path: Path) -> None:
    record = {"time": 1.5, "times": [1.5], "compile_time": 1.0, "timestamp": "2024-01-01"}
    cache = {
        "tune_params_keys": ["rows", "form", "alpha"], "objective": "time",
        "tune_params": {"rows": [8, 16], "form": ["gemm", "loop"], "alpha": [0.5]},
        "cache": {"8,gemm,0.5": record, "16,loop,0.5": {**record, "time": "CompilationFailedConfig"}},
    }  # fmt: skip
    path = tmp_path / "cache.json.gz"
    path.write_bytes(gzip.compress(json.dumps(cache).encode()))
    (known,) = read_known(path)
    assert (known.config.to_dict(), known.ms, known.problem) == ({"rows": 8, "form": "gemm"}, 1.5, None)
    for broken in ({"objective": "GFLOP/s"}, {"cache": {"9,gemm,0.5": record}}, {"cache": []}):
        path.write_bytes(gzip.compress(json.dumps({**cache, **broken}).encode()))
        with pytest.raises(UsageError, match=r"cache\.json\.gz (was tuned for|is no cache file)"):
            read_known(path)


SPACE = SearchSpace((Pow2("rows", 1, 8, "of a tile"), Choice("form", ("gemm", "loop")), Choice("sure", (False, True))))


@pytest.mark.parametrize("kind", ("cpu", "cuda", "hip"))
def test_a_space_as_t1_meets_the_schema_and_reads_back(kind: str) -> None:
    conditions = (Condition(("rows", "form"), "form == 'gemm' or rows in (1, 2)"),)
    made = Described("forward", kind, "Some device", "tvm", SPACE, conditions, "forward.t4.json")
    plain = json.loads(json.dumps(to_t1(made)))
    jsonschema.Draft202012Validator(T1).validate(plain)
    back = from_t1(plain)
    assert (back.space, back.conditions, back.kernel, back.device) == (SPACE, conditions, "forward", "Some device")
    assert (back.compiler, back.results) == ("tvm", "forward.t4.json")
    types = [one["Type"] for one in plain["ConfigurationSpace"]["TuningParameters"]]
    assert (
        types == ["int", "string", "bool"]
        and plain["ConfigurationSpace"]["TuningParameters"][0]["Values"] == "[1, 2, 4, 8]"
    )


values = st.lists(st.integers() | st.booleans() | text, min_size=1, max_size=5, unique=True).map(tuple)
params = st.lists(st.builds(Param, text, values, st.booleans(), text), max_size=4, unique_by=lambda one: one.name)
described = st.builds(
    Described, text, st.just("cuda"), text, text, params.map(tuple).map(SearchSpace),
    st.lists(st.builds(Condition, st.lists(text, max_size=3).map(tuple), text), max_size=3).map(tuple), text,
)  # fmt: skip


@given(described)
@settings(max_examples=200)
def test_any_space_reads_back_from_t1(made: Described) -> None:
    plain = json.loads(json.dumps(to_t1(made)))
    for schema in (T1, T1_WITH_IDS):
        jsonschema.Draft202012Validator(schema).validate(plain)
    back = from_t1(plain)
    assert same(back, made)


def test_the_schemas_refuse() -> None:
    t1 = to_t1(Described("f", "cuda", "d", "tvm", SPACE, ()))
    t4 = to_t4(Results({}, (Tried(Config.of({"a": 1}), Crashed("x"), 1.0),)))
    for schema, document, place in (
        (T1, t1, ("KernelSpecification", "KernelName")), (T1_WITH_IDS, t1, ("KernelSpecification", "Device", "Id")),
        (T1, t1, ("ConfigurationSpace", "TuningParameters", 0, "Values")), (T4, t4, ("results", 0, "invalidity")),
    ):  # fmt: skip
        without: Any = json.loads(json.dumps(document))
        jsonschema.Draft202012Validator(schema).validate(without)
        inner = without
        for key in place[:-1]:
            inner = inner[key]
        del inner[place[-1]]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema).validate(without)


@pytest.mark.parametrize("broken", [{"Values": "[1, 2.5]"}, {"Values": "list("}, {"Values": "__import__('os')"}])
def test_what_is_not_t1(broken: dict[str, Any]) -> None:
    plain = to_t1(Described("f", "cuda", "d", "tvm", SearchSpace((Int("x", (1, 2)),)), ()))
    plain["ConfigurationSpace"]["TuningParameters"][0].update(broken)
    with pytest.raises(UsageError, match="is not T1"):
        from_t1(plain)


def test_studies_are_reported_as_both(run: Callable[..., Any], tmp_path: Path) -> None:
    from mctune.backends import get_backend
    from mctune.core.workload import Case
    from mctune.study.events import SearchRequest
    from mctune.study.one import OneStudy
    from mctune.study.storage import sqlite_url
    from mctune.study.study import run_study

    case, out = Case(PROBLEM, (32, 64)), tmp_path / "searched"
    (out / "search").mkdir(parents=True)
    request = SearchRequest(target=CPU, cases=(case,), out=out, trials=12)
    study = OneStudy(request, get_backend("tvm"), case, sqlite_url(out / "search" / "study.db"))
    space, rules = study.space(), study.rules()
    found: list[Outcome] = [Timed(2.0, 1.9, 2.1, 7, 1e-7), Wrong(math.inf, 2e-5, "T=1"), Crashed("signal 11")]
    done = run_study(
        space, rules, lambda config: found[config.integer("chunk") % 3], trials=12, storage=study.storage,
        study_name=study.name, attrs=study._about(), balance="segment_length",
    )  # fmt: skip
    ran = run("report", "--format", "T4", "--format", "t1", str(out), "--out", str(tmp_path / "given"), "--json")
    assert ran.code == 0 and [entry["rows"] for entry in json.loads(ran.out)] == [12, len(space.params)]
    folder = tmp_path / "given" / "cpu"
    t4, t1 = (json.loads((folder / f"{study.name}.{form}.json").read_text()) for form in ("t4", "t1"))
    jsonschema.Draft202012Validator(T4).validate(t4)
    jsonschema.Draft202012Validator(T1).validate(t1)
    back = from_t4(t4)
    assert [(trial.config, trial.outcome) for trial in back.trials] == [(t.config, t.outcome) for t in done.trials]
    assert all(trial.at is not None and trial.at.tzinfo is not None for trial in back.trials)
    assert datetime.fromisoformat(t4["metadata"]["timestamp"]).tzinfo is not None
    # The conditions are the constraints: in every corner of the space, whatever is valid and what is not.
    described = from_t1(t1)
    assert {param.name: param.values for param in described.space.params} == {p.name: p.values for p in space.params}
    assert described.conditions and described.results == f"{study.name}.t4.json"
    drawn = [
        space.at([(n * (p + 3) + p) % len(param.values) for p, param in enumerate(space.params)]) for n in range(400)
    ]
    answers = set()
    for config in (*drawn, *(trial.config for trial in done.trials)):
        said = all(eval(one.expression, {}, config.to_dict()) for one in described.conditions)
        assert said == all(rule(config) for rule in rules)
        answers.add(said)
        for condition in described.conditions:
            assert all(name in condition.parameters for name in config if name in condition.expression.split())
    assert answers == {True, False}
    # And what was written seeds a search.
    known = read_known(folder / f"{study.name}.t4.json")
    assert {one.config for one in known} == {trial.config for trial in done.trials if trial.ms is not None}
    assert all(one.problem is not None and one.problem.T == PROBLEM.T for one in known)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent",), "absent does not exist"),
        ((".",), "search/study.db does not exist"),
        (("empty.db",), "holds no study"),
        (("broken.db",), "cannot open the storage"),
        (("--format", "tables", "absent"), "in two commands"),
    ],
)
def test_what_has_no_studies(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.db").touch()
    Path("broken.db").write_text("no database at all, but long enough to be looked at" * 40)
    ran = run("report", "--format", "t4", *arguments)
    assert ran.code == 2 and message in ran.err and ran.err.count("\n") == 1
