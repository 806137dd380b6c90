"""All parameters together: a random start, then a Parzen ratio and a Gaussian process by turns.

The Parzen ratio is the criterion of TPE over whole points; the Gaussian process ranks by expected improvement. Both
judge the same pool (random valid points, and the neighbours of the best ones) and then climb from the pool's best to
better neighbours. So nothing has to be rounded or repaired after a model has spoken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from mctune.core.space import SearchSpace
from mctune.study.feasible import Point, Stratum
from mctune.study.rules import Rule
from mctune.study.samplers.discrete import DiscreteSampler
from mctune.study.samplers.model import Model
from mctune.study.samplers.reading import Tried
from mctune.study.samplers.surrogate import Array
from mctune.study.samplers.surrogate import Points as Matrix

START = 24  # points, most of them random, before a model is asked
_LEAST_START, _START_SHARE = 8, 5
_POOL = 300  # random valid points in a pool
_DRAWS = 2048  # most draws to fill it with: most of what is valid may have been tried
_ELITES = 3  # best points whose neighbours and relatives join the pool
_RELATIVES = 20  # points 2 or 3 changes away from each elite
_CLIMBS = 3


def start_of(trials: int) -> int:
    """How many points a search of so many trials begins with before a model is asked.

    Examples:
        >>> start_of(16), start_of(60), start_of(1000)
        (8, 12, 24)
    """
    return min(START, max(_LEAST_START, trials // _START_SHARE))


class MixSampler(DiscreteSampler):
    """A Parzen ratio and a Gaussian process by turns, over valid points alone.

    Args:
        start: points before a model is asked; a short search cannot afford as many as a long one.
        space, rules, seed, balance, retry_failed: see :class:`DiscreteSampler`.

    Examples:
        >>> import optuna
        >>> from mctune.core.space import Choice, Pow2
        >>> space = SearchSpace((Pow2("chunk", 16, 128), Choice("order", ("rows", "columns"))))
        >>> sampler = MixSampler(space, seed=0)
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(sampler=sampler)
        >>> study.optimize(lambda trial: 1 / sampler.suggest(trial).integer("chunk"), n_trials=100)
        >>> len(study.trials), study.best_value  # every valid point once
        (8, 0.0078125)
    """

    def __init__(
        self,
        space: SearchSpace,
        rules: Sequence[Rule] = (),
        *,
        seed: int | None = None,
        balance: str | None = None,
        retry_failed: bool = False,
        start: int = START,
    ) -> None:
        super().__init__(space, rules, seed=seed, balance=balance, retry_failed=retry_failed)
        self._start = start
        self._model = Model(self._points.sizes, [param.ordered for param in space.params], start)

    def choose(
        self,
        history: Sequence[Tried],
        seen: AbstractSet[Point],
        rng: np.random.Generator,
        stratum: Stratum | None,
        tried: int,
    ) -> tuple[Point | None, Mapping[str, Any]]:
        """The model's favourite in a fresh pool, after climbing; no point at the start, or if the pool is empty."""
        if len(history) < self._start:
            return None, {}
        points, scores = self._model.learn(*self._tried_so_far(history))
        gain = self._model.criterion(
            points, scores, lambda count: self._tried_so_far(history[:count]), len(history), parzen=tried % 2 == 0
        )
        pool = self._pool(points, scores, seen, rng, stratum)
        if not pool:
            return None, {}
        best, height = _highest(pool, gain)
        for _ in range(_CLIMBS):
            around = [point for point in self._points.neighbours(best) if self._points.free(point, seen, stratum)]
            if not around:
                break
            higher, top = _highest(around, gain)
            if top <= height:
                break
            best, height = higher, top
        return best, {}

    def _pool(
        self,
        points: Matrix,
        scores: Array,
        seen: AbstractSet[Point],
        rng: np.random.Generator,
        stratum: Stratum | None,
    ) -> list[Point]:
        """Random points, and what is near the best ones, all valid and not tried."""
        pool = dict.fromkeys(self._points.random(rng, seen, stratum, _POOL, _DRAWS))
        for row in np.argsort(scores, kind="stable")[:_ELITES]:
            elite: Point = tuple(points[row].tolist())
            near = [elite, *self._points.neighbours(elite), *(self._relative(elite, rng) for _ in range(_RELATIVES))]
            for point in near:
                repaired = self._points.feasible.repair(point, rng, stratum)
                if repaired is not None and self._points.free(repaired, seen, stratum):
                    pool[repaired] = None
        return list(pool)

    def _relative(self, point: Point, rng: np.random.Generator) -> Point:
        """``point`` with 2 or 3 parameters drawn anew."""
        changed = list(point)
        count = min(len(point), int(rng.integers(2, 4)))
        for p in rng.choice(len(point), size=count, replace=False).tolist():
            changed[p] = int(rng.integers(self._points.sizes[p]))
        return tuple(changed)

    def _tried_so_far(self, history: Sequence[Tried]) -> tuple[Matrix, Array]:
        """Points and their costs."""
        return np.array([tried.point for tried in history], dtype=np.int64), self.costs(history)


def _highest(points: list[Point], gain: Callable[[Matrix], Array]) -> tuple[Point, float]:
    gains = gain(np.array(points, dtype=np.int64))
    row = int(np.argmax(gains))
    return points[row], float(gains[row])
