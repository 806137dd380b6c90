"""What to try next: a pure function of the history, the seed and the number of candidates tried so far.

Every sampler returns a valid point that was never tried, or ``None`` once none is left, so a search neither stalls on
duplicates nor spends anything on points that break the space's constraints. Because nothing but the history and the
seed goes in, a search that is killed and started again goes on exactly as if it had not been interrupted.

``tpe`` (the default) is a mix, not Optuna's TPESampler: a random start, then by turns a multivariate Parzen ratio (the
TPE criterion) and a Gaussian process's expected improvement. Both judge the same pool (random valid points and the
neighbours of the best ones) and then climb from the pool's best to better neighbours. ``gp`` is the same without the
Parzen turns. ``random`` draws without repetition: uniformly where nothing constrains the parameters, else each value
evenly among those that leave a valid point, so that a formulation with few parameters of its own comes up as often as
one with many. ``grid`` walks the space in lexicographic order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard

import numpy as np

from mctune.core.errors import UsageError
from mctune.core.space import SearchSpace
from mctune.study.events import SAMPLERS
from mctune.study.feasible import Feasible, Point, Stratum
from mctune.study.rules import Rule
from mctune.study.samplers.surrogate import Array, Distances, GaussianProcess, ParzenRatio, Points

Tried = tuple[Point, float | None]
"""A point and its milliseconds; ``None`` where the candidate failed."""

START = 24  # points, most of them random, before a model is asked
_POOL = 300  # random valid points in a pool
_DRAWS = 2048  # most draws to fill it with: most of what is valid may have been tried
_LONE_DRAWS = 1024  # most draws for one random point
_SCANNED = 1 << 20  # points that are looked through where constraints are only known to hold of whole ones
_ELITES = 3  # best points whose neighbours and relatives join the pool
_RELATIVES = 20  # points 2 or 3 changes away from each elite
_CLIMBS = 3
_REFIT = 10  # candidates between two fits of the Gaussian process's weights
_MODEL_MOST = 300  # points that a model sees: the cost of a proposal stays bounded in long searches
_FIT_MOST = 64  # points that the weights are fitted to: the expensive step, and small enough for one BLAS thread
_CLIP = 0.75  # slower than this quantile is all the same: a model should resolve the fast end


class Proposer:
    """Proposes points of ``space`` one after another.

    Args:
        space: parameters; its default, or the first of its fallbacks that is valid, is tried first (except by
            ``grid``).
        rules: the constraints: what a configuration must meet, each for itself.
        sampler: one of :data:`mctune.study.events.SAMPLERS`.
        seed: of every random choice.
        balance: name of a parameter whose values should be tried about equally often, each compared with its own
            best (a frontier over segment lengths needs a good configuration for each of them). Each value begins with
            a default of its own: the first that is valid with it.
        start: points before a model is asked; a short search cannot afford as many as a long one.
    """

    def __init__(
        self,
        space: SearchSpace,
        rules: Sequence[Rule],
        sampler: str,
        seed: int,
        balance: str | None = None,
        start: int = START,
    ) -> None:
        if sampler not in SAMPLERS:
            raise UsageError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
        self._space, self._feasible, self._sampler, self._seed = space, Feasible(space, rules), sampler, seed
        self._sizes = tuple(len(param.values) for param in space.params)
        self._balance = None if balance is None else space.params.index(space.param(balance))
        self._start = start
        self._rest: dict[Stratum | None, Iterator[Point]] = {}
        self._head: dict[Stratum | None, Point | None] = {}
        self._defaults = () if sampler == "grid" else tuple(self._own_defaults())
        distances = Distances(self._sizes, [param.ordered for param in space.params])
        self._gp, self._parzen = GaussianProcess(distances), ParzenRatio(distances)
        self._fitted: tuple[int, Array] | None = None

    def propose(self, history: Sequence[Tried]) -> Point | None:
        """A valid point that ``history`` has not, or ``None`` when there is none, or none to be found."""
        seen = {point for point, _ in history}
        if self._sampler == "grid":
            return self._next_in_order(seen, None)
        for default in self._defaults:
            if default not in seen:
                return default
        for stratum, tried in self._strata(history):
            # Drawn for each stratum by itself: one that has no more points changes nothing for the next.
            rng = np.random.default_rng([self._seed, len(history), *(stratum or ())])
            point = None
            if self._sampler != "random" and len(history) >= self._start:
                point = self._guided(history, seen, rng, stratum, parzen=self._sampler == "tpe" and tried % 2 == 0)
            if point is None:
                point = next(iter(self._random(rng, seen, 1, _LONE_DRAWS, stratum)), None)
            if point is None and (self._feasible.settled or math.prod(self._sizes) <= _SCANNED):
                point = self._next_in_order(seen, stratum)
            if point is not None:
                return point
        return None

    def _strata(self, history: Sequence[Tried]) -> list[tuple[Stratum | None, int]]:
        """Every value of the balanced parameter with how often it was tried, the least tried first."""
        if self._balance is None:
            return [(None, len(history))]
        tried = [0] * self._sizes[self._balance]
        for point, _ in history:
            tried[point[self._balance]] += 1
        return [((self._balance, value), tried[value]) for value in sorted(range(len(tried)), key=tried.__getitem__)]

    def _own_defaults(self) -> Iterator[Point]:
        """The first default that is valid with each value of the balanced parameter, the default's own value first."""
        strata = [stratum for stratum, _ in self._strata(())]
        configs = [config for config in (self._space.default, *self._space.fallbacks) if config in self._space]
        if self._balance is not None and configs:
            own = self._space.indices(configs[0])[self._balance]
            strata.sort(key=lambda stratum: stratum is not None and stratum[1] != own)
        for stratum in strata:
            moved = (_within(stratum, self._space.indices(config)) for config in configs)
            yield from itertools.islice((point for point in moved if point in self._feasible), 1)

    def _next_in_order(self, seen: set[Point], stratum: Stratum | None) -> Point | None:
        """The first valid point not in ``seen``. The scan never goes back: what it has passed was tried."""
        if stratum not in self._rest:
            self._rest[stratum] = self._feasible.ordered(stratum)
            self._head[stratum] = next(self._rest[stratum], None)
        while self._head[stratum] in seen:
            self._head[stratum] = next(self._rest[stratum], None)
        return self._head[stratum]

    def _random(
        self, rng: np.random.Generator, seen: set[Point], count: int, draws: int, stratum: Stratum | None
    ) -> list[Point]:
        """Up to ``count`` different valid points not in ``seen``."""
        found: dict[Point, None] = {}
        batch = min(draws, 8 * count)
        for _ in range(math.ceil(draws / batch)):
            for drawn in map(tuple, rng.integers(0, self._sizes, size=(batch, len(self._sizes))).tolist()):
                point = self._feasible.repair(drawn, rng, stratum)
                if point is not None and point not in seen and point in self._feasible:
                    found[point] = None
                    if len(found) == count:
                        return list(found)
        return list(found)

    def _neighbours(self, point: Point) -> Iterator[Point]:
        """Every point that differs in one parameter."""
        for p, size in enumerate(self._sizes):
            for value in range(size):
                if value != point[p]:
                    yield (*point[:p], value, *point[p + 1 :])

    def _guided(
        self,
        history: Sequence[Tried],
        seen: set[Point],
        rng: np.random.Generator,
        stratum: Stratum | None,
        *,
        parzen: bool,
    ) -> Point | None:
        """The model's favourite in a fresh pool; ``None`` if the pool is empty."""
        points, scores = self._learn(history)
        gain = self._model(history, points, scores, parzen=parzen)

        def usable(point: Point | None) -> TypeGuard[Point]:
            if point is None or point in seen or point != _within(stratum, point):
                return False
            return point in self._feasible

        pool = dict.fromkeys(self._random(rng, seen, _POOL, _DRAWS, stratum))
        for row in np.argsort(scores, kind="stable")[:_ELITES]:
            elite: Point = tuple(points[row].tolist())
            near = [elite, *self._neighbours(elite), *(self._relative(elite, rng) for _ in range(_RELATIVES))]
            repaired = (self._feasible.repair(point, rng, stratum) for point in near)
            pool.update((point, None) for point in repaired if usable(point))
        if not pool:
            return None
        best, height = _highest(list(pool), gain)
        for _ in range(_CLIMBS):
            around = [point for point in self._neighbours(best) if usable(point)]
            if not around:
                break
            higher, top = _highest(around, gain)
            if top <= height:
                break
            best, height = higher, top
        return best

    def _relative(self, point: Point, rng: np.random.Generator) -> Point:
        """``point`` with 2 or 3 parameters drawn anew."""
        changed = list(point)
        count = min(len(point), int(rng.integers(2, 4)))
        for p in rng.choice(len(point), size=count, replace=False).tolist():
            changed[p] = int(rng.integers(self._sizes[p]))
        return tuple(changed)

    def _learn(self, history: Sequence[Tried], most: int = _MODEL_MOST) -> tuple[Points, Array]:
        """Points and scores for the models: log milliseconds, clipped above; a failure scores like the slowest."""
        raw = np.array([math.nan if ms is None else math.log(max(ms, 1e-9)) for _, ms in history])
        points = np.array([point for point, _ in history], dtype=np.int64)
        if self._balance is not None:
            for index in np.unique(points[:, self._balance]):
                same = points[:, self._balance] == index
                if not np.isnan(raw[same]).all():
                    raw[same] -= np.nanmin(raw[same])
        worst = 0.0 if np.isnan(raw).all() else float(np.nanmax(raw)) + 1e-6
        scores = np.where(np.isnan(raw), worst, raw)
        if len(scores) > most:
            order = np.argsort(scores, kind="stable")
            half = most // 2
            spread = np.linspace(half, len(order) - 1, most - half).astype(np.int64)
            kept = np.sort(np.concatenate([order[:half], order[spread]]))
            points, scores = points[kept], scores[kept]
        return points, scores

    def _model(
        self, history: Sequence[Tried], points: Points, scores: Array, *, parzen: bool
    ) -> Callable[[Points], Array]:
        """The criterion that ranks a pool."""
        if parzen:
            self._parzen.condition(points, scores)
            return self._parzen.gain
        checkpoint = self._start + (len(history) - self._start) // _REFIT * _REFIT
        if self._fitted is None or self._fitted[0] != checkpoint:
            early, targets = self._learn(history[:checkpoint], _FIT_MOST)
            self._fitted = checkpoint, self._gp.fit(early, _standard(targets))
        self._gp.condition(points, _standard(scores), self._fitted[1])
        return self._gp.gain


def _within(stratum: Stratum | None, point: Point) -> Point:
    """``point`` with the value that a stratum is confined to."""
    return point if stratum is None else (*point[: stratum[0]], stratum[1], *point[stratum[0] + 1 :])


def _standard(scores: Array) -> Array:
    """Scores clipped above at a quantile, with mean 0 and variance 1."""
    clipped = np.minimum(scores, np.quantile(scores, _CLIP))
    return np.asarray((clipped - clipped.mean()) / (clipped.std() + 1e-12))


def _highest(points: list[Point], gain: Callable[[Points], Array]) -> tuple[Point, float]:
    gains = gain(np.array(points, dtype=np.int64))
    row = int(np.argmax(gains))
    return points[row], float(gains[row])
