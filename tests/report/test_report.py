"""Rows keep what they say through JSON and CSV, and become a readable folder of results."""

from __future__ import annotations

import csv
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted, Timed
from mctune.core.problem import Problem
from mctune.core.work import work
from mctune.report.rows import COLUMNS, Row, read_csv, write_csv
from mctune.report.tables import markdown_table, results_readme
from mctune.report.write import Document, read_document, write_results

GRM = Problem(T=4096, H=4, Dk=64, Dv=64, segment_length=256)
SSC = GRM.replace(aggregation="ssc", top_k=4)
CONFIG = Config.of({"BT": 64, "formulation": "gated", "unroll": True})
ENVIRONMENT = {
    "target": {"name": "cpu", "title": "Test CPU", "cores": 2},
    "system": "Linux",
    "versions": {"torch": "2"},
}


def row(problem: Problem = GRM, **changes: Any) -> Row:
    made = Row.of(
        "cpu", problem, "tvm", CONFIG, Timed(ms=10.0, low=9.5, high=11.0, repeats=20, error=4.2e-7),
        baselines={"eager": 52.0, "torch.compile": 30.0}, fraction_of_bound=0.71, versions={"torch": "2.13.0"},
    )  # fmt: skip
    return replace(made, **changes)


def tuned(*entries: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "target": {"name": "cpu", "title": "Test CPU"},
        "versions": {"tvm": "0"},
        "entries": list(entries),
    }


def entry(problem: Problem, outcome: dict[str, Any]) -> dict[str, Any]:
    return {"problem": problem.to_dict(), "config": CONFIG.to_dict(), "backend": "tvm", "outcome": outcome}


TIMED = {"kind": "timed", "ms": 10.5, "low": 10.0, "high": 11.0, "repeats": 9, "error": 1e-7}


def test_speedup_is_against_the_fastest_baseline() -> None:
    assert row().best_baseline == ("torch.compile", 30.0)
    assert row().speedup == 3.0
    assert row(baselines=()).speedup is None and row(baselines=()).best_baseline is None


def test_a_prediction_has_no_spread() -> None:
    made = Row.of("h100-sxm", GRM, "triton", CONFIG, Predicted(ms=0.4, model="roofline"))
    assert (made.how, made.low, made.repeats, made.error) == ("predicted", None, None, None)


def test_what_is_no_row() -> None:
    for ms in (0.0, float("nan")):
        with pytest.raises(UsageError, match="positive time"):
            row(ms=ms)
    with pytest.raises(UsageError, match="how='guessed'"):
        row(how="guessed")


@pytest.mark.parametrize("problem", [GRM, SSC, Problem(T=37, H=1, Dk=4, Dv=8, segmentation="logarithmic")])
def test_round_trips(problem: Problem, tmp_path: Path) -> None:
    for made in (row(problem), Row.of("cpu", problem, "tvm", CONFIG, Predicted(1.5, "m"))):
        assert Row.from_dict(json.loads(json.dumps(made.to_dict()))) == made
        write_csv(tmp_path / "rows.csv", [made])
        assert read_csv(tmp_path / "rows.csv") == [made]


def test_csv_is_tidy(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", [row(SSC), row()])
    with (tmp_path / "rows.csv").open() as file:
        records = list(csv.DictReader(file))
    assert list(records[0]) == list(COLUMNS)
    assert [record["aggregation"] for record in records] == ["grm", "ssc"]
    assert records[0]["top_k"] == "" and records[1]["top_k"] == "4"
    assert (records[0]["best_baseline"], records[0]["best_baseline_ms"], records[0]["speedup"]) == (
        "torch.compile", "30", "3",
    )  # fmt: skip


def test_markdown_lines_up_and_escapes() -> None:
    text = markdown_table(("a", "bb"), [("1|2", "3")])
    assert text == "| a    | bb |\n| ---- | -- |\n| 1\\|2 | 3  |\n"


def test_readme_says_what_is_measured_and_what_is_not() -> None:
    predicted = Row.of("cpu", SSC, "tvm", CONFIG, Predicted(1.5, "m"))
    text = results_readme([predicted, row()], ENVIRONMENT)
    assert "# cpu: Test CPU" in text
    assert "**1 of 2 rows are predicted" in text
    assert text.index("## forward, linear, grm") < text.index("## forward, linear, ssc (top 4)")
    line = next(line for line in text.splitlines() if "B1 T4096 H4 D64 float32" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "B1 T4096 H4 D64 float32", "256", "10 (9.5 to 11)", "torch.compile 30", "3.00x", "71%", "4.2e-07",
        "measured, tvm",
    ]  # fmt: skip
    assert "| versions torch" in text
    assert "predicted" not in results_readme([row()], ENVIRONMENT)


def test_a_deep_memory_is_told_from_another_of_other_width_or_inner_chunk() -> None:
    deep = GRM.replace(recurrence="dla")
    text = results_readme([row(deep), row(deep.replace(inner_chunk=64)), row(deep.replace(expansion=2))], ENVIRONMENT)
    for shape in ("E256 b16", "E256 b64", "E128 b16"):
        assert f"| B1 T4096 H4 D64 {shape} float32 | 256 " in text


def test_results_from_a_package_and_a_benchmark(tmp_path: Path) -> None:
    package, bench = tmp_path / "package", tmp_path / "bench.json"
    package.mkdir()
    wrong = {"kind": "wrong", "error": 1.0, "tolerance": 1e-5, "case": "x"}
    table = tuned(entry(GRM, TIMED), entry(SSC, TIMED), entry(GRM.replace(T=8), wrong))
    (package / "tuned.json").write_text(json.dumps(table))
    bench.write_text(json.dumps({"rows": [row().to_dict()], "environment": ENVIRONMENT}))
    for order in ([package, bench], [bench, package / "tuned.json"]):
        (folder,) = write_results([read_document(path) for path in order], tmp_path / "results")
        assert folder == tmp_path / "results" / "cpu"
        rows = {r.problem: r for r in read_csv(folder / "rows.csv")}
        assert set(rows) == {GRM, SSC}
        assert rows[GRM].baselines and rows[GRM].ms == 10.0
        assert not rows[SSC].baselines and rows[SSC].ms == 10.5
        assert json.loads((folder / "environment.json").read_text()) == ENVIRONMENT
        assert json.loads((folder / "tuned.json").read_text()) == table
        assert "## forward, linear, ssc" in (folder / "README.md").read_text()


def test_one_folder_a_target(tmp_path: Path) -> None:
    documents = []
    for name in ("cpu", "h200"):
        path = tmp_path / f"{name}.json"
        environment = {**ENVIRONMENT, "target": {"name": name}}
        path.write_text(json.dumps({"rows": [row(target=name).to_dict()], "environment": environment}))
        documents.append(read_document(path))
    assert [folder.name for folder in write_results(documents, tmp_path)] == ["cpu", "h200"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "neither a tuned table"),
        ('{"x": 1}', "neither a tuned table"),
        (json.dumps({**tuned(), "schema": 9}), "has schema 9; this mctune reads 1"),
    ],
)
def test_inputs_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_document(tmp_path / "in.json")


def test_an_absent_input_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_document(tmp_path / "none.json")
    (tmp_path / "tuned.json").write_text(json.dumps(tuned()))
    with pytest.raises(UsageError, match="nothing to report for cpu"):
        write_results([read_document(tmp_path)], tmp_path)


def test_two_machines_of_one_name_do_not_share_an_environment(tmp_path: Path) -> None:
    def of(**machine: str) -> Document:
        return Document((row(),), {**ENVIRONMENT, "target": {"name": "cpu", **machine}}, None)

    with pytest.raises(UsageError, match="cpu is of x86-64-v3 and of x86-64-v4; report each on its own"):
        write_results([of(title="A", arch="x86-64-v3"), of(title="A", arch="x86-64-v4")], tmp_path)
    assert not list(tmp_path.iterdir())
    assert write_results([of(title="A"), of(arch="x86-64-v3"), of(title="A")], tmp_path) == [tmp_path / "cpu"]


def test_a_tuned_row_gets_its_fraction_of_the_bound_from_a_benchmark_beside_it(tmp_path: Path) -> None:
    problem = Problem(T=512, H=1, Dk=16, Dv=16, segment_length=64)
    timed = Timed(ms=2.0, low=1.9, high=2.1, repeats=7, error=1e-7)
    row = Row.of("cpu", problem, "tvm", Config.of({"chunk": 16}), timed)
    environment = {"target": {"name": "cpu"}}
    rates = (1e9, 1e12)
    write_results([Document((row,), environment, None), Document((), environment, None, rates)], tmp_path)
    (written,) = read_csv(tmp_path / "cpu" / "rows.csv")
    assert written.fraction_of_bound == pytest.approx(work(problem).operations / 1e9 / 2e-3, rel=1e-5)


# --- what others have written


HOSTILE = (
    "[x](javascript:alert(1))", "<script>alert(1)</script>", "a|b", "`x`", "![x](http://y)", "a\\|b", "\x1b[31m",
    "a\nb", "\u202ex", "<http://x>", "&lt;b&gt;", "# x", "~~x~~",
)  # fmt: skip
PATHS = ("../../../x", "/etc", "..", ".", "", "a/b", "a\\b", "a\0b", "-x", "=x", "x" * 65, "ü", "a\n")
WRONG: tuple[Any, ...] = (
    "\ud800", "x" * 5000,
    None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**400, "", "x", [], [1], {}, {"a": {}}, [[]],
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_as_it_is(text: str) -> None:
    readme = results_readme([row()], {**ENVIRONMENT, "target": {"name": "cpu", "title": text}, text: text})
    assert "<" not in readme and "\x1b" not in readme and "\u202e" not in readme
    assert not re.search(r"(?<!\\)[\[\]`~!]", readme.replace("`rows.csv`", "").replace("`mctune report`", "")
                         .replace("`environment.json`", ""))  # fmt: skip
    lines = [line for line in readme.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {3, 9}


@pytest.mark.parametrize("name", PATHS)
def test_a_name_is_no_path(name: str, tmp_path: Path) -> None:
    for values in (
        {"rows": [row().to_dict()], "environment": {**ENVIRONMENT, "target": {"name": name}}},
        {"rows": [{**row().to_dict(), "target": name}], "environment": ENVIRONMENT},
        {**tuned(entry(GRM, TIMED)), "target": {"name": name}},
    ):
        (tmp_path / "in.json").write_text(json.dumps(values))
        with pytest.raises(UsageError, match="is not a name"):
            read_document(tmp_path / "in.json")


def test_malformed_documents_are_usage_errors(tmp_path: Path) -> None:
    """A value of a random place is replaced by another, or taken away: a report comes of it, or one line."""
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    bench = {
        "rows": [row(SSC).to_dict(), row().to_dict()], "environment": ENVIRONMENT,
        "rates": [{"matrix_gflops": 100.0, "copy_gbs": 20.0}],
    }  # fmt: skip
    for number in range(1500):
        values = json.loads(json.dumps(draw.choice((bench, tuned(entry(GRM, TIMED), entry(SSC, TIMED))))))
        place: Any = values
        while True:
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.2:
                break
            place = place[key]
        if (chance := draw.random()) < 0.2:
            del place[key]
        elif chance < 0.3 and isinstance(place, dict):
            place[f"{key}\n<b>\ud800"] = place.pop(key)
        else:
            place[key] = draw.choice(WRONG)
        (tmp_path / "in.json").write_text(json.dumps(values))
        out = tmp_path / f"out{number % 2}"
        try:
            write_results([read_document(tmp_path / "in.json")], out)
        except UsageError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, error
    assert {path.name for path in tmp_path.iterdir()} <= {"in.json", "out0", "out1"}


@pytest.mark.parametrize("data", (b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b"\0", b'{"rows": NaN}', b""))
def test_what_is_not_json_is_a_usage_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_bytes(data)
    with pytest.raises(UsageError):
        read_document(tmp_path / "in.json")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_results([Document((row(),), ENVIRONMENT, None)], tmp_path / "file")
    with pytest.raises(UsageError, match="cannot be read"):
        (tmp_path / "tuned.json").mkdir()
        read_document(tmp_path)
