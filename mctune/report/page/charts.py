"""The plots of a page as Vega-Lite specifications, their data inside.

Measured and predicted never share a mark: a measured bar is filled and a predicted one outlined, with its word; a
measured point is a filled circle and a predicted one an open triangle; lines are solid and dashed. Every plot has the
parameter ``hide``, which takes the predicted ones away. ``"$width"`` stands for what the page has room for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mctune.core.work import cached_state_bytes, cached_states
from mctune.report.accuracy import candidate
from mctune.report.page.columns import OURS, figure, label, operation, point, shape
from mctune.report.page.content import Content
from mctune.report.rows import Row

Spec = dict[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
WIDTH = "$width"
MEASURED: Spec = {"filter": "datum.how == 'measured'"}
PREDICTED: Spec = {"filter": "datum.how == 'predicted'"}
HIDE: Spec = {"filter": "!hide || datum.how != 'predicted'"}
HOW = ("measured", "predicted")
MOST = 3000
"""Points that a plot draws; of more, one in so many."""
_SHAPES: Spec = {"domain": list(HOW), "range": ["circle", "triangle-up"]}
_DASHES: Spec = {"domain": list(HOW), "range": [[1, 0], [5, 3]]}
_ABOUT = ("problem", "contender", "how", "ms", "low", "high", "target", "date", "versions")


@dataclass(frozen=True)
class Chart:
    """A plot: ``name`` is its place in the page, ``title`` its heading, ``says`` how to read it."""

    name: str
    title: str
    says: str
    spec: Spec


def spec(values: Sequence[Mapping[str, Any]], **more: Any) -> Spec:
    """A specification over ``values`` that predicted rows can be hidden in."""
    return {
        "$schema": SCHEMA, "data": {"name": "rows", "values": list(values)},
        "params": [{"name": "hide", "value": False}], **more,
    }  # fmt: skip


def field(name: str, kind: str, title: str | None = None, **more: Any) -> Spec:
    """An encoding of a field; ``kind`` is Vega-Lite's type."""
    return {"field": name, "type": kind, "title": name if title is None else title or None, **more}


def log(name: str, title: str, base: int = 10, **more: Any) -> Spec:
    """A quantity on a logarithmic axis."""
    scale = {"type": "log", "base": base, "nice": base == 10}
    return field(name, "quantitative", title, scale=scale, axis={"tickCount": 6, "format": "~s"}, **more)


def about(*names: str) -> list[Spec]:
    """What a tooltip says: texts as they are, numbers to four digits."""
    numbers = {
        "ms",
        "low",
        "high",
        "bound",
        "fraction",
        "intensity",
        "gflops",
        "share",
        "MiB",
        "seconds",
        "T",
        "segment",
    }
    units = {"ms": "ms", "low": "20th percentile, ms", "high": "80th percentile, ms", "fraction": "of the bound",
             "bound": "least possible, ms", "intensity": "operations a byte", "gflops": "GFLOP/s"}  # fmt: skip
    return [
        {"field": name, "title": units.get(name, name), **({"type": "quantitative", "format": ".4~g"} if name in numbers
                                                           else {"type": "nominal"})}
        for name in names
    ]  # fmt: skip


def mark_how(points: Spec | None = None) -> list[Spec]:
    """Shape and fill of points by how their number came about."""
    base = {"type": "point", "size": 70, "strokeWidth": 1.5, **(points or {})}
    shape_ = {"shape": field("how", "nominal", "how", scale=_SHAPES)}
    return [
        {"transform": [MEASURED], "mark": {**base, "filled": True}, "encoding": shape_},
        {"transform": [PREDICTED], "mark": {**base, "filled": False}, "encoding": shape_},
    ]


def comparison(content: Content) -> Chart | None:
    """Each problem's time beside that of every other way to compute it, in the same run if it was measured."""
    values: list[dict[str, Any]] = []
    for row in decisive(content.fastest):
        mine = point(row, content)
        # A kernel that has nothing beside it stands beside those that other backends compile.
        alike = [row] if row.baselines else [
            one for one in content.fastest if (one.problem, one.how) == (row.problem, row.how) and not one.baselines
        ]  # fmt: skip
        for one in sorted(alike, key=lambda one: one.ms):
            told = f"{figure(one.ms)} ms{' (predicted)' if one.how == 'predicted' else ''}"
            values.append(point(one, content) | {"ours": True, "label": told, "end": max(one.ms, one.high or 0.0)})
        for name, ms in sorted(row.baselines, key=lambda one: one[1]):
            other = {"contender": name, "ms": ms, "low": None, "high": None, "ours": False}
            values.append(mine | other | {"label": f"{figure(ms)} ms", "end": ms})
    if not values:
        return None
    return Chart(
        "comparison", "The comparison that decides",
        "Medians; the line across a bar is the 20th to the 80th percentile. Filled bars are measured, side by side in "
        "one run; outlined ones are predicted by the cost model. The upright mark is the least possible time: "
        "operations over the matrix rate, or bytes over the bandwidth, as they were in the same run, or for a "
        "prediction as the data sheet has them.",
        spec(values, transform=[HIDE], vconcat=[_beside(name) for name in dict.fromkeys(v["problem"] for v in values)],
             spacing=14),
    )  # fmt: skip


def _beside(problem: str) -> Spec:
    """The bars of one problem."""
    colour = {"condition": {"test": "datum.ours", "value": "#0072B2"}, "value": "#8a8f98"}
    return {
        "title": {"text": problem, "anchor": "start", "fontSize": 12},
        "width": WIDTH, "height": {"step": 19}, "transform": [{"filter": f"datum.problem == {_quoted(problem)}"}],
        "encoding": {
            "y": field("contender", "nominal", "", sort=None, axis={"labelLimit": 150, "minExtent": 150}),
            "x": field("ms", "quantitative", "", scale={"domainMin": 0}, axis=None), "tooltip": about(*_ABOUT),
        },
        "layer": [
            {"transform": [MEASURED], "mark": {"type": "bar"}, "encoding": {"color": colour}},
            {"transform": [PREDICTED],
             "mark": {"type": "bar", "fillOpacity": 0, "strokeDash": [4, 3], "strokeWidth": 1.5},
             "encoding": {"stroke": colour}},
            {"transform": [{"filter": "isValid(datum.low)"}], "mark": {"type": "rule", "strokeWidth": 2},
             "encoding": {"x": field("low", "quantitative", "", axis=None), "x2": {"field": "high"}}},
            {"transform": [{"filter": "datum.ours && isValid(datum.bound)"}],
             "mark": {"type": "tick", "thickness": 3, "color": "#D55E00"},
             "encoding": {"x": field("bound", "quantitative", "", axis=None)}},
            {"mark": {"type": "text", "align": "left", "dx": 5},
             "encoding": {"text": {"field": "label"}, "x": field("end", "quantitative", "", axis=None)}},
        ],
    }  # fmt: skip


def decisive(rows: Sequence[Row], most: int = 40) -> list[Row]:
    """The rows that decide: those with something beside them, and of a target without any the fastest predicted."""
    compared = [row for row in rows if row.baselines]
    if not compared:
        fastest: dict[str, Row] = {}
        for row in rows:
            key = f"{operation(row.problem)} {shape(row.problem, segment=False)} {row.how}"
            if key not in fastest or row.ms < fastest[key].ms:
                fastest[key] = row
        compared = list(fastest.values())
    rank = {"backward": 0, "decode": 1, "forward": 2}
    compared.sort(key=lambda row: (row.how == "predicted", rank.get(row.problem.pass_, 3), -row.problem.T))
    return compared[:most]


def roofline(content: Content) -> Chart | None:
    """Attained operations a second of every kernel against operations a byte, under the bound."""
    rates, values = content.rates, [point(row, content) for row in content.fastest]
    if rates is None or not values:
        return None
    matrix, copy, source = rates
    places = [value["intensity"] for value in values]
    ridge = matrix / copy
    line = sorted({min([*places, ridge]) / 1.6, ridge, max([*places, ridge]) * 1.6})
    roof = [{"intensity": x, "gflops": min(matrix, x * copy) / 1e9, "how": "measured"} for x in line]
    layers = [
        {"data": {"values": roof}, "mark": {"type": "line", "strokeWidth": 1.5, "color": "#8a8f98"},
         "encoding": {"tooltip": {"value": "bound"}}},
        *({**layer, "transform": [HIDE, *layer["transform"]], "encoding": layer["encoding"] | {
            "color": field("pass", "nominal", "pass"),
            "tooltip": about("problem", "how", "ms", "gflops", "intensity", "bound", "fraction", "bound by", "target",
                             "date", "versions")}} for layer in mark_how()),
    ]  # fmt: skip
    encoding = {"x": log("intensity", "operations a byte"), "y": log("gflops", "GFLOP/s")}
    return Chart(
        "roofline", "Roofline",
        f"Every kernel under the line that nothing can pass: {matrix / 1e12:.4g} TFLOP/s and {copy / 1e9:.4g} GB/s, "
        f"{source}.",
        spec(values, width=WIDTH, height=320, layer=layers, encoding=encoding),
    )  # fmt: skip


def frontier(content: Content) -> Chart | None:
    """Segment length against time and against the bytes of the cache; of deep memories each inner chunk."""
    groups: dict[str, list[Row]] = {}
    for row in content.fastest:
        if row.problem.segment_length:
            groups.setdefault(f"{operation(row.problem)}, {shape(row.problem, segment=False)}", []).append(row)
    values = []
    for name, rows in groups.items():
        if len({row.problem.segment_length for row in rows}) > 1:
            values += [
                point(row, content) | {
                    "group": f"{name}, {row.backend}", "MiB": cached_state_bytes(row.problem) / 2**20,
                    "states": cached_states(row.problem),
                }
                for row in rows
            ]  # fmt: skip
    if not values:
        return None
    colour = {"color": field("group", "nominal", "", legend={"orient": "bottom", "columns": 1, "labelLimit": 400})}
    tip = {"tooltip": about("problem", "how", "ms", "low", "high", "MiB", "states", "target", "date", "versions")}
    x = log("segment", "segment length, tokens", 2)
    lines: list[Spec] = [
        {"mark": {"type": "line"}, "encoding": {"strokeDash": field("how", "nominal", "how", scale=_DASHES)}}
    ]

    def panel(y: Spec) -> Spec:
        return {
            "width": WIDTH,
            "height": 200,
            "layer": [*lines, *mark_how()],
            "encoding": {"x": x, "y": y, **colour, **tip},
        }

    return Chart(
        "frontier", "Frontier: segment length, time, bytes",
        "A shorter segment caches more states: more recall, more bytes, more time. The search recommends the shortest "
        "one within ten percent of the fastest.",
        spec(values, transform=[HIDE], vconcat=[panel(log("ms", "ms")), panel(log("MiB", "cache, MiB"))]),
    )  # fmt: skip


def spent(content: Content) -> Chart | None:
    """Where the time of a pass goes, kernel by kernel: of each problem's fastest row."""
    fastest: dict[tuple[str, str], Row] = {}
    for row in content.fastest:
        key = label(row.problem), row.how
        if len(row.shares) > 1 and row.ms <= fastest.get(key, row).ms:
            fastest[key] = row
    values = []
    for row in fastest.values():
        rest = 1.0 - sum(share for _, share in row.shares)
        for number, (name, share) in enumerate((*row.shares, ("the rest", rest))):
            if share > 0.002:
                values.append(
                    point(row, content)
                    | {"kernel": name, "share": share, "order": number, "line": f"{label(row.problem)} ({row.how})"}
                )
    if not values:
        return None
    encoding = {
        "y": field("line", "nominal", "", sort=None, axis={"labelLimit": 330}),
        "x": field("share", "quantitative", "share of the time", axis={"format": "%"}, stack="normalize"),
        "color": field("kernel", "nominal", "kernel", legend={"orient": "bottom", "columns": 2}),
        "order": {"field": "order", "type": "quantitative"},
        "tooltip": about("problem", "kernel", "share", "ms", "how", "target", "date", "versions"),
    }
    layers = [
        {"transform": [MEASURED], "mark": {"type": "bar"}},
        {"transform": [PREDICTED],
         "mark": {"type": "bar", "fillOpacity": 0.25, "strokeDash": [4, 3], "strokeWidth": 1.5},
         "encoding": {"stroke": encoding["color"]}},
    ]  # fmt: skip
    return Chart(
        "spent", "Where the time of a pass goes",
        "Of the fastest kernel of each problem, operation by operation: as the search timed them apart, or, outlined, "
        "as the cost model predicts them. The rest is the host's and the allocator's.",
        spec(values, transform=[HIDE], width=WIDTH, height={"step": 24}, layer=layers, encoding=encoding),
    )  # fmt: skip


def lengths(content: Content) -> Chart | None:
    """Time against T with every contender, a panel an operation and pass that has several lengths."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in content.fastest:
        p = row.problem
        told = {"panel": f"{operation(p)}, {shape(p, length=False)} {p.dtype}"}
        mine = point(row, content) | told
        panels.setdefault(told["panel"], []).append(mine)
        panels[told["panel"]] += [
            mine | {"contender": name, "ms": ms, "low": None, "high": None} for name, ms in row.baselines
        ]
    kept = {name: values for name, values in panels.items() if len({value["T"] for value in values}) > 1}
    if not kept:
        return None
    encoding = {
        "x": log("T", "T, tokens", 2), "y": log("ms", "ms"),
        "color": field("contender", "nominal", "", legend={"orient": "bottom", "columns": 2}),
        "tooltip": about(*_ABOUT),
    }  # fmt: skip
    layer = [
        {"mark": {"type": "line"}, "encoding": {"strokeDash": field("how", "nominal", "how", scale=_DASHES)}},
        *mark_how(),
    ]
    panels_ = [
        {"title": {"text": name, "anchor": "start", "fontSize": 12}, "width": WIDTH, "height": 200,
         "transform": [HIDE, {"filter": f"datum.panel == {_quoted(name)}"}], "layer": layer, "encoding": encoding}
        for name in sorted(kept)
    ]  # fmt: skip
    return Chart(
        "lengths", "Time against T",
        f"Forward, training step and decode step with every contender; {OURS} is named with what compiled it.",
        spec([value for values in kept.values() for value in values], vconcat=panels_,
             resolve={"scale": {"color": "shared"}}),
    )  # fmt: skip


def _quoted(name: str) -> str:
    return "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"


def agreement(content: Content) -> Chart | None:
    """Predicted against measured time of every candidate that has both."""
    predicted = {candidate(row): row.ms for row in content.rows if row.how == "predicted"}
    values = [
        point(row, content) | {"predicted": predicted[candidate(row)]}
        for row in content.rows
        if row.how == "measured" and candidate(row) in predicted
    ]
    if not values:
        return None
    step = -(-len(values) // MOST)
    values = values[::step]
    ends = [f(value[name] for value in values for name in ("ms", "predicted")) for f in (min, max)]
    layers = [
        {"data": {"values": [{"ms": x, "predicted": x} for x in ends]},
         "mark": {"type": "line", "color": "#8a8f98", "strokeDash": [2, 2]}},
        {"mark": {"type": "point", "filled": True, "shape": "square", "size": 40},
         "encoding": {"color": field("operation", "nominal", "operation", legend={"orient": "bottom", "columns": 1}),
                      "tooltip": about("problem", "ms", "predicted", "target", "date", "versions")}},
    ]  # fmt: skip
    encoding = {"x": log("ms", "measured, ms"), "y": log("predicted", "predicted, ms")}
    return Chart(
        "agreement", "Cost model against measurement",
        "A square is a candidate with both times; on the line they are the same."
        + (f" One in {step} is drawn." if step > 1 else ""),
        spec(values, width=WIDTH, height=320, layer=layers, encoding=encoding),
    )  # fmt: skip


def history(content: Content) -> Chart | None:
    """Time of each problem by the day, of the records that `mctune compare --history` has left."""
    values = [
        {
            "problem": label(one.problem), "contender": f"{OURS}, {one.backend}", "how": one.how, "ms": one.ms,
            "low": one.low, "high": one.high, "target": one.title or one.target, "date": one.when.date().isoformat(),
            "versions": f"commit {one.commit}" if one.commit else "not recorded",
            "line": f"{label(one.problem)}, {one.backend}",
        }
        for one in sorted(content.history, key=lambda one: one.when)
    ]  # fmt: skip
    if not values:
        return None
    line = {"mark": {"type": "line"}, "encoding": {"strokeDash": field("how", "nominal", "how", scale=_DASHES)}}
    encoding = {
        "x": field("date", "temporal", "day"), "y": log("ms", "ms"), "tooltip": about(*_ABOUT),
        "color": field("line", "nominal", "", legend={"orient": "bottom", "columns": 1, "labelLimit": 400}),
    }  # fmt: skip
    return Chart(
        "history", "From day to day",
        "The time of each problem at every comparison that was written down.",
        spec(values, transform=[HIDE], width=WIDTH, height=260, layer=[line, *mark_how()], encoding=encoding),
    )  # fmt: skip


CHARTS = (comparison, roofline, frontier, spent, lengths, agreement, history)
"""In the order of the page."""
