"""``mctune compare``: two results beside each other, and an exit code for what became slower."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mctune.cli._output import json_option, print_json, say
from mctune.cli._revision import Found, found
from mctune.core.errors import MctuneError, RegressionError, UsageError

if TYPE_CHECKING:
    from mctune.report.compare import Comparison

_ROUNDS = 21


@click.command()
@click.argument("old")
@click.argument("new")
@click.option("--threshold", type=float, default=5.0, show_default=True, metavar="PERCENT",
              help="Differences up to this count as none.")  # fmt: skip
@click.option("--across", is_flag=True, help="Compare results of different machines all the same.")
@click.option("--measure", is_flag=True, help="OLD and NEW are packages: time their kernels by turns, here and now.")
@click.option("--rounds", type=click.IntRange(min=5), default=_ROUNDS, show_default=True,
              help="With --measure: repeats of each kernel.")  # fmt: skip
@click.option("--history", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Append the times of NEW here, a line of JSON each, but for those that are there.")  # fmt: skip
@click.option("--date", metavar="DATE",
              help="With --history: when NEW was measured (2026-11-23); else its commit's date.")  # fmt: skip
@click.option("--commit", metavar="HASH", help="With --history: the commit that NEW is of, where NEW is a path.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown, for a comment on a pull request.")
@json_option
def command(
    old: str, new: str, threshold: float, across: bool, measure: bool, rounds: int, history: Path | None,
    date: str | None, commit: str | None, as_markdown: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compare the times of NEW with those of OLD; exit code 5 if anything became slower beyond noise.

    Each is a folder of results (results/cpu, or one of several such), a package or its tuned.json, what
    `mctune bench --json` printed, or a commit: REV or REV:results/cpu, from the root of the repository in this
    directory (REV alone means REV:results). Of several configurations of a problem the fastest counts.

    A stored time is beyond noise if it differs by more than the threshold and the spreads (20th to 80th percentile) do
    not overlap. With --measure the kernels of two packages are timed in the same rounds, and a sign test decides.
    """
    if as_json and as_markdown:
        raise UsageError("--json and --markdown are two forms of one table: give one of them")
    if not (math.isfinite(threshold) and 0 <= threshold <= 1000):
        raise UsageError(f"--threshold {threshold:g}: give a percentage from 0 to 1000")
    if rounds != _ROUNDS and not measure:
        raise UsageError("--rounds is for --measure; stored times are what they are")
    if (date or commit) and history is None:
        raise UsageError("--date and --commit go with --history FILE")
    with ExitStack() as stack:
        before, after = (stack.enter_context(found(text)) for text in (old, new))
        comparison = _compared(before, after, threshold / 100, across, rounds if measure else None,
                               None if history is None else _History(history, date, commit))  # fmt: skip
    for remark in comparison.remarks:
        say(remark)
    if as_json:
        print_json(comparison.to_dict())
    else:
        from mctune.report.compared import as_markdown as markdown
        from mctune.report.compared import as_text

        click.echo(markdown(comparison) if as_markdown else as_text(comparison))
    if comparison.regressed:
        slower = comparison.count("slower")
        what = f"{slower} of {len(comparison.pairs)} rows are" if slower else "all rows together are"
        raise RegressionError(f"{what} slower than before, beyond {threshold:g} % and noise")


@dataclass(frozen=True)
class _History:
    """What a user says of the history that NEW's times are added to."""

    path: Path
    date: str | None
    commit: str | None


def _compared(
    before: Found, after: Found, threshold: float, across: bool, rounds: int | None, history: _History | None
) -> Comparison:
    """The comparison, measured in so many rounds or of what is stored; NEW's times are added to the history."""
    from mctune.report.compare import compare
    from mctune.report.history import Record, append_history, check_history, dated
    from mctune.report.sides import fastest, read_side

    old, new = (read_side(side.path, side.called) for side in (before, after))
    dates: list[tuple[str, str]] = []
    if history is not None:  # before anything is timed
        check_history(history.path)
        for document in new.documents:
            told = {"date": after.date, "commit": after.commit} | document.environment
            dates.append(dated(told, history.date, history.commit))
    if rounds is None:
        comparison = compare(old, new, threshold=threshold, across=across)
        added = [[row for of in fastest(one.rows).values() for row in of.values()] for one in new.documents]
    else:
        comparison = _measured(before, after, rounds, threshold)
        added = [[pair.new for pair in comparison.pairs if pair.new is not None and pair.ratio is not None]]
    if history is not None:
        records = [
            Record.of(row, date=date, commit=commit, title=str(document.environment["target"].get("title", "")))
            for rows, document, (date, commit) in zip(added, new.documents, dates, strict=True)
            for row in rows
        ]
        say(f"{history.path}: {append_history(history.path, records)} of {len(records)} times added")
    return comparison


def _measured(before: Found, after: Found, rounds: int, threshold: float) -> Comparison:
    """The kernels of two packages, timed by turns."""
    from mctune.measure.packages import packages_by_turns
    from mctune.report.compare import Comparison

    try:
        pairs = packages_by_turns(before.path, after.path, rounds=rounds, threshold=threshold, note=say)
    except MctuneError as error:
        text = str(error)
        for side in (before, after):
            text = text.replace(str(side.path), side.called)
        raise type(error)(text) from error
    remark = f"timed by turns on this machine, {rounds} rounds of each kernel"
    return Comparison(before.called, after.called, threshold, tuple(pairs), (remark,))
