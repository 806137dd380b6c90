"""The valid points of a space: constructed, not drawn until one is found.

Parameters get their values one after another, each among those that leave a valid point. Which ones do is settled by
the rules' trees: what is left of them after the values so far falls into groups that share no parameter, each group is
settled once, by trying the values of the parameter that most of its rules read, and what came of it is kept. In the
spaces of mctune a few parameters (the chunk, the formulation) decide about all others, so groups are small.

A rule that has no tree (it compares configurations as a whole, or reads too many parameters) is asked about whole
points only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mctune.core.space import SearchSpace
from mctune.study.rules import NO, YES, Rule, Trees

Point = tuple[int, ...]
"""Positions in the parameters' lists of values."""
Stratum = tuple[int, int]
"""A parameter, and the position of the value that it is confined to."""
_Group = frozenset[int]
_ASKED_MOST = 1 << 14
"""Points whose answers are kept, some 10 MiB: more than are drawn for a proposal or two."""


class Feasible:
    """The points of ``space`` that meet every one of ``rules``."""

    def __init__(self, space: SearchSpace, rules: Sequence[Rule]) -> None:
        self._space = space
        self._sizes = tuple(len(param.values) for param in space.params)
        self._trees = Trees(space)
        trees = [(rule, self._trees.of(rule)) for rule in rules]
        self._roots = frozenset(tree for _, tree in trees if tree is not None)
        self._whole = [rule for rule, tree in trees if tree is None]
        self._asked: dict[Point, bool] = {}
        self._settled: dict[_Group, tuple[int, dict[int, tuple[_Group, ...]]]] = {}
        self._begun: dict[Stratum | None, tuple[_Group, ...] | None] = {}

    @property
    def settled(self) -> bool:
        """Whether every rule has a tree, so that what :meth:`repair` makes and :meth:`ordered` yields is valid."""
        return not self._whole

    def __contains__(self, point: Point) -> bool:
        return all(self._trees.answer(root, point) for root in self._roots) and self._meets_whole(point)

    def _meets_whole(self, point: Point) -> bool:
        """Whether a point meets the rules that have no tree; they are asked once a point."""
        if not self._whole:
            return True
        answer = self._asked.get(point)
        if answer is None:
            config = self._space.at(point)
            if len(self._asked) >= _ASKED_MOST:  # a long search draws millions
                self._asked.clear()
            answer = self._asked[point] = all(rule(config) for rule in self._whole)
        return answer

    def repair(self, point: Point, rng: np.random.Generator, stratum: Stratum | None = None) -> Point | None:
        """``point``, with other values, drawn evenly, where its own leave no valid point; ``None`` if there is none.

        Parameters that most rules read are decided first. The repair of an evenly drawn point is drawn evenly too: each
        parameter among the values that those before it leave. Rules without a tree are not looked at.
        """
        return self._repaired(point, stratum, lambda p, values: values[int(rng.integers(len(values)))])

    def nearest(self, point: Point, stratum: Stratum | None = None) -> Point | None:
        """``point``, with the nearest other value where its own leaves no valid point; ``None`` if there is none.

        Nearest is by position where the parameter is ordered, else the first that is left. Nothing is drawn.
        """

        def choose(p: int, values: Sequence[int]) -> int:
            if not self._space.params[p].ordered:
                return values[0]
            return min(values, key=lambda value: (abs(value - point[p]), value))

        found = self._repaired(point, stratum, choose)
        return found if found is not None and self._meets_whole(found) else None

    def _repaired(
        self, point: Point, stratum: Stratum | None, choose: Callable[[int, Sequence[int]], int]
    ) -> Point | None:
        """``point``, with what is chosen (of a parameter, among these values) where its own value leaves nothing."""
        if stratum not in self._begun:
            self._begun[stratum] = self._groups(self._within(stratum))
        groups = self._begun[stratum]
        changed = list(point)
        if stratum is not None:
            changed[stratum[0]] = stratum[1]
        left = list(groups or ())
        while left:
            p, values = self._settle(left.pop())
            if changed[p] not in values:
                changed[p] = choose(p, list(values))
            left += values[changed[p]]
        return None if groups is None else tuple(changed)

    def ordered(self, stratum: Stratum | None = None) -> Iterator[Point]:
        """Every valid point, in lexicographic order."""
        return filter(self._meets_whole, self._from(self._within(stratum), (), stratum))

    def _from(self, rules: _Group, head: Point, stratum: Stratum | None) -> Iterator[Point]:
        """The points that begin with ``head`` and meet what is left of the rules after it."""
        if self._groups(rules) is None:
            return
        p = len(head)
        if p == len(self._sizes):
            yield head
            return
        for value in range(self._sizes[p]) if stratum is None or stratum[0] != p else (stratum[1],):
            yield from self._from(self._given(rules, p, value), (*head, value), stratum)

    def _within(self, stratum: Stratum | None) -> _Group:
        return self._roots if stratum is None else self._given(self._roots, *stratum)

    def _given(self, rules: _Group, p: int, value: int) -> _Group:
        """What is left of rules when a parameter has this value."""
        return frozenset(self._trees.given(rule, p, value) for rule in rules)

    def _groups(self, rules: _Group) -> tuple[_Group, ...] | None:
        """Rules in groups that share no parameter, or ``None`` if no values meet them all."""
        if NO in rules:
            return None
        groups: list[tuple[int, list[int]]] = []
        for rule in rules - {YES}:
            reads, group = self._trees.reads(rule), [rule]
            apart = []
            for other in groups:
                if other[0] & reads:
                    reads, group = reads | other[0], group + other[1]
                else:
                    apart.append(other)
            groups = [*apart, (reads, group)]
        # Sorted by first parameter: node numbers depend on what was asked before.
        found = tuple(frozenset(group) for _, group in sorted(groups, key=lambda group: group[0] & -group[0]))
        return found if all(self._settle(group)[1] for group in found) else None

    def _settle(self, group: _Group) -> tuple[int, dict[int, tuple[_Group, ...]]]:
        """A parameter of a group of rules, and its values that leave a valid point, with what is left after each."""
        settled = self._settled.get(group)
        if settled is None:
            p = self._decisive(group)
            left = ((value, self._groups(self._given(group, p, value))) for value in range(self._sizes[p]))
            settled = self._settled[group] = p, {value: groups for value, groups in left if groups is not None}
        return settled

    def _decisive(self, group: _Group) -> int:
        """The parameter that most rules read; of several, the one that most of them read first."""
        read, first = [0] * len(self._sizes), [0] * len(self._sizes)
        for rule in group:
            first[self._trees.first(rule)] += 1
            for p in range(len(self._sizes)):
                read[p] += self._trees.reads(rule) >> p & 1
        return max(range(len(self._sizes)), key=lambda p: (read[p], first[p], -p))
