"""Rows keep what they say through JSON and CSV, and become a readable folder of results."""

from __future__ import annotations

import csv
import json
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


def test_a_tuned_row_gets_its_fraction_of_the_bound_from_a_benchmark_beside_it(tmp_path: Path) -> None:
    problem = Problem(T=512, H=1, Dk=16, Dv=16, segment_length=64)
    timed = Timed(ms=2.0, low=1.9, high=2.1, repeats=7, error=1e-7)
    row = Row.of("cpu", problem, "tvm", Config.of({"chunk": 16}), timed)
    environment = {"target": {"name": "cpu"}}
    rates = (1e9, 1e12)
    write_results([Document((row,), environment, None), Document((), environment, None, rates)], tmp_path)
    (written,) = read_csv(tmp_path / "cpu" / "rows.csv")
    assert written.fraction_of_bound == pytest.approx(work(problem).operations / 1e9 / 2e-3, rel=1e-5)
