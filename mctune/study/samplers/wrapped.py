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
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import create_trial

from mctune.core.space import SearchSpace
from mctune.search.feasible import Point, Stratum
from mctune.search.rules import Rule
from mctune.study.samplers.discrete import DiscreteSampler, Tried

_NOT_KEPT = ("constraints", "relative_params")  # in the names of notes that Optuna's samplers leave


class WrappedSampler(DiscreteSampler):
    """Another sampler, kept to valid points that were not tried.

    Args:
        make: the other sampler, given a seed. It is made anew for every proposal, so that nothing but the trials and
            the seed decides; one that keeps state of its own is returned by ``make`` again and again.
        categories: whether unordered parameters are categorical to it; else they are integers like the others.
        space, rules, seed, balance, retry_failed: see :class:`DiscreteSampler`.
    """

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        space: SearchSpace,
        rules: Sequence[Rule] = (),
        *,
        categories: bool = True,
        seed: int | None = None,
        balance: str | None = None,
        retry_failed: bool = False,
    ) -> None:
        super().__init__(space, rules, seed=seed, balance=balance, retry_failed=retry_failed)
        self._make = make
        self._ranges: dict[str, BaseDistribution] = {
            param.name: IntDistribution(0, len(param.values) - 1)
            if param.ordered or not categories
            else CategoricalDistribution(range(len(param.values)))
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
        with _quiet():
            study = self._study(history, self._make(int(rng.integers(1 << 31))))
            asked = study.ask(self._ranges).params
            notes = study.get_trials(deepcopy=False)[-1].system_attrs
        point = self._points.feasible.repair(tuple(asked[name] for name in self._ranges), rng, stratum)
        kept = {key: value for key, value in notes.items() if not any(part in key for part in _NOT_KEPT)}
        return None if point is None else self._near(point, seen, rng, stratum), kept

    def _study(self, history: Sequence[Tried], sampler: BaseSampler) -> optuna.Study:
        """A study in memory of what was tried."""
        costs = self.costs(history)
        failed = np.isnan(costs)
        costs[failed] = 0.0 if failed.all() else np.nanmax(costs)
        study = optuna.create_study(storage=InMemoryStorage(), sampler=sampler)
        for tried, cost, bad in zip(history, costs.tolist(), failed.tolist(), strict=True):
            trial = create_trial(
                value=cost,
                params=dict(zip(self._ranges, tried.point, strict=True)),
                distributions=self._ranges,
                system_attrs=dict(tried.notes),
                # A model of failures costs as much as one of times.
                constraints={"failed": float(bad)} if failed.any() else None,
            )
            study.add_trial(trial)
        return study

    def _near(
        self, point: Point, seen: AbstractSet[Point], rng: np.random.Generator, stratum: Stratum | None
    ) -> Point | None:
        """``point``, or a neighbour if it was tried; ``None`` if all of them were."""
        if self._points.free(point, seen, stratum):
            return point
        around = [other for other in self._points.neighbours(point) if self._points.free(other, seen, stratum)]
        return around[int(rng.integers(len(around)))] if around else None


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
