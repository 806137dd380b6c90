"""Where a sampler may go: the valid points of a space that were not tried, at random, in order, or near another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from mctune.core.config import Config
from mctune.core.space import SearchSpace
from mctune.study.feasible import Feasible, Point, Stratum
from mctune.study.rules import Rule

_DRAWS = 1024  # most draws for one random point
_SCANNED = 1 << 20  # points that are looked through where constraints are only known to hold of whole ones
_FEW = 4  # times as many valid points as are wanted are gone through in order, to see whether there are more


class Points:
    """The valid points of ``space``.

    Args:
        space: parameters; its default, or the first of its fallbacks that is valid, is what a search begins with.
        rules: the constraints: what a configuration must meet, each for itself.
        balance: name of a parameter whose values are to be tried about equally often; see :meth:`strata`.
    """

    def __init__(self, space: SearchSpace, rules: Sequence[Rule], balance: str | None = None) -> None:
        self.space, self.feasible = space, Feasible(space, rules)
        self.sizes = tuple(len(param.values) for param in space.params)
        self.balance = None if balance is None else space.params.index(space.param(balance))
        self.defaults = tuple(self._defaults())
        """What a search begins with."""
        self._rest: dict[Stratum | None, Iterator[Point]] = {}
        self._head: dict[Stratum | None, Point | None] = {}
        self._few: dict[tuple[Stratum | None, int], Sequence[Point] | None] = {}

    def begin_with(self, configs: Sequence[Config]) -> None:
        """Have these follow the defaults: those that are valid points, in their order, none twice."""
        points = (self.space.indices(config) for config in configs if config in self.space)
        valid = (point for point in points if point in self.feasible)
        self.defaults = tuple(dict.fromkeys((*self.defaults, *valid)))

    def strata(self, tried: Sequence[Point]) -> list[tuple[Stratum | None, int]]:
        """Every value of the balanced parameter with how often it was tried, the least tried first."""
        if self.balance is None:
            return [(None, len(tried))]
        counts = [0] * self.sizes[self.balance]
        for point in tried:
            counts[point[self.balance]] += 1
        return [((self.balance, value), counts[value]) for value in sorted(range(len(counts)), key=counts.__getitem__)]

    def _defaults(self) -> Iterator[Point]:
        """The first default that is valid with each value of the balanced parameter, the default's own value first."""
        strata = [stratum for stratum, _ in self.strata(())]
        configs = [config for config in (self.space.default, *self.space.fallbacks) if config in self.space]
        if self.balance is not None and configs:
            own = self.space.indices(configs[0])[self.balance]
            strata.sort(key=lambda stratum: stratum is not None and stratum[1] != own)
        for stratum in strata:
            moved = (within(stratum, self.space.indices(config)) for config in configs)
            yield from itertools.islice((point for point in moved if point in self.feasible), 1)

    @property
    def countable(self) -> bool:
        """Whether the valid points can be gone through in order, to the last."""
        return self.feasible.settled or math.prod(self.sizes) <= _SCANNED

    def next_in_order(self, seen: AbstractSet[Point], stratum: Stratum | None = None) -> Point | None:
        """The first valid point not in ``seen``. The scan never goes back: what it has passed was tried."""
        if stratum not in self._rest:
            self._rest[stratum] = self.feasible.ordered(stratum)
            self._head[stratum] = next(self._rest[stratum], None)
        while self._head[stratum] in seen:
            self._head[stratum] = next(self._rest[stratum], None)
        return self._head[stratum]

    def rewind(self) -> None:
        """Begin the scans anew: something that they have passed is to be tried again."""
        self._rest.clear()

    def random(
        self,
        rng: np.random.Generator,
        seen: AbstractSet[Point],
        stratum: Stratum | None,
        count: int = 1,
        draws: int = _DRAWS,
    ) -> list[Point]:
        """Up to ``count`` different valid points not in ``seen``.

        They are drawn uniformly where nothing constrains the parameters, else each value evenly among those that leave
        a valid point, so that a formulation with few parameters of its own comes up as often as one with many. Where
        there are no more than ``count``, and that is soon seen, they are all of them, in order.
        """
        rest = self._all(stratum, _FEW * count) if count > 1 else None
        if rest is not None and len(free := [point for point in rest if point not in seen]) <= count:
            return free
        found: dict[Point, None] = {}
        batch = min(draws, 8 * count)
        for _ in range(math.ceil(draws / batch)):
            for drawn in map(tuple, rng.integers(0, self.sizes, size=(batch, len(self.sizes))).tolist()):
                point = self.feasible.repair(drawn, rng, stratum)
                if point is None or point in found or not self.free(point, seen, stratum):
                    continue
                found[point] = None
                if len(found) == count:
                    return list(found)
        return list(found)

    def _all(self, stratum: Stratum | None, most: int) -> Sequence[Point] | None:
        """Every valid point of a stratum, or ``None`` if there are more than ``most`` or that is not soon seen."""
        if not self.feasible.settled:
            return None
        if (stratum, most) not in self._few:
            points = tuple(itertools.islice(self.feasible.ordered(stratum), most + 1))
            self._few[stratum, most] = points if len(points) <= most else None
        return self._few[stratum, most]

    def free(self, point: Point, seen: AbstractSet[Point], stratum: Stratum | None) -> bool:
        """Whether a point is valid, of the stratum and not in ``seen``."""
        return point not in seen and point == within(stratum, point) and point in self.feasible

    def neighbours(self, point: Point) -> Iterator[Point]:
        """Every point, valid or not, that differs in one parameter."""
        for p, size in enumerate(self.sizes):
            for value in range(size):
                if value != point[p]:
                    yield (*point[:p], value, *point[p + 1 :])


def within(stratum: Stratum | None, point: Point) -> Point:
    """``point`` with the value that a stratum is confined to."""
    return point if stratum is None else (*point[: stratum[0]], stratum[1], *point[stratum[0] + 1 :])
