"""What to try next: a pure function of the history, the seed and the number of candidates tried so far.

Every sampler returns a valid point that was never tried, or ``None`` once none is found, so a search neither stalls on
duplicates nor spends anything on points that break the space's constraints. Because nothing but the history and the
seed goes in, a search that is killed and started again goes on exactly as if it had not been interrupted.

``tpe`` (the default) is a mix, not Optuna's TPESampler: a random start, then by turns a multivariate Parzen ratio (the
TPE criterion) and a Gaussian process's expected improvement. Both judge the same pool (random valid points and the
neighbours of the best ones) and then climb from the pool's best to better neighbours. ``gp`` is the same without the
Parzen turns. ``random`` is uniform without repetition, unless constraints leave so few valid points that only random
walks find them; ``grid`` walks the space in lexicographic order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.space import SearchSpace
from mctune.search.events import SAMPLERS
from mctune.search.surrogate import Array, Distances, GaussianProcess, ParzenRatio, Points

Point = tuple[int, ...]
Tried = tuple[Point, float | None]
"""A point and its milliseconds; ``None`` where the candidate failed."""

START = 24  # points, most of them random, before a model is asked
_POOL = 300  # random valid points in a pool
_DRAWS = 2048  # most draws to fill it with: constraints may leave few valid points
_LONE_DRAWS = 1024  # most draws for one random point
_WANDERERS = 24  # points of a pool that come from walks, where draws have found fewer
_STEPS_A_PARAMETER = 3  # of a walk
_SCANNED = 1 << 20  # points that are looked through for one that was not tried
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
        space: parameters; its default, if it has one and it is valid, is tried first (except by ``grid``).
        valid: whether a configuration meets the constraints; asked once a point.
        sampler: one of :data:`mctune.search.events.SAMPLERS`.
        seed: of every random choice.
        balance: name of a parameter whose values should be tried about equally often, each compared with its own
            best (a frontier over segment lengths needs a good configuration for each of them). The default is then
            tried with each of them.
        start: points before a model is asked; a short search cannot afford as many as a long one.
    """

    def __init__(
        self,
        space: SearchSpace,
        valid: Callable[[Config], bool],
        sampler: str,
        seed: int,
        balance: str | None = None,
        start: int = START,
    ) -> None:
        if sampler not in SAMPLERS:
            raise UsageError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
        self._space, self._valid, self._sampler, self._seed = space, valid, sampler, seed
        self._sizes = tuple(len(param.values) for param in space.params)
        self._balance = None if balance is None else space.params.index(space.param(balance))
        self._start = start
        self._known: dict[Point, bool] = {}
        self._rest = self._scan()
        self._head: Point | None = None
        distances = Distances(self._sizes, [param.ordered for param in space.params])
        self._gp, self._parzen = GaussianProcess(distances), ParzenRatio(distances)
        self._fitted: tuple[int, Array] | None = None

    def propose(self, history: Sequence[Tried]) -> Point | None:
        """A valid point that ``history`` has not, or ``None`` when there is none, or none to be found."""
        seen = {point for point, _ in history}
        step = len(history)
        if self._sampler == "grid":
            return self._next_in_order(seen)
        for default in self._defaults():
            if default not in seen:
                return default
        rng = np.random.default_rng([self._seed, step])
        point = None
        if self._sampler != "random" and step >= self._start:
            point = self._guided(history, seen, rng)
        for stratum in dict.fromkeys((self._stratum(step), None)):
            if point is None:
                point = next(iter(self._random(rng, seen, 1, _LONE_DRAWS, stratum)), None)
            if point is None:
                point = next(iter(self._wander(rng, seen, 1, stratum)), None)
        # Only where it ends: constraints may leave one valid point in millions.
        if point is None and math.prod(self._sizes) <= _SCANNED:
            return self._next_in_order(seen)
        return point

    def _stratum(self, step: int) -> tuple[int, int] | None:
        """Parameter and index that this step is confined to."""
        return None if self._balance is None else (self._balance, step % self._sizes[self._balance])

    def _defaults(self) -> Iterator[Point]:
        """The space's default, then the same with every other value of the balanced parameter; valid ones only."""
        config = self._space.default
        if any(p.name not in config or config[p.name] not in p.values for p in self._space.params):
            return
        point = self._space.indices(config)
        variants = [point]
        if self._balance is not None:
            b = self._balance
            variants += [(*point[:b], value, *point[b + 1 :]) for value in range(self._sizes[b]) if value != point[b]]
        yield from (variant for variant in variants if self._ok(variant))

    def _ok(self, point: Point) -> bool:
        known = self._known.get(point)
        if known is None:
            known = self._known[point] = self._valid(self._space.at(point))
        return known

    def _scan(self) -> Iterator[Point]:
        """Every valid point in lexicographic order; the invalid ones are not remembered."""
        return (point for point in np.ndindex(*self._sizes) if self._valid(self._space.at(point)))

    def _next_in_order(self, seen: set[Point]) -> Point | None:
        """The first valid point not in ``seen``. The scan never goes back: what it has passed was tried."""
        while self._head is None or self._head in seen:
            self._head = next(self._rest, None)
            if self._head is None:
                return None
        return self._head

    def _random(
        self, rng: np.random.Generator, seen: set[Point], count: int, draws: int, stratum: tuple[int, int] | None
    ) -> list[Point]:
        """Up to ``count`` different valid points not in ``seen``, each equally likely."""
        found: dict[Point, None] = {}
        batch = min(draws, 8 * count)
        for number in range(math.ceil(draws / batch)):
            if len(found) < number * batch / 256 and number * batch >= draws / 4:
                break  # constraints leave too few to be met like this
            drawn = rng.integers(0, self._sizes, size=(batch, len(self._sizes)))
            if stratum is not None:
                drawn[:, stratum[0]] = stratum[1]
            for point in map(tuple, drawn.tolist()):
                if point not in seen and self._ok(point):
                    found[point] = None
                    if len(found) == count:
                        return list(found)
        return list(found)

    def _wander(
        self, rng: np.random.Generator, seen: set[Point], count: int, stratum: tuple[int, int] | None
    ) -> list[Point]:
        """Up to ``count`` different valid points not in ``seen``, the ends of random walks over valid points.

        Where constraints leave so few valid points that draws do not meet them. A walk begins at a default or at a
        point that was tried, and changes up to three parameters a step.
        """
        starts = [point for point in (*self._defaults(), *sorted(seen)) if self._ok(point)]
        if stratum is not None:
            moved = ((*point[: stratum[0]], stratum[1], *point[stratum[0] + 1 :]) for point in starts)
            starts = [point for point in moved if self._ok(point)]
        free = [p for p, size in enumerate(self._sizes) if size > 1 and (stratum is None or p != stratum[0])]
        found: dict[Point, None] = {}
        if not starts or not free:
            return []
        for _ in range(2 * count + 8):
            point = starts[int(rng.integers(len(starts)))]
            steps = 0
            for _ in range(40 * len(free)):
                changed = list(point)
                for p in rng.choice(free, size=min(len(free), int(rng.integers(1, 4))), replace=False).tolist():
                    changed[p] = int(rng.integers(self._sizes[p]))
                if tuple(changed) != point and self._ok(tuple(changed)):
                    point, steps = tuple(changed), steps + 1
                if steps >= _STEPS_A_PARAMETER * len(free) and point not in seen:
                    break
            if point not in seen:
                found[point] = None
            if len(found) == count:
                break
        return list(found)

    def _neighbours(self, point: Point) -> Iterator[Point]:
        """Every point that differs in one parameter."""
        for p, size in enumerate(self._sizes):
            for value in range(size):
                if value != point[p]:
                    yield (*point[:p], value, *point[p + 1 :])

    def _guided(self, history: Sequence[Tried], seen: set[Point], rng: np.random.Generator) -> Point | None:
        """The model's favourite in a fresh pool; ``None`` if the pool is empty."""
        step = len(history)
        stratum = self._stratum(step)
        points, scores = self._learn(history)
        gain = self._model(history, points, scores, parzen=self._sampler == "tpe" and step % 2 == 0)

        def usable(point: Point) -> bool:
            inside = stratum is None or point[stratum[0]] == stratum[1]
            return inside and point not in seen and self._ok(point)

        pool = dict.fromkeys(self._random(rng, seen, _POOL, _DRAWS, stratum))
        if len(pool) < _WANDERERS:
            pool.update(dict.fromkeys(self._wander(rng, seen, _WANDERERS - len(pool), stratum)))
        for row in np.argsort(scores, kind="stable")[:_ELITES]:
            elite: Point = tuple(points[row].tolist())
            if stratum is not None:
                elite = (*elite[: stratum[0]], stratum[1], *elite[stratum[0] + 1 :])
            relatives = (self._relative(elite, rng) for _ in range(_RELATIVES))
            pool.update((point, None) for point in (elite, *self._neighbours(elite), *relatives) if usable(point))
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


def _standard(scores: Array) -> Array:
    """Scores clipped above at a quantile, with mean 0 and variance 1."""
    clipped = np.minimum(scores, np.quantile(scores, _CLIP))
    return np.asarray((clipped - clipped.mean()) / (clipped.std() + 1e-12))


def _highest(points: list[Point], gain: Callable[[Points], Array]) -> tuple[Point, float]:
    gains = gain(np.array(points, dtype=np.int64))
    row = int(np.argmax(gains))
    return points[row], float(gains[row])
