"""Traces: the measured time of a Solution, and the row that it is, back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mctune.core.errors import UsageError
from mctune.core.problem import Problem
from mctune.report.rows import Row
from mctune.report.trace.definition import workload
from mctune.report.trace.solution import rest_of

UNKNOWN = "NaN"
"""A number that was not taken, as flashinfer-bench writes it."""
_LOG = (
    "latency_ms is a median with a cold cache. reference_latency_ms and speedup_factor are 0: the reference was not "
    "timed. max_relative_error is RMS(difference) / RMS(reference) against mctune's float64 oracle, the largest of the "
    "cases that were verified; the largest absolute error was not recorded."
)
_LOG_OF_A_BACKWARD = " latency_ms is that of the backward kernels alone, after a forward that kept what they want."


def trace(row: Row, solution: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """The Trace of a measured row.

    Raises:
        ValueError: for a predicted row, which has none.
    """
    if row.how != "measured":
        raise ValueError(f"{row.problem}: a time that was not measured is no evaluation")
    return {
        "definition": solution["definition"],
        "workload": workload(row.problem),
        "solution": solution["name"],
        "evaluation": {
            "status": "PASSED",
            "environment": {"hardware": str(target.get("title") or row.target), "libs": dict(row.versions)},
            "timestamp": row.date or "not recorded",
            "log": _LOG + (_LOG_OF_A_BACKWARD if row.problem.pass_ == "backward" else ""),
            "correctness": {
                "max_relative_error": UNKNOWN if row.error is None else row.error,
                "max_absolute_error": UNKNOWN,
                "extra": rest_of(row),
            },
            "performance": {"latency_ms": row.ms, "reference_latency_ms": 0.0, "speedup_factor": 0.0},
        },
    }


def measured_row(told: Mapping[str, Any], problem: Problem, evaluation: Mapping[str, Any]) -> Row:
    """The row of a Trace; ``told`` is what its Solution says.

    Raises:
        UsageError: if the evaluation has no time.
    """
    if evaluation["status"] != "PASSED":
        raise UsageError(f"has the status {evaluation['status']!r:.40}: no time")
    extra = evaluation["correctness"].get("extra") or {}
    versions = evaluation["environment"]["libs"]
    return _row(told, problem, "measured", evaluation["performance"]["latency_ms"], extra, versions)


def predicted_row(told: Mapping[str, Any], problem: Problem) -> Row:
    """The row of a Solution whose time is predicted."""
    return _row(told, problem, "predicted", told["predicted"]["ms"], told["predicted"], told["versions"])


def _row(
    told: Mapping[str, Any],
    problem: Problem,
    how: str,
    ms: float,
    rest: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Row:
    values = {name: value for name, value in rest.items() if name != "ms"}
    values |= {name: dict(values.get(name, ())) for name in ("baselines", "shares")}
    own = {name: told[name] for name in ("target", "backend", "config")}
    return Row.from_dict({**own, **values, "problem": problem.to_dict(), "how": how, "ms": ms, "versions": versions})
