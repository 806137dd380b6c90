"""Constraints as decision trees over the positions of parameters' values, found by asking each constraint.

A rule is asked about a configuration that has no values yet. The first value that it wants is a fork; it is asked again
with each of them, and so on, until it answers. So ``chunk % rows == 0`` becomes a tree of chunks and rows, and
``formulation == "gather" or panel == 1`` one that looks at the panel only where it matters. Nobody declares anything.

Equal trees are one node, a number; 0 is "no", 1 is "yes". So trees that are left after some parameters have values are
compared, and what is known about them found again, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from mctune.core.config import Config, Scalar
from mctune.core.space import SearchSpace

Rule = Callable[[Config], bool]
"""Whether a configuration meets one constraint. What it answers depends on nothing else."""

NO, YES = 0, 1
_MOST_QUESTIONS = 1 << 14  # asked of one rule


class _Wanted(Exception):
    """A rule reads a parameter that has no value yet."""


class _TooMuch(Exception):
    """A rule reads a configuration as a whole, or more combinations of values than a tree should have."""


class _Partial(Config):
    """A configuration some of whose parameters have no value yet."""

    def __init__(self, names: Mapping[str, int], values: Mapping[str, Scalar]) -> None:
        object.__setattr__(self, "_names", names)
        object.__setattr__(self, "_values", values)

    _names: Mapping[str, int]
    _values: Mapping[str, Scalar]

    @property
    def items(self) -> tuple[tuple[str, Scalar], ...]:
        raise _TooMuch

    def __getitem__(self, name: str) -> Scalar:
        if name in self._values:
            return self._values[name]
        if name in self._names:
            raise _Wanted(name)
        raise KeyError(f"no parameter {name!r} in this configuration; it has {', '.join(self._names)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __eq__(self, other: object) -> bool:
        raise _TooMuch

    def __hash__(self) -> int:
        raise _TooMuch


class Trees:
    """The decision trees of rules over the parameters of ``space``; a parameter is its position there."""

    def __init__(self, space: SearchSpace) -> None:
        self._params = space.params
        self._positions = {param.name: p for p, param in enumerate(space.params)}
        self._forks: list[tuple[int, tuple[int, ...]]] = [(-1, ()), (-1, ())]
        self._reads = [0, 0]
        self._numbers: dict[tuple[int, tuple[int, ...]], int] = {}
        self._cut: dict[tuple[int, int, int], int] = {}

    def of(self, rule: Rule) -> int | None:
        """The tree of a rule, or ``None`` where it would be too large or the rule reads configurations as a whole."""
        questions = 0

        def grow(values: dict[str, Scalar]) -> int:
            nonlocal questions
            questions += 1
            if questions > _MOST_QUESTIONS:
                raise _TooMuch
            try:
                return YES if rule(_Partial(self._positions, values)) else NO
            except _Wanted as wanted:
                (name,) = wanted.args
            p = self._positions[name]
            return self._fork(p, tuple(grow({**values, name: value}) for value in self._params[p].values))

        try:
            return grow({})
        except _TooMuch:
            return None

    def _fork(self, p: int, branches: tuple[int, ...]) -> int:
        """The node that looks at ``p``; where all branches are the same there is nothing to look at."""
        if branches.count(branches[0]) == len(branches):
            return branches[0]
        number = self._numbers.get((p, branches))
        if number is None:
            number = self._numbers[p, branches] = len(self._forks)
            self._forks.append((p, branches))
            reads = 1 << p
            for branch in branches:
                reads |= self._reads[branch]
            self._reads.append(reads)
        return number

    def first(self, node: int) -> int:
        """The parameter that a tree looks at first."""
        return self._forks[node][0]

    def reads(self, node: int) -> int:
        """The parameters that a tree looks at, bit ``p`` for parameter ``p``."""
        return self._reads[node]

    def given(self, node: int, p: int, value: int) -> int:
        """What is left of a tree when parameter ``p`` has the value at this position."""
        if not self._reads[node] >> p & 1:
            return node
        left = self._cut.get((node, p, value))
        if left is None:
            first, branches = self._forks[node]
            left = (
                branches[value]
                if first == p
                else self._fork(first, tuple(self.given(branch, p, value) for branch in branches))
            )
            self._cut[node, p, value] = left
        return left

    def expression(self, node: int) -> str:
        """A tree as a Python expression over the parameters' names: true where the rule says yes.

        Examples:
            >>> from mctune.core.space import Choice, Pow2
            >>> trees = Trees(SearchSpace((Pow2("rows", 1, 4), Choice("form", ("plain", "split")))))
            >>> rule = trees.of(lambda config: config["form"] == "plain" or config.integer("rows") > 1)
            >>> trees.expression(rule)
            "form == 'plain' or form == 'split' and rows in (2, 4)"
        """
        if node <= YES:
            return str(node == YES)
        p, branches = self._forks[node]
        name, values = self._params[p].name, self._params[p].values
        ways = []
        for branch in dict.fromkeys(branches):
            if branch == NO:
                continue
            found = [value for value, other in zip(values, branches, strict=True) if other == branch]
            test = f"{name} == {found[0]!r}" if len(found) == 1 else f"{name} in {tuple(found)!r}"
            rest = self.expression(branch) if branch != YES else ""
            ways.append(test + (f" and ({rest})" if " or " in rest else f" and {rest}" if rest else ""))
        return " or ".join(ways)

    def names(self, node: int) -> tuple[str, ...]:
        """The names of the parameters that a tree looks at."""
        return tuple(param.name for p, param in enumerate(self._params) if self._reads[node] >> p & 1)

    def answer(self, node: int, point: tuple[int, ...]) -> bool:
        """What the rule says of a point."""
        while node > YES:
            p, branches = self._forks[node]
            node = branches[point[p]]
        return node == YES
