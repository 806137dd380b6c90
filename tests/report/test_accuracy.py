"""Ranks, regret, and the section of a report that shows them."""

from __future__ import annotations

import pytest

from mctune.core.accuracy import accuracy, ranks, regret, spearman
from mctune.core.config import Config
from mctune.core.outcome import Predicted, Timed
from mctune.core.problem import Problem
from mctune.report.accuracy import accuracies, accuracy_section, shown
from mctune.report.rows import Row, read_csv
from mctune.report.tables import results_readme
from mctune.report.write import Document, write_results

GRM = Problem(T=4096, H=4, Dk=64, Dv=64, segment_length=256)
ENVIRONMENT = {"target": {"name": "h100-sxm", "title": "H100"}}


def measured(BT: int, ms: float, problem: Problem = GRM) -> Row:
    return Row.of("h100-sxm", problem, "triton", Config.of({"BT": BT}), Timed(ms, ms, ms, 9, 1e-7))


def predicted(BT: int, ms: float, problem: Problem = GRM) -> Row:
    return Row.of("h100-sxm", problem, "triton", Config.of({"BT": BT}), Predicted(ms, "cost model"))


def test_ranks_share_what_is_equal() -> None:
    assert ranks([10.0, 30.0, 20.0]) == [1, 3, 2]
    assert ranks([5.0, 1.0, 5.0, 5.0]) == [3, 1, 3, 3]
    assert ranks([]) == []


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [1, 100, 101, 1e9], 1.0),  # only ranks matter
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        # 1 - 6 (0 + 1 + 1 + 0) / (4 * 15)
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        # Ties: ranks 1.5 1.5 3 4 against 1 2 3 4: 4.5 / sqrt(4.5 * 5).
        ([7, 7, 8, 9], [1, 2, 3, 4], 4.5 / (4.5 * 5) ** 0.5),
        ([1, 2, 3], [5, 5, 5], None),
    ],
)
def test_spearman(first: list[float], second: list[float], expected: float | None) -> None:
    found = spearman(first, second)
    assert found is None if expected is None else found == pytest.approx(expected)


def test_spearman_agrees_with_the_formula_without_ties() -> None:
    first, second = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0], [2.0, 7.0, 1.0, 8.0, 2.8, 1.8, 2.9]
    d2 = sum((a - b) ** 2 for a, b in zip(ranks(first), ranks(second), strict=True))
    assert spearman(first, second) == pytest.approx(1 - 6 * d2 / (7 * 48))


def test_what_has_no_ranking() -> None:
    with pytest.raises(ValueError, match="2 values against 1"):
        spearman([1, 2], [1])
    with pytest.raises(ValueError, match="0 measured"):
        regret([], [])
    assert accuracy([(1.0, 1.0), (2.0, 2.0)]) is None


def test_regret() -> None:
    times = [float(i) for i in range(1, 21)]
    assert regret(times, times) == 1.0
    assert regret(times, times[::-1]) == 11.0  # the ten that look best are the slowest ten
    assert regret(times, times[::-1], top=20) == 1.0
    assert regret([2.0, 1.0, 4.0], [1.0, 2.0, 3.0], top=1) == 2.0


def test_regret_of_equal_predictions_is_the_worst() -> None:
    assert regret([1.0, 2.0, 3.0], [7.0, 7.0, 7.0], top=1) == 3.0
    assert regret([1.0, 2.0, 3.0], [7.0, 7.0, 7.0], top=2) == 2.0


def test_factor_is_a_median_both_ways() -> None:
    judged = accuracy([(1.0, 2.0), (3.0, 1.0), (4.0, 4.0)])
    assert judged is not None and judged.factor == 2.0
    judged = accuracy([(1.0, 2.0), (3.0, 1.0), (4.0, 4.0), (4.0, 1.0)])
    assert judged is not None and judged.factor == 2.5


def test_only_twins_are_judged() -> None:
    rows = [measured(16, 3.0), measured(32, 2.0), measured(64, 1.0), measured(128, 0.5)]
    rows += [predicted(16, 9.0), predicted(32, 8.0), predicted(64, 7.0), predicted(256, 0.1)]
    ((problem, judged),) = accuracies(rows)
    assert (problem, judged.count, judged.spearman, judged.regret) == (GRM, 3, pytest.approx(1.0), 1.0)
    assert accuracies(rows[:4]) == accuracies(rows[4:]) == [] and accuracy_section(rows[:6]) == []


def test_a_report_of_measured_rows_has_no_section() -> None:
    text = results_readme([measured(BT, 1.0 + BT) for BT in (16, 32, 64)], ENVIRONMENT)
    assert "Accuracy" not in text and "predicted" not in text


def test_a_report_of_both(tmp_path) -> None:
    rows = [measured(16, 3.0), measured(32, 2.0), measured(64, 1.0)]
    rows += [predicted(16, 9.0), predicted(32, 7.0), predicted(64, 8.0)]
    other = predicted(16, 5.0, GRM.replace(T=128))
    assert shown([*rows, other]) == [other, rows[2]]
    (folder,) = write_results([Document((*rows, other), ENVIRONMENT, None)], tmp_path)
    text = (folder / "README.md").read_text()
    assert "**1 of 2 rows are predicted by a cost model, not measured.**" in text
    (line,) = (line for line in text.split("## Accuracy of the cost model")[1].splitlines() if "T4096" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [str(GRM), "3", "0.50", "1.000", "3.50"]
    # The table of times still has the measured time.
    assert "| 1 (1 to 1) " in text and text.count("predicted, triton") == 1
    assert len(read_csv(folder / "rows.csv")) == 7
