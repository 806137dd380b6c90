"""Optuna's samplers, and anybody's, over a constrained discrete space.

Left to themselves they ask for points that break constraints, and for the same point again; they forget failed trials;
a range that depends on another parameter is outside their models. So they never see the study: for every proposal they
get one of their own, in memory, whose trials are what was tried, with static ranges, failures as bad as the worst
and marked by a violated constraint. What they ask for is repaired where it is not valid, and gives way to a neighbour
where it was tried.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from mctune.core.errors import MctuneError
from mctune.core.space import SearchSpace
from mctune.study.feasible import Point, Stratum
from mctune.study.rules import Rule
from mctune.study.samplers.discrete import DiscreteSampler
from mctune.study.samplers.reading import FAILED, Tried, cost_of

_NOT_KEPT = ("constraints", "relative_params")  # in the names of notes that Optuna's samplers leave


class WrappedSampler(DiscreteSampler):
    """Another sampler, kept to valid points that were not tried.

    Args:
        make: the other sampler, given a seed.
        remembers: whether it keeps state of its own. Then it is made once, and told how each trial ended; a search
            that goes on in another process begins with a new one. Else it is made anew for every proposal, so that
            nothing but the trials and the seed decides. What it notes on its trials is kept in either case.
        blind: whether it takes no notice of what was tried, and need not be shown.
        asks: how often it is asked before a neighbour stands in for what was tried already or is not valid.
        categories: whether unordered parameters are categorical to it; else they are integers like the others.
        constraints: whether it learns from a violated constraint that a trial failed; in any case a failure is as bad
            as the worst.
        space, rules, seed, balance, retry_failed: see :class:`DiscreteSampler`.
    """

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        space: SearchSpace,
        rules: Sequence[Rule] = (),
        *,
        remembers: bool = False,
        blind: bool = False,
        asks: int = 10,
        categories: bool = True,
        constraints: bool = True,
        seed: int | None = None,
        balance: str | None = None,
        retry_failed: bool = False,
    ) -> None:
        super().__init__(space, rules, seed=seed, balance=balance, retry_failed=retry_failed)
        self._make, self._asks, self._constraints = make, asks, constraints
        self._one = make(self._seed) if remembers else None
        self._blind = blind
        self._to_tell: dict[Point, tuple[optuna.Study, optuna.Trial]] = {}
        self._frozen: dict[Point, tuple[Tried, float, bool | None, FrozenTrial]] = {}
        self._ranges: dict[str, BaseDistribution] = {
            param.name: _Positions(0, len(param.values) - 1)
            if param.ordered or not categories
            else _Categories(range(len(param.values)))
            for param in space.params
        }

    def choose(
        self,
        history: Sequence[Tried],
        seen: AbstractSet[Point],
        rng: np.random.Generator,
        stratum: Stratum | None,
        tried: int,
    ) -> tuple[Point | None, Mapping[str, Any]]:
        """What the other sampler asks for, or what is valid, near and not tried."""
        first: Point | None = None
        # A model of failures costs as much as one of times, so where nothing failed there is none.
        failed = self._constraints and any(tried.cost is None for tried in history)
        with _quiet():
            study = self._study(
                () if self._blind else history, self._one or self._make(int(rng.integers(1 << 31))), failed
            )
            for _ in range(self._asks):
                asked, wanted = self._ask(study)
                point = self._points.feasible.repair(wanted, rng, stratum)
                if point is None:
                    return None, {}
                if self._points.free(point, seen, stratum):
                    if self._one is not None:
                        self._to_tell[point] = study, asked
                    return point, _kept(study.get_trials(deepcopy=False)[-1].system_attrs)
                first = first or point
                if point not in seen and failed:
                    asked.set_constraint(FAILED, 1.0)
                self._tell(study, asked, None if point in seen else self._worst)
        around = self._points.neighbours(first) if first else ()
        free = [other for other in around if self._points.free(other, seen, stratum)]
        return (free[int(rng.integers(len(free)))] if free else None), {}

    def _ask(self, study: optuna.Study) -> tuple[optuna.Trial, Point]:
        try:
            asked = study.ask(self._ranges)
        except Exception as error:  # it may be anybody's
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise MctuneError(f"the sampler {type(study.sampler).__name__} failed: {what}; choose another") from error
        return asked, tuple(asked.params[name] for name in self._ranges)

    def _tell(self, study: optuna.Study, asked: optuna.Trial, cost: float | None) -> None:
        """How a trial ended; without a cost it is as if it had never been."""
        with suppress(RuntimeError):  # some end the loop when they have seen everything; there is none
            study.tell(asked, cost, state=TrialState.FAIL if cost is None else None)

    def told(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Let a sampler that keeps state know, too."""
        point = self._given.get((study.study_name, trial.number))
        if point in self._to_tell:
            finished = copy(trial)
            finished.state, finished.values = state, values
            cost = cost_of(finished, study.direction)
            with _quiet():
                self._tell(*self._to_tell.pop(point), self._worst if cost is None else cost)

    def _study(self, history: Sequence[Tried], sampler: BaseSampler, constrained: bool) -> optuna.Study:
        """A study in memory of what was tried."""
        costs = self.costs(history)
        failed = np.isnan(costs)
        self._worst = 0.0 if failed.all() else float(np.nanmax(costs))
        costs[failed] = self._worst
        storage = InMemoryStorage()
        study = optuna.create_study(storage=storage, sampler=sampler)
        number = storage.get_study_id_from_name(study.study_name)
        for tried, cost, bad in zip(history, costs.tolist(), failed.tolist(), strict=True):
            storage.create_new_trial(number, template_trial=self._trial(tried, cost, bad if constrained else None))
        return study

    def _trial(self, tried: Tried, cost: float, failed: bool | None) -> FrozenTrial:
        kept = self._frozen.get(tried.point)
        if kept is None or kept[:3] != (tried, cost, failed):
            trial = create_trial(
                value=cost,
                params=dict(zip(self._ranges, tried.point, strict=True)),
                distributions=self._ranges,
                system_attrs=dict(tried.notes),
                constraints=None if failed is None else {FAILED: float(failed)},
            )
            kept = self._frozen[tried.point] = tried, cost, failed, trial
        return kept[3]


class _Positions(IntDistribution):
    """Never changed, so a storage need not copy it; copies are most of what a study of a few hundred trials costs."""

    def __deepcopy__(self, memo: object) -> _Positions:
        return self


class _Categories(CategoricalDistribution):
    """The same for unordered parameters."""

    def __deepcopy__(self, memo: object) -> _Categories:
        return self


def _kept(notes: Mapping[str, Any]) -> dict[str, Any]:
    """What a sampler noted on a trial, less what it reads of running trials only."""
    return {key: value for key, value in notes.items() if not any(part in key for part in _NOT_KEPT)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's lines about studies that are made and remade for each proposal."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
