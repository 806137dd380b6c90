"""The index over targets: on one screen what to expect where, measured or predicted, and how to add a card."""

from __future__ import annotations

from collections.abc import Sequence

from mctune.report.page.charts import decisive
from mctune.report.page.columns import figure, operation, point, shape
from mctune.report.page.content import Content
from mctune.report.page.document import Cell, asset, shell, table_of
from mctune.report.rows import Row

_ADD = (
    "<h2>Add a card</h2><p>With the card in the machine, ten minutes: <code>make contact</code>, "
    "<code>make gpu</code>, then a pull request with <code>build/gpu/results/NAME</code> as <code>results/NAME</code>; "
    "without it, <code>make publish TARGETS=NAME</code> predicts. <code>docs/publishing.md</code> says what is in the "
    "files and what is checked.</p>"
)
_PASSES = (("backward", "backward"), ("forward", "forward"), ("decode", "decode step"))
"""Each pass, and its heading."""


def index(contents: Sequence[Content]) -> str:
    """The page over all targets: those with measured rows first."""
    ordered = sorted(contents, key=lambda one: (one.measured == 0, one.title, one.name))
    header = ("target", "figures", *(title for _, title in _PASSES), "rows", "date")
    table = table_of(header, [_line(content) for content in ordered], "targets",
                     ["measured" if content.measured else "predicted" for content in ordered])  # fmt: skip
    body = (
        '<a class="skip" href="#main">Skip to the targets</a>\n'
        "<header><h1>mctune: Memory Caching kernels by target</h1>\n"
        "<p>Measured figures stand first. A predicted one is the cost model's for a card that was not there: its word "
        "stands beside it, and no measured figure is compared with it.</p></header>\n"
        f'<main id="main">{table}{_ADD}</main>'
    )
    return shell("mctune: targets", body, (asset("tables.js"),))


def _line(content: Content) -> list[Cell]:
    """A target in one line: of each pass the row that decides, its share of the bound, and what it is faster than."""
    target = content.environment["target"]
    how = "measured" if content.measured else "predicted"
    dates = sorted(row.date for row in content.rows if row.date)
    chosen: dict[str, Row] = {}
    # Of a pass the longest that reads every state, which all aggregations but the sparse ones do.
    for row in sorted(decisive(content.fastest, most=10_000), key=lambda row: row.problem.reads.sparse):
        chosen.setdefault(row.problem.pass_, row)
    cells: list[Cell] = [
        Cell(f"{content.title} ({target.get('arch') or target['name']})", content.title, f"{content.name}/index.html"),
        Cell(how, how),
    ]
    for name, _ in _PASSES:
        found = chosen.get(name)
        cells.append(_cell(found, content) if found else Cell("none", ""))
    return [*cells, Cell(str(len(content.rows)), len(content.rows)), Cell(dates[-1] if dates else "not recorded", "")]


def _cell(row: Row, content: Content) -> Cell:
    fraction, best = point(row, content)["fraction"], row.best_baseline
    of_bound = f", {fraction:.0%} of the bound" if fraction is not None else ""
    faster = f"; {row.speedup:.2f}x {best[0]}" if row.speedup and best else ""
    what = f"{operation(row.problem).partition(' ')[2]}, {shape(row.problem)} {row.problem.dtype}"
    return Cell(f"{figure(row.ms)} ms{of_bound}{faster}", row.ms, note=what)
