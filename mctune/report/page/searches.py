"""The searches of a page, of the study that is chosen: best so far, outcomes, importance and a slice a parameter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mctune.core import outcome as outcomes
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.report.page.charts import SCHEMA, WIDTH, Chart, Spec, about, field, log
from mctune.report.page.columns import operation, shape
from mctune.report.page.content import Content, Study

Importance = Callable[[Sequence[tuple[Config, float]]], Mapping[str, float]]
"""How much each parameter matters to the time, as shares of 1; empty where that cannot be told."""


def searches(content: Content, importance: Importance) -> list[dict[str, Any]]:
    """What the page knows of each study, in columns."""
    return [_study(study, importance) for study in content.studies if study.results.trials]


def _study(study: Study, importance: Importance) -> dict[str, Any]:
    trials = study.results.trials
    names = sorted({name for trial in trials for name in trial.config})
    values = {
        name: list(dict.fromkeys(trial.config[name] for trial in trials if name in trial.config)) for name in names
    }
    ordered = {name: sorted(found, key=lambda value: (isinstance(value, str), value)) for name, found in values.items()}
    spent = [round(seconds, 3) for seconds in itertools.accumulate(trial.seconds for trial in trials)]
    costs = [outcomes.cost(trial.outcome) for trial in trials]
    kinds = [outcomes.kind(trial.outcome).replace("_", " ") for trial in trials]
    timed = [(trial.config, cost) for trial, cost in zip(trials, costs, strict=True) if cost is not None]
    weights = sorted(importance(timed).items(), key=lambda one: (-one[1], one[0]))
    varied = [name for name, _ in weights] + [name for name in names if name not in dict(weights)]
    return {
        "name": study.name,
        "title": _title(study),
        "how": "predicted" if "predicted" in kinds else "measured",
        "kinds": kinds,
        "seconds": spent,
        "ms": [None if cost is None else float(f"{cost:.6g}") for cost in costs],
        "importance": [[name, round(weight, 4)] for name, weight in weights],
        "params": [
            {
                "name": name,
                "values": [str(value) for value in ordered[name]],
                "at": [ordered[name].index(trial.config[name]) if name in trial.config else None for trial in trials],
            }
            for name in varied
            if len(ordered[name]) > 1
        ],
    }  # fmt: skip


def _title(study: Study) -> str:
    told = study.results.about
    backend = str(told.get("backend", {}).get("name", "")) if isinstance(told.get("backend"), Mapping) else ""
    if "problem" not in told:
        return study.name
    lengths = told.get("segment_lengths") or ()
    problem = Problem.from_dict({**told["problem"], **({"segment_length": lengths[0]} if lengths else {})})
    size = shape(problem, segment=len(lengths) == 1)
    return f"{operation(problem)}, {size} {problem.dtype}{f', by {backend}' if backend else ''}"


def _over(name: str, **more: Any) -> Spec:
    return {"$schema": SCHEMA, "data": {"name": name, "values": []}, **more}


def search_charts() -> list[Chart]:
    """The plots; their data is put in by the page, of the study that is chosen."""
    return [_best("trial", "trial", "best"), _best("seconds", "seconds of evaluation", "seconds"), _kinds(),
            _importance(), _slices()]  # fmt: skip


def _best(x: str, title: str, name: str) -> Chart:
    tip = {"tooltip": [*about("trial", "kind", "ms", "seconds"), {"field": "config", "type": "nominal"}]}
    dots = {"y": log("ms", "ms"), **tip}
    spec = _over(
        "trials", width=WIDTH, height=220, encoding={"x": field(x, "quantitative", title)},
        layer=[
            {"transform": [{"filter": "isValid(datum.ms)"}],
             "mark": {"type": "point", "opacity": 0.55}, "encoding": dots | {
                 "shape": field("kind", "nominal", "outcome", scale={"domain": ["timed", "predicted"],
                                                                     "range": ["circle", "triangle-up"]})}},
            {"transform": [{"filter": "isValid(datum.best)"}],
             "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 2, "color": "#D55E00"},
             "encoding": {"y": log("best", "ms")}},
        ],
    )  # fmt: skip
    return Chart(f"search-{name}", f"Best so far against {title}", "The line is the best time so far.", spec)


def _kinds() -> Chart:
    encoding = {
        "y": field("kind", "nominal", "", sort="-x"), "x": field("count", "quantitative", "candidates"),
        "tooltip": [field("kind", "nominal", "outcome"), field("count", "quantitative", "candidates")],
    }  # fmt: skip
    layer = [
        {"mark": "bar"},
        {"mark": {"type": "text", "align": "left", "dx": 4}, "encoding": {"text": {"field": "count"}}},
    ]
    return Chart(
        "search-kinds", "Outcomes by kind", "What became of the candidates; only those with a time can win.",
        _over("kinds", width=WIDTH, height={"step": 22}, encoding=encoding, layer=layer),
    )  # fmt: skip


def _importance() -> Chart:
    encoding = {
        "y": field("param", "nominal", "", sort=None), 
        "x": field("share", "quantitative", "importance", axis={"format": "%"}),
        "tooltip": [field("param", "nominal", "parameter"), field("share", "quantitative", "importance", format=".1%")],
    }  # fmt: skip
    return Chart(
        "search-importance", "Importance of parameters",
        "PED-ANOVA, of Optuna: how much choosing among the best depends on each.",
        _over("importance", width=WIDTH, height={"step": 18}, mark="bar", encoding=encoding),
    )  # fmt: skip


def _slices() -> Chart:
    encoding = {
        "facet": field("param", "nominal", None, sort=None, columns="$columns", header={"title": None}),
        "x": field("value", "ordinal", "", sort=None, axis={"labelAngle": -40, "labelLimit": 80}),
        "y": log("ms", "ms"),
        "tooltip": [
            field("param", "nominal", "parameter"), field("value", "nominal", "value"), *about("trial", "ms", "kind"),
        ],
    }  # fmt: skip
    spec = _over(
        "slice", mark={"type": "tick", "thickness": 1.5, "opacity": 0.6}, encoding=encoding,
        resolve={"scale": {"x": "independent"}},
    )  # fmt: skip
    spec["width"], spec["height"] = 150, 110
    return Chart("search-slice", "A slice a parameter", "Each mark is a candidate with a time.", spec)
