"""The default: the operations of a pass, each tuned by itself, their best put together.

A pass is a chain of operations that share a few parameters and are otherwise apart; its time is the sum of theirs. So
every trial is one sample of each of its blocks: what one trial says of a read is as good for every other configuration
with that read. The models see one block at a time, a few parameters each, and a trial varies several blocks at once.
Every few trials the best of all blocks, which no trial has had together, are tried as a whole. Where wholes turn out
not to be such sums, blocks are left alone and all parameters are searched together, by :class:`MixSampler`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from mctune.core.space import Block, SearchSpace
from mctune.study.feasible import Point, Stratum
from mctune.study.rules import Rule
from mctune.study.samplers.mix import MixSampler
from mctune.study.samplers.model import Model
from mctune.study.samplers.parts import Parts, Setting
from mctune.study.samplers.points import within
from mctune.study.samplers.reading import Tried
from mctune.study.samplers.surrogate import Array
from mctune.study.samplers.surrogate import Points as Matrix

APART = 0.1
"""Off by more than this share of the whole, blocks are not searched one by one."""
_COMPOSE, _EXPLORE = 3, 4
"""Every third trial of a stratum puts the best together, if nothing has; every fourth looks at another setting."""
_OPTIMISM = 0.35
"""Logarithm of what a setting that was tried once may gain by tuning its blocks."""
_POOL, _DRAWS, _RELATIVES = 48, 256, 12
_RECENT, _FAILURES = 10, 2


class ChainSampler(MixSampler):
    """Blocks by themselves, as :class:`mctune.core.space.SearchSpace` says what they are; without any, all together.

    Args:
        space, rules, options: see :class:`MixSampler`.
    """

    def __init__(self, space: SearchSpace, rules: Sequence[Rule] = (), **options: Any) -> None:
        super().__init__(space, rules, **options)
        self._models: dict[tuple[str, ...], Model] = {}
        self._then: tuple[list[Tried], Parts] | None = None

    def choose(
        self,
        history: Sequence[Tried],
        seen: AbstractSet[Point],
        rng: np.random.Generator,
        stratum: Stratum | None,
        tried: int,
    ) -> tuple[Point | None, Mapping[str, Any]]:
        """The best of all blocks, or other values of some of them; no point at the start."""
        if len(self.space.blocks) < 2:
            return super().choose(history, seen, rng, stratum, tried)
        if len(history) < self._start:
            return None, {}
        parts = Parts(self.space, history)
        if parts.misses is not None and parts.misses > APART:
            return super().choose(history, seen, rng, stratum, tried)
        ranked = self._ranked(parts, stratum)
        if not ranked:
            return None, {}
        if tried % _COMPOSE == 0:
            for setting in ranked[:_COMPOSE]:
                composed = self._composed(parts, setting)
                if self._points.free(composed, seen, stratum):
                    return composed, {}
        setting = ranked[0]
        if tried % _EXPLORE == _EXPLORE - 1:
            setting = self._another(parts, ranked, rng, stratum) or setting
        point = self._varied(_Proposal(parts, history, rng, tried), setting, self._composed(parts, ranked[0]))
        return (point if point is not None and self._points.free(point, seen, stratum) else None), {}

    def _ranked(self, parts: Parts, stratum: Stratum | None) -> list[Setting]:
        """The settings of a stratum, the most promising first: by their composed times, less what tuning may gain."""
        found = []
        for setting in parts.settings.values():
            time = setting.composed()
            if setting.point == within(stratum, setting.point) and time < math.inf:
                found.append((math.log(max(time, 1e-9)) - _OPTIMISM / math.sqrt(len(setting.rest)), setting))
        return [setting for _, setting in sorted(found, key=lambda one: one[0])]

    def _composed(self, parts: Parts, setting: Setting) -> Point:
        """The best of every block of a setting."""
        point = setting.point
        for number, block in enumerate(setting.blocks):
            best = setting.best(number)
            if best is not None:
                point = parts.placed(point, block, best[1])
        return point

    def _another(
        self, parts: Parts, ranked: Sequence[Setting], rng: np.random.Generator, stratum: Stratum | None
    ) -> Setting | None:
        """A setting that was not tried, by what is known of those that were."""
        drawn = self._points.random(rng, set(), stratum, _POOL, _DRAWS)
        new = {parts.shared(point): point for point in drawn if parts.shared(point) not in parts.settings}
        if not new:
            return ranked[1] if len(ranked) > 1 else None
        keys = list(new)
        chosen = int(rng.integers(len(keys)))
        if len(ranked) >= _EXPLORE:
            known = np.array([parts.shared(setting.point) for setting in ranked], dtype=np.int64)
            costs = np.array([math.log(max(setting.composed(), 1e-9)) for setting in ranked])
            model = self._model_of(self.space.shared)
            gain = model.criterion(*model.learn(known, costs), lambda count: (known, costs), 0, parzen=True)
            chosen = int(np.argmax(gain(np.array(keys, dtype=np.int64))))
        return parts.setting(new[keys[chosen]])

    def _varied(self, proposal: _Proposal, setting: Setting, best: Point) -> Point | None:
        """A point of the setting in which some blocks have values that were not tried, the others their best."""
        parts, rng = proposal.parts, proposal.rng
        base = self._composed(parts, setting)
        if not setting.rest:  # nothing is known of it: what is best elsewhere is where to begin
            repaired = self._points.feasible.repair(parts.moved(best, setting), rng)
            if repaired is None or parts.shared(repaired) != parts.shared(setting.point):
                repaired = setting.point
            return repaired
        others = self._others(parts, setting, rng)
        point, varied = base, False
        for number in self._turns(proposal, setting):
            own = self._own(proposal, setting, number, base, others)
            if own is not None:
                placed = parts.placed(point, setting.blocks[number], own)
                if placed in self._points.feasible:
                    point, varied = placed, True
        return point if varied else None

    def _turns(self, proposal: _Proposal, setting: Setting) -> list[int]:
        """Which blocks have their turn: the longer they take, the more often; one alone where failures are unclear."""
        times = np.array([(setting.best(number) or (0.0,))[0] for number in range(len(setting.blocks))])
        shares = np.maximum(times / max(times.sum(), 1e-12), 0.02)
        recent = proposal.history[-_RECENT:]
        if sum(tried.cost is None and not tried.at_fault for tried in recent) > _FAILURES:
            return [int(proposal.rng.choice(len(shares), p=shares / shares.sum()))]
        drawn = proposal.rng.random(len(shares)) < 2 * len(shares) * shares
        return [int(number) for number in np.argsort(-shares) if drawn[number] or number == int(np.argmax(shares))]

    def _others(self, parts: Parts, setting: Setting, rng: np.random.Generator) -> list[Point]:
        """Random valid points of a setting."""
        key, found = parts.shared(setting.point), []
        for drawn in rng.integers(0, self._points.sizes, size=(_POOL, len(self._points.sizes))).tolist():
            repaired = self._points.feasible.repair(parts.moved(drawn, setting), rng)
            if repaired is not None and parts.shared(repaired) == key:
                found.append(repaired)
        return found

    def _own(
        self, proposal: _Proposal, setting: Setting, number: int, base: Point, others: Sequence[Point]
    ) -> Point | None:
        """Values of a block that were not tried in this setting, the model's favourite; ``None`` if there are none."""
        parts, block = proposal.parts, setting.blocks[number]
        tried = setting.points[number]
        pool: dict[Point, None] = {}
        for own in (*self._near(proposal, setting, number), *(parts.own(block, point) for point in others)):
            if own not in tried and parts.placed(base, block, own) in self._points.feasible:
                pool[own] = None
        if not pool:
            return None
        key = parts.shared(setting.point)
        model = self._model_of((*self.space.shared, *block.params))
        points, costs = self._data(parts, block)
        if len(points) < 2 or np.isnan(costs).all():
            return next(iter(pool))
        gain = model.criterion(
            *model.learn(points, costs), lambda count: self._early(proposal, count, block), len(proposal.history),
            parzen=proposal.tried % 2 == 0,
        )  # fmt: skip
        candidates = list(pool)
        return candidates[int(np.argmax(gain(np.array([(*key, *own) for own in candidates], dtype=np.int64))))]

    def _near(self, proposal: _Proposal, setting: Setting, number: int) -> Iterator[Point]:
        """What is best of a block in other settings; neighbours of what is best in this one, and relatives."""
        block, rng = setting.blocks[number], proposal.rng
        sizes = [self._points.sizes[place] for place in proposal.parts.places(block)]
        for other in proposal.parts.settings.values():
            same = [index for index, one in enumerate(other.blocks) if one.params == block.params]
            if same and (best := other.best(same[0])) is not None:
                yield best[1]
        own = setting.best(number)
        if own is None or not sizes:
            return
        for place, size in enumerate(sizes):
            for value in range(size):
                yield (*own[1][:place], value, *own[1][place + 1 :])
        for _ in range(_RELATIVES):
            changed = list(own[1])
            for place in rng.choice(len(sizes), size=min(len(sizes), int(rng.integers(2, 4))), replace=False).tolist():
                changed[place] = int(rng.integers(sizes[place]))
            yield tuple(changed)

    def _data(self, parts: Parts, block: Block) -> tuple[Matrix, Array]:
        """What was tried of a block in every setting, with logarithms of times above each stratum's best."""
        rows = [
            (setting, (*parts.shared(setting.point), *own), known)
            for setting in parts.settings.values()
            for index, one in enumerate(setting.blocks)
            if one.params == block.params
            for own, known in setting.points[index].items()
            if known.times or known.failed
        ]
        costs = self.costs(
            [Tried(one.point, None if known.cost is None else max(known.cost, 1e-9)) for one, _, known in rows]
        )
        width = len(self.space.shared) + len(block.params)
        return np.array([row for _, row, _ in rows], dtype=np.int64).reshape(len(rows), width), costs

    def _early(self, proposal: _Proposal, count: int, block: Block) -> tuple[Matrix, Array]:
        """The same of the first ``count`` trials."""
        first = list(proposal.history[:count])
        if self._then is None or self._then[0] != first:
            self._then = first, Parts(self.space, first)
        points, costs = self._data(self._then[1], block)
        return (points, costs) if len(points) else self._data(proposal.parts, block)

    def _model_of(self, names: tuple[str, ...]) -> Model:
        """The model over parameters of these names."""
        if names not in self._models:
            params = [self.space.param(name) for name in names]
            sizes = [len(param.values) for param in params]
            self._models[names] = Model(sizes, [param.ordered for param in params], self._start)
        return self._models[names]


class _Proposal:
    """One proposal at work: what was tried, as trials and by block, and how often in its stratum."""

    def __init__(self, parts: Parts, history: Sequence[Tried], rng: np.random.Generator, tried: int) -> None:
        self.parts, self.history, self.rng, self.tried = parts, history, rng, tried
