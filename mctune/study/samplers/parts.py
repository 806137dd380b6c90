"""What a study's trials say of each operation: the times of its block's settings, by the shared parameters' values.

A setting is the values of the shared parameters. Within one, the time of a pass is the sum of its blocks' times and of
what is no block's, so the best of each block, though no trial had them together, make a configuration whose time is
known before it is tried. How far such sums were off, where that was tried, is known too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mctune.core.config import Config
from mctune.core.outcome import Outcome, at_fault, cost, parts
from mctune.core.space import Block, SearchSpace
from mctune.study.feasible import Point
from mctune.study.samplers.reading import Tried

_LEAST_SUMS = 3
"""Fewer compositions say too little about whether operations add up."""
_RECENT = 9


@dataclass
class Known:
    """What is known of one block's values in one setting."""

    times: list[float] = field(default_factory=list)
    failed: int = 0
    """Trials that failed for all that is known because of them."""
    doubtful: int = 0
    """Trials that failed, perhaps because of another block."""

    @property
    def cost(self) -> float | None:
        """Their time; ``None`` where they failed."""
        return statistics.median(self.times) if self.times else None


@dataclass
class Setting:
    """The blocks of one setting of the shared parameters; ``points`` by their own values, in the order of trials."""

    point: Point
    """Some point of it."""
    blocks: tuple[Block, ...]
    points: list[dict[Point, Known]]
    rest: list[float] = field(default_factory=list)
    """What was no block's time, of each trial."""

    def best(self, block: int) -> tuple[float, Point] | None:
        """The best time of a block, and its values."""
        timed = [(known.cost, own) for own, known in self.points[block].items() if known.cost is not None]
        return min(timed) if timed else None

    def composed(self) -> float:
        """The time of the best of all blocks together; infinite where one has none."""
        if not self.rest:
            return math.inf
        best = [self.best(block) for block in range(len(self.blocks))]
        return statistics.median(self.rest) + sum(one[0] if one else math.inf for one in best)


class Parts:
    """The trials of a study, by setting and block.

    Args:
        space: with blocks.
        history: what was tried, in order. A trial whose parts are not known says nothing here unless it failed.
    """

    def __init__(self, space: SearchSpace, history: Sequence[Tried]) -> None:
        self._space = space
        self._places = {param.name: place for place, param in enumerate(space.params)}
        self._shared = tuple(self._places[name] for name in space.shared)
        self.settings: dict[Point, Setting] = {}
        self._sums: list[float] = []
        for tried in history:
            self._add(tried)

    def shared(self, point: Point) -> Point:
        """The setting of a point."""
        return tuple(point[place] for place in self._shared)

    def places(self, block: Block) -> tuple[int, ...]:
        """Where a block's parameters stand in a point."""
        return tuple(self._places[name] for name in block.params)

    def own(self, block: Block, point: Point) -> Point:
        """A block's values in a point."""
        return tuple(point[place] for place in self.places(block))

    def placed(self, point: Point, block: Block, own: Point) -> Point:
        """A point with other values of a block."""
        return _with(point, self.places(block), own)

    def moved(self, point: Sequence[int], setting: Setting) -> Point:
        """A point with a setting's values of the shared parameters."""
        return _with(point, self._shared, self.shared(setting.point))

    def setting(self, point: Point) -> Setting:
        """The setting that a point is in, an empty one if nothing of it was tried."""
        key = self.shared(point)
        if key not in self.settings:
            blocks = self._space.chain(self._space.at(point))
            self.settings[key] = Setting(point, blocks, [{} for _ in blocks])
        return self.settings[key]

    @property
    def misses(self) -> float | None:
        """By what share of the whole the sums of blocks were off, the median of the latest; ``None`` if too few."""
        return statistics.median(self._sums[-_RECENT:]) if len(self._sums) >= _LEAST_SUMS else None

    def _add(self, tried: Tried) -> None:
        setting = self.setting(tried.point)
        owns = [self.own(block, tried.point) for block in setting.blocks]
        known = [points.setdefault(own, Known()) for points, own in zip(setting.points, owns, strict=True)]
        if tried.cost is None:
            self._blame(setting, known, tried)
        elif tried.parts:
            if setting.rest and all(one.times for one in known):
                expected = statistics.median(setting.rest) + sum(one.cost or 0.0 for one in known)
                self._sums.append(abs(tried.cost - expected) / tried.cost)
            times = list(_times(setting.blocks, tried.parts))
            for one, ms in zip(known, times, strict=True):
                one.times.append(ms)
            setting.rest.append(tried.cost - sum(times))

    def _blame(self, setting: Setting, known: Sequence[Known], tried: Tried) -> None:
        """Lay a failure on the block that is at fault, or on the only one that was not seen to work."""
        suspects = [
            one
            for one, block in zip(known, setting.blocks, strict=True)
            if (tried.at_fault in block.operations if tried.at_fault else not one.times)
        ]
        for one in suspects:
            if len(suspects) == 1:
                one.failed += 1
            else:
                one.doubtful += 1


@dataclass(frozen=True)
class Judged:
    """What a study's trials say of a pass as a chain of operations.

    Attributes:
        variants: so many different ones of any operation were judged, one setting's apart from another's.
        misses: by what share of the whole the sums of blocks were off; ``None`` if too few say.
    """

    variants: int
    misses: float | None


def judged(space: SearchSpace, trials: Iterable[tuple[Config, Outcome]]) -> Judged | None:
    """The same of a study's trials; ``None`` of a pass that is no chain."""
    if len(space.blocks) < 2:
        return None
    history = [
        Tried(space.indices(config), cost(outcome), {}, parts(outcome), at_fault(outcome)) for config, outcome in trials
    ]
    known = Parts(space, history)
    return Judged(sum(len(points) for setting in known.settings.values() for points in setting.points), known.misses)


def _with(point: Sequence[int], places: Sequence[int], values: Sequence[int]) -> Point:
    changed = list(point)
    for place, value in zip(places, values, strict=True):
        changed[place] = value
    return tuple(changed)


def _times(blocks: Sequence[Block], parts: Mapping[str, float]) -> Iterator[float]:
    """The time of each block; an operation of several counts for the first of them."""
    left = dict(parts)
    for block in blocks:
        yield sum(left.pop(operation, 0.0) for operation in block.operations)
