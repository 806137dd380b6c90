"""T4, the results format of the auto-tuning community, which kernel_tuner and KTT write: what was tried, a trial each.

The schema is odgaard/TuningSchema's, as AutoTuningAssociation/autotuning_methodology and KernelTuner/kernel_tuner carry
it: ``results``, each with ``configuration``, ``times``, ``invalidity``, ``correctness``, ``measurements`` and
``objectives``. ``correctness`` is 1 or 0 there, so the error itself is a measurement. What T4 has no field for (the
problem, the machine, the whole outcome) stands beside its own under ``mctune``, and readers of T4 pass over it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from mctune.core import outcome as outcomes
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.known import Known, Machine
from mctune.core.outcome import Crashed, FailedBuild, Outcome, Predicted, Timed, TimedOut, TooLarge, Wrong
from mctune.core.problem import Problem

SCHEMA_VERSION = "1.0.0"
TIME, PREDICTED = "time", "predicted_time"
"""The objectives: a predicted time is never called a measured one."""
_UNITS = {"nanoseconds": 1e-6, "microseconds": 1e-3, "milliseconds": 1.0, "seconds": 1e3}
_NUMBERS = ("ms", "low", "high", "error", "tolerance", "seconds", "sm_mhz", "celsius", "pace")
_APIS = {"cuda": "CUDA"}


@dataclass(frozen=True)
class Tried:
    """A trial: ``seconds`` is what evaluating it took, ``at`` when it was done."""

    config: Config
    outcome: Outcome
    seconds: float
    at: datetime | None = None


@dataclass(frozen=True)
class Results:
    """The trials of one study, and what it is about: the study's own ``attrs``; ``version`` is mctune's."""

    about: Mapping[str, Any]
    trials: tuple[Tried, ...]
    version: str = ""
    begun: datetime | None = field(default=None, compare=False)

    def problem_of(self, config: Config) -> Problem | None:
        """What a configuration was tried at, its segment length included; ``None`` where the document does not say."""
        if "problem" not in self.about:
            return None
        length = {"segment_length": config["segment_length"]} if "segment_length" in config else {}
        return Problem.from_dict({**self.about["problem"], **length})


def to_t4(results: Results) -> dict[str, Any]:
    """The T4 document of a study. Times are in milliseconds.

    Examples:
        >>> trial = Tried(Config.of({"chunk": 64}), TooLarge("9 of 8 B", 9, 8, "B"), 0.5)
        >>> (result,) = to_t4(Results({}, (trial,)))["results"]
        >>> result["configuration"], result["invalidity"], result["correctness"], result["times"]["framework"]
        ({'chunk': 64}, 'constraints', 0, 500.0)
    """
    target = list(results.about.get("target", ()))
    metadata: dict[str, Any] = {
        "autotuner": "mctune",
        "autotuner_version": results.version,
        "timeunit": "milliseconds",
        "mctune": dict(results.about),
    }
    if target:
        machine = Machine(*target)
        metadata["device"] = machine.title or machine.name
        if machine.kind in _APIS:
            metadata["compute_api"] = _APIS[machine.kind]
    if results.begun is not None:
        metadata["timestamp"] = results.begun.isoformat()
    tried = [_result(trial) for trial in results.trials]
    return {"schema_version": SCHEMA_VERSION, "metadata": metadata, "results": tried}


def _result(trial: Tried) -> dict[str, Any]:
    """One trial. What building, verifying and timing took is not kept apart: all of it is in ``framework``."""
    outcome = trial.outcome
    runtimes = [outcome.ms] if isinstance(outcome, Timed) else []
    result: dict[str, Any] = {
        "configuration": trial.config.to_dict(),
        "objectives": [PREDICTED if isinstance(outcome, Predicted) else TIME],
        "times": {
            "compilation_time": 0.0,
            "compilation": 0.0,  # so kernel_tuner writes it, with benchmark
            "benchmark": 0.0,
            "framework": trial.seconds * 1e3,
            "search_algorithm": 0.0,
            "validation": 0.0,
            "runtimes": runtimes,
        },
        "invalidity": invalidity(outcome),
        "correctness": int(outcomes.cost(outcome) is not None),
        "measurements": [
            {"name": name, "value": value, "unit": unit}
            for name, value, unit in _measurements(outcome)
            if _finite(value)
        ],
        "mctune": {"outcome": _plain(outcome), "seconds": trial.seconds},
    }
    if trial.at is not None:
        result["timestamp"] = trial.at.isoformat()
    return result


def invalidity(outcome: Outcome) -> str:
    """T4's word for what became of a candidate: one that exceeds the device breaks a constraint of it."""
    match outcome:
        case Timed() | Predicted():
            return "correct"
        case FailedBuild():
            return "compile"
        case TooLarge():
            return "constraints"
        case Crashed():
            return "runtime"
        case TimedOut():
            return "timeout"
        case Wrong():
            return "correctness"


def _measurements(outcome: Outcome) -> list[tuple[str, float | None, str]]:
    """Name, value and unit of everything that was measured, or predicted."""
    match outcome:
        case Timed(ms, low, high, repeats, error, sm_mhz, celsius):
            return [
                (TIME, ms, "ms"), ("time_20th_percentile", low, "ms"), ("time_80th_percentile", high, "ms"),
                ("repeats", repeats, ""), ("error", error, ""), ("sm_clock", sm_mhz, "MHz"),
                ("temperature", celsius, "degrees Celsius"),
            ]  # fmt: skip
        case Predicted(ms, _, error):
            return [(PREDICTED, ms, "ms"), ("error", error, "")]
        case Wrong(error, tolerance):
            return [("error", error, ""), ("tolerance", tolerance, "")]
        case TooLarge(_, need, limit, unit):
            return [("need", need, unit), ("limit", limit, unit)]
        case TimedOut(seconds):
            return [("time_limit", seconds, "s")]
        case FailedBuild() | Crashed():
            return []


def _finite(value: float | None) -> bool:
    return value is not None and abs(value) < float("inf")


def _plain(outcome: Outcome) -> dict[str, Any]:
    """The outcome's own JSON; numbers that JSON has no word for are texts."""
    values: dict[str, Any] = json.loads(outcomes.to_json(outcome))
    return {name: repr(v) if isinstance(v, float) and not _finite(v) else v for name, v in values.items()}


def from_t4(document: Mapping[str, Any]) -> Results:
    """The inverse of :func:`to_t4`; of another tuner's document what can be told from it.

    There ``about`` is empty, the outcome of a configuration that T4 calls correct is its measured time (the first
    objective, else the median of its runs), and what it calls anything else is that.

    Raises:
        UsageError: for a document that is not T4, naming the first result that is not.
    """
    metadata = document.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    scale = _UNITS.get(str(metadata.get("timeunit", "milliseconds")))
    if scale is None:
        raise UsageError(f"timeunit {metadata['timeunit']!r:.40} is not one of {', '.join(_UNITS)}")
    listed = document.get("results")
    if not isinstance(listed, list):
        raise UsageError("has no list of results")
    trials: list[Tried] = []
    for number, result in enumerate(listed):
        try:
            trials.append(_tried(result, scale))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UsageError(f"result {number} is not T4: {type(error).__name__} {str(error)[:120]}") from error
    about = metadata.get("mctune", {})
    return Results(
        about if isinstance(about, dict) else {}, tuple(trials), str(metadata.get("autotuner_version", "")),
        _when(metadata.get("timestamp")),
    )  # fmt: skip


def _tried(result: Mapping[str, Any], scale: float) -> Tried:
    config = Config.of({name: value for name, value in result["configuration"].items() if isinstance(value, int | str)})
    ours = result.get("mctune")
    if isinstance(ours, dict):
        told = ours["outcome"].items()
        values = {name: float(v) if name in _NUMBERS and isinstance(v, str) else v for name, v in told}
        return Tried(config, outcomes.from_dict(values), float(ours["seconds"]), _when(result.get("timestamp")))
    times = result["times"]
    spent = sum(value for value in times.values() if isinstance(value, int | float)) * scale / 1e3
    return Tried(config, _outcome(result, scale), spent, _when(result.get("timestamp")))


def _outcome(result: Mapping[str, Any], scale: float) -> Outcome:
    """What another tuner's result says of a configuration."""
    match result["invalidity"]:
        case "correct":
            runs = sorted(float(ms) * scale for ms in result["times"].get("runtimes") or ())
            ms = _objective(result, scale)
            ms = ms if ms is not None else runs[len(runs) // 2]
            low, high = (runs[len(runs) // 5], runs[-1 - len(runs) // 5]) if runs else (ms, ms)
            return Timed(ms, low, high, len(runs), 0.0)
        case "compile":
            return FailedBuild("it did not compile")
        case "timeout":
            return TimedOut(0.0, "time")
        case "correctness":
            return Wrong(float("inf"), 0.0, "unknown")
        case "constraints":
            return TooLarge("it breaks a constraint", 0, 0, "")
        case "runtime":
            return Crashed("it failed when it ran")
    raise ValueError(f"invalidity {result['invalidity']!r:.40}")


def _objective(result: Mapping[str, Any], scale: float) -> float | None:
    """The time that was minimised, in milliseconds; ``None`` where the objective is something else."""
    wanted = [str(name) for name in result.get("objectives") or (TIME,)]
    for one in result.get("measurements") or ():
        if one["name"] == wanted[0] == TIME and isinstance(one["value"], int | float):
            return float(one["value"]) * (1.0 if one.get("unit") == "ms" else scale)
    if wanted[0] != TIME:
        raise ValueError(f"its objective is {wanted[0]!r:.40}, not time")
    return None


def _when(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")) if text else None
    except ValueError:
        return None


def known_of_t4(source: str, results: Results) -> tuple[Known, ...]:
    """The configurations that have a time, with the problem and the machine where the document is ours.

    Raises:
        UsageError: if what it is about cannot be read.
    """
    about = results.about
    machine = Machine(*about["target"]) if "target" in about else None
    backend = str(about.get("backend", {}).get("name", ""))
    found: list[Known] = []
    for trial in results.trials:
        if not isinstance(trial.outcome, Timed | Predicted):
            continue
        problem = results.problem_of(trial.config)
        measured = isinstance(trial.outcome, Timed)
        found.append(Known(trial.config, trial.outcome.ms, measured, source, problem, machine, backend))
    return tuple(found)
