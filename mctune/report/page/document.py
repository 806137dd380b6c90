"""A page as one HTML document: head, figures, tables, plots, data; it asks nothing of any other file or host."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from importlib import resources
from typing import Any, NamedTuple

from mctune.core.errors import UsageError
from mctune.report.compiled import COLUMNS as FACTS
from mctune.report.compiled import Compiled
from mctune.report.page.charts import CHARTS, Chart, decisive
from mctune.report.page.columns import coded, columns, figure, operation, parquet, point, shape, text, versions
from mctune.report.page.content import Content
from mctune.report.page.searches import Importance, search_charts, searches
from mctune.report.rows import Row

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""No page loads or sends anything, or makes code of text."""
_DRAW = "window.embed = vegaEmbed;"
_NEEDS = "needs vl-convert-python and pyarrow: pip install 'mctune[html]'"


@lru_cache(maxsize=1)
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script.

    Raises:
        UsageError: if what brings them is not installed.
    """
    try:
        import pyarrow  # noqa: F401
        import vl_convert
    except ImportError as error:
        raise UsageError(f"--html {_NEEDS}") from error
    return str(vl_convert.javascript_bundle(_DRAW)).replace("</script", "<\\/script")


def asset(name: str) -> str:
    """A style sheet or script of ours."""
    return (resources.files("mctune.report.page") / name).read_text(encoding="utf-8")


def shell(title: str, body: str, scripts: Sequence[str] = ()) -> str:
    """A document around ``body``; ``scripts`` run after it is shown."""
    told = "".join(f"<script>{script}</script>\n" for script in scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{asset('page.css')}</style>\n</head>\n"
        f"<body>\n{body}\n{told}</body>\n</html>\n"
    )


def badge(measured: int, rows: int) -> str:
    """The word for where the figures come from, with a sign that is not a colour."""
    if measured == rows:
        return '<span class="badge measured">&#9679; measured</span>'
    if measured == 0:
        return '<span class="badge predicted">&#9651; predicted</span>'
    told = f"{measured} of {rows} measured, the others predicted"
    return f'<span class="badge predicted">&#9651; {told}</span>'


def page(content: Content, importance: Importance, home: str) -> str:
    """The page of one folder of results; ``home`` is the way to the index."""
    charts = [chart for chart in (make(content) for make in CHARTS) if chart is not None]
    found = searches(content, importance)
    table = columns(content.rows)
    studied = search_charts() if found else []
    data = {
        "name": content.name, "columns": coded(table), "parquet": base64.b64encode(parquet(table)).decode(),
        "charts": {chart.name: chart.spec for chart in (*charts, *studied)}, "studies": found,
    }  # fmt: skip
    first, others = charts[:1] if charts and charts[0].name == "comparison" else [], charts
    if first:
        others = charts[1:]
    sections = [
        _section("comparison", "The comparison that decides", first[0].says if first else "",
                 _decisive(content) + ("".join(_plot(chart) for chart in first))),
        *(_section(chart.name, chart.title, chart.says, _plot(chart)) for chart in others),
        *([_search_section(studied, found)] if found else []),
        *([_compiled_section(content)] if content.compiled else []),
        _section("rows", "All rows", "Press a heading to sort.", _ROWS),
        _section("environment", "Environment", "", _environment(content)),
    ]  # fmt: skip
    names = [(chart.name, chart.title) for chart in others]
    menu = [("comparison", "Comparison"), *names, *([("search", "The search")] if found else []),
            *([("compiled", "Compiled kernels")] if content.compiled else []), ("rows", "All rows"),
            ("environment", "Environment")]  # fmt: skip
    body = (
        '<a class="skip" href="#main">Skip to the figures</a>\n<header>\n'
        f'<p><a href="{escape(home)}">All targets</a></p>\n'
        f"<h1>{escape(content.title)} {badge(content.measured, len(content.rows))}</h1>\n{_lead(content)}\n{_BAR}\n"
        '<nav aria-label="Sections"><ul>'
        + "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in menu)
        + f'</ul></nav>\n</header>\n<main id="main">\n{"".join(sections)}</main>\n'
        f'<script type="application/json" id="data">{text(data)}</script>'
    )
    return shell(f"{content.title}: mctune", body, (asset("tables.js"), library(), asset("page.js")))


_BAR = (
    '<div class="bar" role="group" aria-label="What is shown"><label><input type="checkbox" id="hide"> Hide predicted'
    "</label> "
    '<label>Find <input type="search" id="find" placeholder="operation, shape, backend"></label> '
    '<span class="downloads">Rows as <button data-as="csv">CSV</button> <button data-as="json">JSON</button> '
    '<button data-as="parquet">Parquet</button></span> <output id="count" aria-live="polite"></output></div>'
)
_ROWS = (
    '<div class="scroll"><table id="all"></table></div><p class="pager"><button id="before">Previous</button> '
    '<output id="place" aria-live="polite"></output> <button id="after">Next</button></p>'
)


def _lead(content: Content) -> str:
    """What it is about, in a sentence or two."""
    target, made = content.environment["target"], dict(content.environment.get("versions") or {})
    told = versions(made)
    dates = sorted({row.date for row in content.rows if row.date})
    when = "" if not dates else dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = ", ".join(str(x) for x in (target.get("name"), target.get("arch")) if x)
    lines = [
        f"Memory Caching kernels for <b>{escape(where)}</b>; made with {escape(told)}{f'; {when}' if when else ''}."
    ]
    predicted = len(content.rows) - content.measured
    if predicted:
        lines.append(
            f"<b>{predicted} of {len(content.rows)} times are predicted by a cost model, not measured</b>: their marks "
            "are outlined, and the word stands beside each."
        )
    return f"<p>{' '.join(lines)}</p>"


def _section(name: str, title: str, says: str, inner: str) -> str:
    told = f"<p>{escape(says)}</p>\n" if says else ""
    heading = f'<h2 id="{name}-title">{escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{heading}\n{told}{inner}\n</section>\n'


def _plot(chart: Chart) -> str:
    return f'<figure class="plot" data-chart="{chart.name}" role="group" aria-label="{escape(chart.title)}"></figure>'


class Cell(NamedTuple):
    """A cell of a table: what it says, what it is sorted by, where it leads, and what stands below in small print."""

    text: str
    value: str | float
    link: str = ""
    note: str = ""

    def __str__(self) -> str:
        kind = " class=number" if isinstance(self.value, int | float) and self.text[:1].isdigit() else ""
        told = f'<a href="{escape(self.link)}">{escape(self.text)}</a>' if self.link else escape(self.text)
        note = f"<br><small>{escape(self.note)}</small>" if self.note else ""
        return f'<td data-value="{escape(str(self.value))}"{kind}>{told}{note}</td>'


def table_of(header: Sequence[str], lines: Iterable[Sequence[Cell]], name: str, classes: Sequence[str] = ()) -> str:
    """A table whose headings sort it; ``classes`` are its lines'."""
    heads = "".join(f'<th scope="col"><button>{escape(title)}</button></th>' for title in header)
    body = "".join(
        f'<tr class="{classes[number] if classes else ""}">{"".join(map(str, line))}</tr>'
        for number, line in enumerate(lines)
    )
    head = f"<thead><tr>{heads}</tr></thead>"
    return f'<div class="scroll"><table class="sortable" id="{name}">{head}<tbody>{body}</tbody></table></div>'


_DECISIVE = (
    "operation",
    "shape",
    "ms",
    "20% to 80%",
    "fastest other",
    "speedup",
    "of the bound",
    "error",
    "how",
    "date",
)


def _decisive(content: Content) -> str:
    rows = decisive(content.fastest)
    if not rows:
        return "<p>No row.</p>"
    return table_of(_DECISIVE, [_line(row, content) for row in rows], "decisive", [row.how for row in rows])


def _line(row: Row, content: Content) -> list[Cell]:
    best, fraction = row.best_baseline, point(row, content)["fraction"]
    spread = f"{figure(row.low)} to {figure(row.high)}" if row.low is not None and row.high is not None else "none"
    return [
        Cell(operation(row.problem), operation(row.problem)),
        Cell(f"{shape(row.problem)} {row.problem.dtype}", row.problem.T),
        Cell(figure(row.ms), row.ms),
        Cell(spread, row.low if row.low is not None else ""),
        Cell(f"{best[0]}, {figure(best[1])} ms" if best else "none", best[1] if best else ""),
        Cell(f"{row.speedup:.2f}x" if row.speedup else "", row.speedup or ""),
        Cell(f"{fraction:.0%}" if fraction is not None else "", fraction or ""),
        Cell(f"{row.error:.1e}" if row.error is not None else "", row.error or ""),
        Cell(f"{row.how}, {row.backend}", row.how),
        Cell(row.date or "not recorded", row.date or ""),
    ]


def _search_section(charts: Sequence[Chart], found: Sequence[dict[str, Any]]) -> str:
    options = "".join(
        f'<option value="{number}">{escape(study["title"])} ({study["how"]}, {len(study["ms"])} trials)</option>'
        for number, study in enumerate(found)
    )
    plots = "".join(
        f"<h3>{escape(chart.title)}</h3>\n<p>{escape(chart.says)}</p>\n{_plot(chart)}\n" for chart in charts
    )
    choice = f'<p><label>Study <select id="study">{options}</select></label></p>'
    return _section(
        "search", "The search", "One study at a time; every candidate counts, failed ones too.", choice + plots
    )


def _compiled_section(content: Content) -> str:
    lines = [line for one in content.compiled for line in _launches(one)]
    header = ["pass", "by", "launches", *(title for _, title in FACTS)]
    says = (
        "What the compiler made of every kernel of the table, without running it. Registers and spilled bytes are a "
        "thread's, warps and shared memory a block's; how many blocks are resident on a multiprocessor, and its "
        "occupancy, follow from them. The time, of all launches of a line, and what bounds it are the cost model's."
    )
    return _section("compiled", "Compiled kernels", says, table_of(header, lines, "facts"))


def _launches(one: Compiled) -> list[list[Cell]]:
    """The kernels of a pass, equal launches as one line with their number and the sum of their times."""
    *same, (time, _) = FACTS
    groups: dict[tuple[str, ...], list[float]] = {}
    for launch in one.launches:
        groups.setdefault(tuple(str(launch.get(name, "")) for name, _ in same), []).append(float(launch.get(time) or 0))
    title = f"{operation(one.problem)}, {shape(one.problem)}"
    return [
        [
            Cell(title, title), Cell(one.backend, one.backend), Cell(str(len(times)), len(times)),
            *(Cell(told, _number(told)) for told in facts), Cell(figure(sum(times)), sum(times)),
        ]
        for facts, times in groups.items()
    ]  # fmt: skip


def _number(value: Any) -> str | float:
    try:
        return float(str(value).rstrip("%"))
    except ValueError:
        return str(value)


def _environment(content: Content) -> str:
    lines: list[list[Cell]] = []
    for name, value in content.environment.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        lines += [[Cell(f"{name} {key}".strip(), name), Cell(str(item), "")] for key, item in inner if item is not None]
    if rates := content.rates:
        told = f"{rates[0] / 1e12:.4g} TFLOP/s, {rates[1] / 1e9:.4g} GB/s: {rates[2]}"
        lines.append([Cell("rates of the bound", ""), Cell(told, "")])
    return table_of(("what", "value"), lines, "environment-table")
