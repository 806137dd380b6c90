"""What a study's trials say to a sampler, whoever stored them, and in what form a point is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from mctune.core.space import Param, SearchSpace
from mctune.study.feasible import Point

PARTS, AT_FAULT = "parts", "at_fault"
"""User attributes of a trial: the cost of each operation, by name; the operation why it failed."""
FAILED = "failed"
"""The constraint of a trial that is above 0 where its candidate failed."""
NOTES = "sampler:"
"""Prefix of the system attributes in which a sampler keeps what it must know about its trials."""
GAVE_WAY = "mctune:gave_way"
"""System attribute of a FAIL trial whose point another trial has: nothing comes free with it."""


@dataclass(frozen=True)
class Tried:
    """A point and its cost, lower is better; ``None`` where it failed. ``notes`` are the sampler's own.

    ``parts`` are the costs of operations, by name; ``at_fault`` is the operation why it failed, where that is known.
    """

    point: Point
    cost: float | None
    notes: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    at_fault: str = ""


@dataclass
class Read:
    """The leading trials of a study that are finished and need not be looked at again.

    Args:
        done: how many those are.
        tried: what they say.
        freed: how many points may come again, since their trials were cut off.
        ranges: how the study stores each parameter.
    """

    done: int = 0
    tried: list[Tried] = field(default_factory=list)
    freed: int = 0
    ranges: dict[str, BaseDistribution] = field(default_factory=dict)


def stored_as(space: SearchSpace, trials: Sequence[FrozenTrial], known: dict[str, BaseDistribution]) -> None:
    """Fill ``known`` with the distribution of each parameter: the one that the study has already, else its values.

    All are categorical, the ordered ones too: a range of integers would promise values that no kernel can be built
    with. Optuna's dashboard has them evenly spaced and in order in its slices, as a logarithmic axis has powers of two
    (its contours sort them as words).
    Optuna allows one distribution a name and study, so one that an earlier version began goes on with positions.
    """
    missing = {param.name: param for param in space.params if param.name not in known}
    for trial in trials:
        if not missing:
            return
        for name in missing.keys() & trial.distributions.keys():
            known[name] = trial.distributions[name]
            del missing[name]
    if not trials:
        return
    for name, param in missing.items():
        known[name] = CategoricalDistribution(param.values)


def values_of(param: Param, distribution: BaseDistribution | None) -> Sequence[Any] | None:
    """What stands for a parameter's values in a distribution: their positions, or themselves; ``None`` if neither."""
    match distribution:
        case IntDistribution(low=0, step=1) if distribution.high == len(param.values) - 1:
            return range(len(param.values))
        case IntDistribution():
            values = tuple(range(distribution.low, distribution.high + 1, distribution.step))
            return param.values if values == param.values else None
        case CategoricalDistribution():
            return param.values if set(distribution.choices) == set(param.values) else None
    return None


def point_of(space: SearchSpace, trial: FrozenTrial) -> Point | None:
    """The point that a trial's parameters make, if they do."""
    point = []
    for param in space.params:
        values = values_of(param, trial.distributions.get(param.name))
        if values is None or trial.params[param.name] not in values:
            return None
        point.append(values.index(trial.params[param.name]))
    return tuple(point)


def cost_of(trial: FrozenTrial, direction: optuna.study.StudyDirection) -> float | None:
    """What a finished trial counts as, lower is better."""
    if trial.state != TrialState.COMPLETE or any(value > 0 for value in trial.constraints.values()):
        return None
    if trial.value is None or not math.isfinite(trial.value):
        return None
    return -trial.value if direction == optuna.study.StudyDirection.MAXIMIZE else trial.value


def notes_of(trial: FrozenTrial) -> dict[str, Any]:
    """What the sampler noted on a trial."""
    return {key.removeprefix(NOTES): value for key, value in trial.system_attrs.items() if key.startswith(NOTES)}
