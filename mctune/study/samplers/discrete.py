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
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.space import SearchSpace
from mctune.study.feasible import Point, Stratum
from mctune.study.rules import Rule
from mctune.study.samplers.points import Points
from mctune.study.samplers.reading import (
    AT_FAULT,
    FAILED,
    GAVE_WAY,
    NOTES,
    PARTS,
    Read,
    Tried,
    cost_of,
    notes_of,
    point_of,
    stored_as,
    values_of,
)


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
        self._read: dict[str, Read] = {}
        self._last: tuple[list[Tried], int, Point | None, Mapping[str, Any]] | None = None
        self._one_at_a_time = threading.Lock()

    def disregard(self, numbers: frozenset[int]) -> None:
        """Take no notice of the trials of these numbers: what they say is in doubt, and their points may come again."""
        if numbers != self._disregarded:
            self._disregarded = numbers
            self._points.rewind()
            self._read.clear()

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

    def propose(self, history: Sequence[Tried], salt: int = 0) -> Point | None:
        """A valid point that ``history`` has not, or ``None`` when there is none, or none to be found.

        Those who ask with one history and another ``salt`` get other random choices, so that workers who ask at the
        same moment seldom get the same point.
        """
        if self._last is None or self._last[1] != salt or self._last[0] != history:
            self._last = (list(history), salt, *self._propose(history, salt))
        return self._last[2]

    def _propose(self, history: Sequence[Tried], salt: int = 0) -> tuple[Point | None, Mapping[str, Any]]:
        seen = {tried.point for tried in history}
        for default in self._points.defaults:
            if default not in seen:
                return default, {}
        for stratum, count in self._points.strata([tried.point for tried in history]):
            # Drawn for each stratum by itself: one that has no more points changes nothing for the next.
            rng = np.random.default_rng([self._seed, len(history), *(stratum or ()), *([salt] if salt else ())])
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

    def history(
        self, study: optuna.Study, but: int | None = None, trials: Sequence[FrozenTrial] | None = None
    ) -> list[Tried]:
        """What was tried in ``study``, in order, without trial number ``but``; running trials have the median cost.

        ``trials`` are the study's, all of them, where the caller has just read them.

        Raises:
            UsageError: if the study has several objectives.
        """
        if len(study.directions) != 1:
            raise UsageError(f"{type(self).__name__} minimizes or maximizes one value, not {len(study.directions)}")
        trials = study.get_trials(deepcopy=False) if trials is None else trials
        read = self._reading(study, trials)
        found, freed, running = list(read.tried), read.freed, []
        for trial in trials[read.done :]:
            tried = None if trial.number == but else self._tried(study, trial)
            freed += self._frees(trial)
            if tried is not None:
                if trial.state == TrialState.RUNNING:
                    running.append(len(found))
                found.append(tried)
        if (study.study_name, freed) != self._scanned:
            self._scanned = study.study_name, freed
            self._points.rewind()
        if running:
            known = sorted(tried.cost for tried in found if tried.cost is not None)
            middling = known[len(known) // 2] if known else None
            for at in running:
                found[at] = replace(found[at], cost=middling)
        return found

    def _reading(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> Read:
        """What was read of the study before, and of its trials that have finished since, up to the first that runs."""
        read = self._read.setdefault(study.study_name, Read())
        if read.done > len(trials):  # another study of that name
            read = self._read[study.study_name] = Read()
        while read.done < len(trials) and trials[read.done].state.is_finished():
            trial = trials[read.done]
            if (tried := self._tried(study, trial)) is not None:
                read.tried.append(tried)
            read.freed += self._frees(trial)
            read.done += 1
        stored_as(self.space, trials, read.ranges)
        return read

    def left(self, study: optuna.Study) -> bool:
        """Whether there is a valid point that ``study`` has not tried, nor is trying."""
        if not self._points.countable:
            return True
        return self._points.next_in_order({tried.point for tried in self.history(study)}) is not None

    def suggest(self, trial: optuna.Trial) -> Config:
        """The configuration that a trial is about, suggested as categories: see :func:`stored_as`.

        Raises:
            optuna.TrialPruned: if no valid point is left.
        """
        self._point(trial.study, trial.number)
        ranges = self._reading(trial.study, trial.study.get_trials(deepcopy=False)).ranges
        found = []
        for param in self.space.params:
            match ranges[param.name]:
                case IntDistribution(low=low, high=high, step=step) as kept:
                    value: Any = trial.suggest_int(param.name, low, high, step=step)
                case kept:
                    value = trial.suggest_categorical(param.name, param.values)
            found.append((values_of(param, kept) or param.values).index(value))
        return self.space.at(found)

    def trial(
        self, study: optuna.Study, trials: Sequence[FrozenTrial], point: Point, user_attrs: Mapping[str, Any]
    ) -> FrozenTrial:
        """A running trial about the point that was proposed last, to be created in ``study``, which has ``trials``.

        One transaction creates it with all that it says; with ``ask`` and ``suggest`` each parameter is one.
        """
        known = self._reading(study, trials).ranges
        ranges = {
            param.name: known.get(param.name) or CategoricalDistribution(param.values) for param in self.space.params
        }
        stored = [values_of(param, ranges[param.name]) or param.values for param in self.space.params]
        notes = self._last[3] if self._last else {}
        return create_trial(
            state=TrialState.RUNNING,
            params={name: values[at] for name, values, at in zip(ranges, stored, point, strict=True)},
            distributions=ranges,
            constraints={FAILED: 0.0},
            user_attrs=dict(user_attrs),
            system_attrs={NOTES + key: value for key, value in notes.items()},
        )

    def begun(self, study: optuna.Study, number: int, point: Point) -> None:
        """Take notice that ``point`` has become trial ``number``."""
        self._given[study.study_name, number] = point

    def told(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """How a trial ended, for samplers that keep state."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Choose the trial's point."""
        with self._one_at_a_time:
            point = self.propose(self.history(study, trial.number))
            self._given[study.study_name, trial.number] = point
            notes = self._last[3] if self._last else {}
            for key, value in notes.items():
                study._storage.set_trial_system_attr(trial._trial_id, NOTES + key, value)

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
        values = values_of(param, param_distribution)
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
        self.told(study, trial, state, values)
        with self._one_at_a_time:
            done = not (state == TrialState.FAIL and self._retry) and not self.left(study)
        if done:
            with suppress(RuntimeError):  # ask and tell: there is no loop to end
                study.stop()

    def _tried(self, study: optuna.Study, trial: FrozenTrial) -> Tried | None:
        """What a trial, of whatever sampler, says; ``None`` if it has no point in this space, or may be tried again."""
        if (trial.state == TrialState.FAIL and self._retry) or trial.number in self._disregarded:
            return None
        point = point_of(self.space, trial) or self._given.get((study.study_name, trial.number))
        if point is None:
            return None
        said = trial.user_attrs
        cost, parts, at_fault = cost_of(trial, study.direction), said.get(PARTS, {}), said.get(AT_FAULT, "")
        return Tried(point, cost, notes_of(trial), parts, at_fault)

    def _frees(self, trial: FrozenTrial) -> bool:
        """Whether a trial's point may come again."""
        return trial.state == TrialState.FAIL and self._retry and GAVE_WAY not in trial.system_attrs
