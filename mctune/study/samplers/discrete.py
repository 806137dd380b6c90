"""An Optuna sampler over a constrained discrete space: every point is valid, and none comes twice.

What to try next is a pure function of what was tried, the seed, and nothing else, so a study that is killed and loaded
again goes on exactly as if it had not been interrupted. How a point is chosen is a subclass's :meth:`choose`.
"""

from __future__ import annotations

import math
import secrets
import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.space import Param, SearchSpace
from mctune.study.feasible import Point, Stratum
from mctune.study.rules import Rule
from mctune.study.samplers.points import Points

PARTS, AT_FAULT = "parts", "at_fault"
"""User attributes of a trial: the cost of each operation, by name; the operation why it failed."""
_NOTES = "sampler:"
"""Prefix of the system attributes in which a sampler keeps what it must know about its trials."""


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


class DiscreteSampler(optuna.samplers.BaseSampler):
    """The base of all samplers here.

    Args:
        space: parameters; its default, or the first of its fallbacks that is valid, is tried first.
        rules: the constraints, each a function of a configuration; what meets all of them may be tried.
        seed: of every random choice; ``None`` draws one.
        balance: name of a parameter whose values should be tried about equally often, each compared with its own
            best (a frontier over segment lengths needs a good configuration for each of them). Each value begins with
            a default of its own: the first that is valid with it.
        retry_failed: whether the point of a FAIL trial may come again. By default it counts as tried, and as bad as
            the worst. PRUNED trials, infinite values and violated constraints count so in any case.

    A study ends (``optimize`` returns) when every valid point was tried; with ``ask``, see :meth:`left`.
    """

    def __init__(
        self,
        space: SearchSpace,
        rules: Sequence[Rule] = (),
        *,
        seed: int | None = None,
        balance: str | None = None,
        retry_failed: bool = False,
    ) -> None:
        self.space = space
        self._seed = secrets.randbits(31) if seed is None else seed
        self._points = Points(space, rules, balance)
        self._retry, self._scanned = retry_failed, ("", 0)
        self._disregarded: frozenset[int] = frozenset()
        self._given: dict[tuple[str, int], Point | None] = {}
        self._finished: dict[tuple[str, int], Tried] = {}
        self._last: tuple[list[Tried], Point | None, Mapping[str, Any]] | None = None
        self._one_at_a_time = threading.Lock()

    def disregard(self, numbers: frozenset[int]) -> None:
        """Take no notice of the trials of these numbers: what they say is in doubt, and their points may come again."""
        self._disregarded = numbers
        self._points.rewind()

    def begin_with(self, configs: Sequence[Config]) -> None:
        """Try these right after the defaults, as far as they are valid: what is known from elsewhere.

        What is proposed depends on them too, so whoever goes on with a study gives the same ones again.
        """
        self._points.begin_with(configs)
        self._last = None

    @abstractmethod
    def choose(
        self,
        history: Sequence[Tried],
        seen: AbstractSet[Point],
        rng: np.random.Generator,
        stratum: Stratum | None,
        tried: int,
    ) -> tuple[Point | None, Mapping[str, Any]]:
        """A valid point of ``stratum`` (in which ``tried`` were tried) that is not in ``seen``, and notes about it.

        No point stands for a random one.
        """

    def propose(self, history: Sequence[Tried]) -> Point | None:
        """A valid point that ``history`` has not, or ``None`` when there is none, or none to be found."""
        if self._last is None or self._last[0] != history:
            self._last = (list(history), *self._propose(history))
        return self._last[1]

    def _propose(self, history: Sequence[Tried]) -> tuple[Point | None, Mapping[str, Any]]:
        seen = {tried.point for tried in history}
        for default in self._points.defaults:
            if default not in seen:
                return default, {}
        for stratum, count in self._points.strata([tried.point for tried in history]):
            # Drawn for each stratum by itself: one that has no more points changes nothing for the next.
            rng = np.random.default_rng([self._seed, len(history), *(stratum or ())])
            point, notes = self.choose(history, seen, rng, stratum, count)
            if point is None:
                point = next(iter(self._points.random(rng, seen, stratum)), None)
            if point is None and self._points.countable:
                point = self._points.next_in_order(seen, stratum)
            if point is not None:
                return point, notes
        return None, {}

    def costs(self, history: Sequence[Tried]) -> NDArray[np.float64]:
        """Costs for a model, NaN where a point failed: logarithms if all are positive, above each stratum's best."""
        raw = np.array([math.nan if tried.cost is None else tried.cost for tried in history], dtype=np.float64)
        if not (raw <= 0).any():
            raw = np.log(np.maximum(raw, 1e-9))
        if self._points.balance is not None:
            values = np.array([tried.point[self._points.balance] for tried in history], dtype=np.int64)
            for value in np.unique(values):
                same = values == value
                if not np.isnan(raw[same]).all():
                    raw[same] -= np.nanmin(raw[same])
        return raw

    def history(self, study: optuna.Study, but: int | None = None) -> list[Tried]:
        """What was tried in ``study``, in order, without trial number ``but``; running trials have the median cost.

        Raises:
            UsageError: if the study has several objectives.
        """
        if len(study.directions) != 1:
            raise UsageError(f"{type(self).__name__} minimizes or maximizes one value, not {len(study.directions)}")
        found: list[tuple[Tried, bool]] = []
        retried = 0
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.FAIL and self._retry:
                retried += 1
            elif trial.number in self._disregarded:
                continue
            elif trial.number != but and (tried := self._tried(study, trial)) is not None:
                found.append((tried, trial.state == TrialState.RUNNING))
        if (study.study_name, retried) != self._scanned:
            self._scanned = study.study_name, retried
            self._points.rewind()
        known = sorted(tried.cost for tried, _ in found if tried.cost is not None)
        middling = known[len(known) // 2] if known else None
        return [replace(tried, cost=middling) if running else tried for tried, running in found]

    def left(self, study: optuna.Study) -> bool:
        """Whether there is a valid point that ``study`` has not tried, nor is trying."""
        if not self._points.countable:
            return True
        return self._points.next_in_order({tried.point for tried in self.history(study)}) is not None

    def suggest(self, trial: optuna.Trial) -> Config:
        """The configuration that a trial is about, suggested as positions in the parameters' lists of values.

        Raises:
            optuna.TrialPruned: if no valid point is left.
        """
        self._point(trial.study, trial.number)
        params = self.space.params
        return self.space.at([trial.suggest_int(param.name, 0, len(param.values) - 1) for param in params])

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Choose the trial's point."""
        with self._one_at_a_time:
            point = self.propose(self.history(study, trial.number))
            self._given[study.study_name, trial.number] = point
            notes = self._last[2] if self._last else {}
            for key, value in notes.items():
                study._storage.set_trial_system_attr(trial._trial_id, _NOTES + key, value)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing: every parameter is handed out by :meth:`sample_independent`, however it is suggested."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing; see :meth:`infer_relative_search_space`."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The parameter of the trial's point: its position, or its value where that is what was suggested.

        Raises:
            UsageError: if the space has no such parameter, or it is suggested with other values.
            optuna.TrialPruned: if no valid point is left.
        """
        point = self._point(study, trial.number)
        param = self.space.param(param_name)
        values = _suggested(param, param_distribution)
        if values is None:
            raise UsageError(
                f"parameter {param_name!r} is suggested with other values than the space has: use "
                f"sampler.suggest(trial), or trial.suggest_categorical({param_name!r}, {list(param.values)})"
            )
        return values[point[self.space.params.index(param)]]

    def _point(self, study: optuna.Study, number: int) -> Point:
        point = self._given[study.study_name, number]
        if point is None:
            raise optuna.TrialPruned("every valid point of the space was tried")
        return point

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """End ``optimize`` when nothing is left."""
        with self._one_at_a_time:
            done = not (state == TrialState.FAIL and self._retry) and not self.left(study)
        if done:
            with suppress(RuntimeError):  # ask and tell: there is no loop to end
                study.stop()

    def _tried(self, study: optuna.Study, trial: FrozenTrial) -> Tried | None:
        """What a trial, of whatever sampler, says; ``None`` if it has no point in this space."""
        key = study.study_name, trial.number
        tried = self._finished.get(key)
        if tried is None:
            point = self._point_of(trial) or self._given.get(key)
            if point is None:
                return None
            said = trial.user_attrs
            tried = Tried(
                point, cost_of(trial, study.direction), _notes(trial), said.get(PARTS, {}), said.get(AT_FAULT, "")
            )
            if trial.state.is_finished():
                self._finished[key] = tried
        return tried

    def _point_of(self, trial: FrozenTrial) -> Point | None:
        """The point that a trial's parameters make, if they do."""
        point = []
        for param in self.space.params:
            values = _suggested(param, trial.distributions.get(param.name))
            if values is None or trial.params[param.name] not in values:
                return None
            point.append(values.index(trial.params[param.name]))
        return tuple(point)


def _suggested(param: Param, distribution: BaseDistribution | None) -> Sequence[Any] | None:
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


def cost_of(trial: FrozenTrial, direction: optuna.study.StudyDirection) -> float | None:
    """What a finished trial counts as, lower is better."""
    if trial.state != TrialState.COMPLETE or any(value > 0 for value in trial.constraints.values()):
        return None
    if trial.value is None or not math.isfinite(trial.value):
        return None
    return -trial.value if direction == optuna.study.StudyDirection.MAXIMIZE else trial.value


def _notes(trial: FrozenTrial) -> dict[str, Any]:
    return {key.removeprefix(_NOTES): value for key, value in trial.system_attrs.items() if key.startswith(_NOTES)}
