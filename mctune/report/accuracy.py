"""What the cost model said of candidates that were measured: the accuracy of its predictions, by problem."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mctune.core.accuracy import LEAST, TOP, Accuracy, accuracy
from mctune.core.problem import Problem
from mctune.report.markdown import markdown_table
from mctune.report.rows import Row, sort_key

_HEADER = ("problem", "candidates", "rank correlation", f"regret of the top {TOP}", "wrong by a factor of")


def accuracies(rows: Iterable[Row]) -> list[tuple[Problem, Accuracy]]:
    """By problem, where at least ``LEAST`` candidates have a measured and a predicted row."""
    found: list[tuple[Problem, Accuracy]] = []
    rows = list(rows)
    if not _both_kinds(rows):
        return found
    pairs: dict[tuple[str, str], list[tuple[Row, float]]] = {}
    ordered = sorted(rows, key=sort_key)
    predicted = {candidate(row): row.ms for row in ordered if row.how == "predicted"}
    for row in ordered:
        if row.how == "measured" and candidate(row) in predicted:
            pairs.setdefault((row.target, row.problem.key), []).append((row, predicted[candidate(row)]))
    for group in pairs.values():
        judged = accuracy((row.ms, ms) for row, ms in group)
        if judged is not None:
            found.append((group[0][0].problem, judged))
    return found


def shown(rows: Iterable[Row]) -> list[Row]:
    """What a reader wants of ``rows``: of the candidates that were measured and predicted only the fastest measured."""
    known = sorted(rows, key=sort_key)
    if not _both_kinds(known):
        return known
    both = {candidate(row) for row in known if row.how == "measured"}
    both &= {candidate(row) for row in known if row.how == "predicted"}
    seen: set[tuple[str, str, str]] = set()
    kept = []
    for row in known:  # the fastest of a problem first
        if candidate(row) in both:
            place = candidate(row)[:3]
            if row.how == "predicted" or place in seen:
                continue
            seen.add(place)
        kept.append(row)
    return kept


def accuracy_section(rows: Sequence[Row]) -> list[str]:
    """Markdown: a heading, what the figures are, a table; empty where nothing was both measured and predicted."""
    found = accuracies(rows)
    if not found:
        return []
    return [
        "## Accuracy of the cost model\n",
        f"Of candidates that were measured and predicted, at least {LEAST} a problem. *Rank correlation* is "
        f"Spearman's. *Regret* is the best measured time among the {TOP} best predicted, over the best measured time. "
        "*Wrong by* is the median factor between the two times.\n",
        markdown_table(_HEADER, [_line(problem, judged) for problem, judged in found]),
    ]


def _both_kinds(rows: Iterable[Row]) -> bool:
    return len({row.how for row in rows}) > 1


def candidate(row: Row) -> tuple[str, str, str, str]:
    """What a measured and a predicted row of one kernel have in common."""
    return row.target, row.problem.key, row.backend, row.config.key


def _line(problem: Problem, judged: Accuracy) -> tuple[str, ...]:
    spearman = "none: all alike" if judged.spearman is None else f"{judged.spearman:.2f}"
    return str(problem), str(judged.count), spearman, f"{judged.regret:.3f}", f"{judged.factor:.2f}"
