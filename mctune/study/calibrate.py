"""Fit the cost model's parameters to what was measured on a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from mctune.backends import backend_for, get_backend
from mctune.backends.triton.cost.calibrated import calibration
from mctune.backends.triton.cost.parameters import Parameters
from mctune.backends.triton.cost.predict import Demand, Uncounted, demands, estimate
from mctune.core.accuracy import Accuracy, accuracy
from mctune.core.config import Config
from mctune.core.errors import MctuneError, UsageError
from mctune.core.outcome import Timed
from mctune.core.problem import Problem
from mctune.core.remark import redacted
from mctune.core.target import Target
from mctune.study.storage import BROKEN, opened, reason
from mctune.study.study import PATIENCE_S, load_study

LEAST = 8
"""Fewer measured candidates say too little about as many parameters."""
FITTED = (
    "matrix", "issue", "shared", "port", "dram", "cache", "memory_us", "dependent_cycles", "serialized_cycles",
    "launch_us",
)  # fmt: skip
_PRIOR = 0.04
"""A parameter twice or half its default is as unlikely as a time that is off by 14 %: (0.1 / 0.5)^2 of the logs."""
_WIDEST = math.log(8.0)
_STEPS = 60


@dataclass(frozen=True)
class Measured:
    """A candidate and its measured time in milliseconds."""

    problem: Problem
    config: Config
    ms: float


@dataclass(frozen=True)
class Sample:
    """A measured candidate that could be compiled, and what its launches ask of the target."""

    measured: Measured
    demands: tuple[Demand, ...]

    def predicted(self, target: Target, parameters: Parameters) -> float:
        """Milliseconds that the cost model predicts."""
        return sum(part.us for part in estimate(self.demands, target, parameters)) / 1e3


@dataclass(frozen=True)
class Calibration:
    """Parameters before and after, and the samples that they were fitted to."""

    target: Target
    before: Parameters
    after: Parameters
    samples: tuple[Sample, ...]

    def predicted(self, parameters: Parameters) -> list[float]:
        """Milliseconds of every sample."""
        return [sample.predicted(self.target, parameters) for sample in self.samples]

    def judged(self, parameters: Parameters) -> list[tuple[Problem, Accuracy]]:
        """By problem, where it has enough candidates."""
        groups: dict[Problem, list[tuple[float, float]]] = {}
        for sample, ms in zip(self.samples, self.predicted(parameters), strict=True):
            groups.setdefault(sample.measured.problem, []).append((sample.measured.ms, ms))
        found = [(problem, accuracy(pairs)) for problem, pairs in groups.items()]
        return [(problem, judged) for problem, judged in found if judged is not None]


def compiled(
    rows: Sequence[Measured], target: Target, folder: Path, note: Callable[[str], None] = lambda _: None
) -> tuple[Sample, ...]:
    """What the launches of each row ask of ``target``; a row that does not compile is noted and left out.

    Raises:
        UsageError: for fewer than ``LEAST`` rows, before or after compiling them, or a target without a cost model.
    """
    if target.on_cpu:
        raise UsageError("on a CPU every candidate is measured and none predicted: there is nothing to calibrate")
    _enough(len(rows), target, "measured rows")
    backend = get_backend(backend_for(target))
    backend.ready()
    folder.mkdir(parents=True, exist_ok=True)
    samples: list[Sample] = []
    for row in rows:
        try:
            built = backend.build(row.problem, row.config, target, folder)
            launches = backend.compile(row.problem, row.config, built, target)
        except MctuneError:
            raise
        except Exception as error:
            note(f"left out: {row.problem} [{row.config}]: {(str(error).splitlines() or [type(error).__name__])[0]}")
            continue
        if not isinstance(launches, tuple):
            note(f"left out: {row.problem} [{row.config}]: {launches.message}")
            continue
        try:
            asked = demands(launches, row.problem, row.config, target, Parameters())
        except Uncounted as error:
            note(f"left out: {row.problem} [{row.config}]: {error}")
            continue
        samples.append(Sample(row, asked))
    _enough(len(samples), target, "measured rows that compile")
    return tuple(samples)


def calibrate(samples: Sequence[Sample], target: Target) -> Calibration:
    """Fit ``FITTED`` by least squares on the logarithm of time, each drawn to its default.

    Raises:
        UsageError: for fewer than ``LEAST`` samples.
    """
    _enough(len(samples), target, "measured rows with predictions")
    default = Parameters()
    wanted = np.log([sample.measured.ms for sample in samples])

    def at(logs: Any) -> Parameters:
        values = {name: getattr(default, name) * math.exp(x) for name, x in zip(FITTED, logs, strict=True)}
        return replace(default, **values)

    def residual(logs: Any) -> Any:
        parameters = at(logs)
        return np.log([sample.predicted(target, parameters) for sample in samples]) - wanted

    logs = _least_squares(residual, len(FITTED), _PRIOR)
    return Calibration(target, calibration(target)[0], at(logs), tuple(samples))


def _least_squares(residual: Callable[[Any], Any], count: int, prior: float) -> Any:
    """Levenberg and Marquardt's method from 0: least sum of squares of ``residual(x)`` plus ``prior`` |x|^2."""
    x, damping = np.zeros(count), 1e-2
    r = residual(x)
    loss = float(r @ r + prior * x @ x)
    for _ in range(_STEPS):
        jacobian = np.stack([(residual(x + step) - r) / 1e-4 for step in 1e-4 * np.eye(count)], axis=1)
        slope = jacobian.T @ r + prior * x
        curvature = jacobian.T @ jacobian + prior * np.eye(count)
        while damping < 1e6:
            step = np.linalg.solve(curvature + damping * np.eye(count), -slope)
            further = np.clip(x + step, -_WIDEST, _WIDEST)
            found = residual(further)
            new = float(found @ found + prior * further @ further)
            if new < loss:
                break
            damping *= 4
        else:
            return x
        gained, x, r, loss, damping = loss - new, further, found, new, damping / 4
        if gained < 1e-9 * loss:
            return x
    return x


def _enough(count: int, target: Target, what: str) -> None:
    if count < LEAST:
        raise UsageError(
            f"{count} {what} for {target.name}; calibrating takes at least {LEAST}: measure more candidates on the "
            f"device, for example mctune search --gpu {target.name} --measure, and give its storage"
        )


def measured_in_storage(url: str, target: Target) -> Iterable[tuple[str, Problem, Config, Timed]]:
    """(backend, problem, configuration, time) of all that searches measured on ``target``, by an Optuna storage.

    Raises:
        UsageError: if the storage cannot be opened.
    """
    try:
        names = optuna.get_all_study_names(opened(url, PATIENCE_S))
    except BROKEN as error:
        raise UsageError(f"cannot read the storage {redacted(url)}: {reason(error)}") from error
    for name in names:
        attrs, trials = load_study(url, name)
        if attrs.get("how") != "measured" or attrs.get("target", [None])[0] != target.name:
            continue
        for trial in trials:
            if isinstance(trial.outcome, Timed):
                length = {"segment_length": trial.config["segment_length"]} if "segment_length" in trial.config else {}
                problem = Problem.from_dict({**attrs["problem"], **length})
                yield attrs["backend"]["name"], problem, trial.config, trial.outcome
