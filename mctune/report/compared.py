"""A comparison as a table for a terminal, and as Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from mctune.report.compare import FASTER, NOISE, ONLY_NEW, ONLY_OLD, SLOWER, Comparison, Overall, Pair
from mctune.report.markdown import markdown_table, plain, text_table
from mctune.report.rows import Row

_HEADER = ("problem", "backend", "how", "OLD ms (20% to 80%)", "NEW ms (20% to 80%)", "NEW / OLD", "verdict")


def as_text(comparison: Comparison) -> str:
    """The table, and below it one line for all rows together."""
    header, lines = _table(comparison.pairs)
    return "\n".join((text_table(header, lines), *summary(comparison)))


def as_markdown(comparison: Comparison) -> str:
    """A comment: the summary, what changed, and, folded, what did not. It names both sides and how they differ."""
    changed = [pair for pair in comparison.pairs if pair.verdict != NOISE]
    same = [pair for pair in comparison.pairs if pair.verdict == NOISE]
    parts = [f"### {plain(comparison.new)} (NEW) beside {plain(comparison.old)} (OLD)\n"]
    parts.append("".join(f"- {plain(line)}\n" for line in (*summary(comparison), *comparison.remarks)))
    if changed:
        parts.append(markdown_table(*_table(changed)))
    if same:
        title = f"{len(same)} within noise"
        parts.append(f"<details><summary>{title}</summary>\n\n{markdown_table(*_table(same))}\n</details>\n")
    return "\n".join(parts)


def summary(comparison: Comparison) -> list[str]:
    """What there is of each verdict, and all rows together."""
    counts = ", ".join(
        f"{count} {verdict}"
        for verdict in (SLOWER, FASTER, NOISE, ONLY_OLD, ONLY_NEW)
        if (count := comparison.count(verdict)) or verdict in (SLOWER, FASTER)
    )
    percent = f"{100 * comparison.threshold:.3g} %"
    return [f"{counts} (slower and faster: by more than {percent} and beyond noise)", *map(_all, comparison.overall)]


def _all(one: Overall) -> str:
    return (
        f"all {one.count} {one.how} rows together: {one.ratio:.3f} times as long as before (geometric mean), "
        f"{one.slower} slower and {one.faster} faster, by chance at {one.chance:.2g}: {one.verdict}"
    )


def _table(pairs: Sequence[Pair]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and lines; the targets too, where there are several."""
    targets = len({pair.row.target for pair in pairs}) > 1
    lines = [(*((pair.row.target,) if targets else ()), *_cells(pair)) for pair in pairs]
    return (*(("target",) if targets else ()), *_HEADER), lines


def _cells(pair: Pair) -> tuple[str, ...]:
    ratio = "-" if pair.ratio is None else f"{pair.ratio:.3f}"
    return (str(pair.problem), pair.row.backend, pair.how, _ms(pair.old), _ms(pair.new), ratio, pair.verdict)


def _ms(row: Row | None) -> str:
    if row is None:
        return "-"
    spread = "" if row.low is None or row.high is None else f" ({row.low:.4g} to {row.high:.4g})"
    return f"{row.ms:.4g}{spread}"
