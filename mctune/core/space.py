"""A search space is data: typed parameters with static ranges, and named constraints with reasons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mctune.core.config import Config, Scalar
from mctune.core.errors import UsageError
from mctune.core.problem import Problem
from mctune.core.target import Target


@dataclass(frozen=True)
class Param:
    """A parameter with a finite, static list of values; ``ordered`` says that neighbours in the list are alike.

    Raises:
        UsageError: if there is no value, or one twice.
    """

    name: str
    values: tuple[Scalar, ...]
    ordered: bool
    help: str = ""

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) != len(self.values):
            raise UsageError(f"parameter {self.name!r} needs at least one value and no value twice: {self.values}")


def Pow2(name: str, low: int, high: int, help: str = "") -> Param:
    """Powers of two from ``low`` to ``high``, both included.

    Examples:
        >>> Pow2("chunk", 16, 64).values
        (16, 32, 64)
    """
    return Param(name, tuple(1 << e for e in range(low.bit_length() - 1, high.bit_length())), True, help)


def Int(name: str, values: Sequence[int], help: str = "") -> Param:
    """Integers in increasing order."""
    return Param(name, tuple(values), True, help)


def Choice(name: str, values: Sequence[Scalar], help: str = "") -> Param:
    """Values without an order."""
    return Param(name, tuple(values), False, help)


@dataclass(frozen=True)
class Constraint:
    """``holds(config, problem, target)`` must be true; ``reason`` completes "rejected because ..."."""

    name: str
    holds: Callable[[Config, Problem, Target], bool]
    reason: str


@dataclass(frozen=True)
class Block:
    """Parameters that only some operations of a pass read: what those take depends on them and on the shared ones.

    Args:
        name: of the block.
        operations: the templates whose times are the block's. One that is in several reads the parameters of all, and
            its time is the first one's.
        params: names of its parameters.
        when: values of shared parameters with which a pass has this block; with any values if there are none.

    Examples:
        >>> block = Block("read", ("read_forward",), ("rows",), {"parallel": ("head",)})
        >>> block.active(Config.of({"parallel": "head", "rows": 4}))
        True
    """

    name: str
    operations: tuple[str, ...]
    params: tuple[str, ...]
    when: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)

    def active(self, config: Config) -> bool:
        """Whether a pass of this configuration has the block."""
        return all(config[name] in values for name, values in self.when.items())


@dataclass(frozen=True)
class SearchSpace:
    """Parameters and constraints: the configurations that a template can be built with.

    Args:
        params: their names are different.
        constraints: what every valid configuration meets.
        default: where a search begins.
        fallbacks: take the default's place, in order, where it breaks a constraint (another CPU, other widths).
        before: what a configuration meant that was found before a parameter was added to the space.
        renamed: what a parameter was called before, by its name now: several may have been one.
        blocks: the operations of the pass, each with the parameters that are its own. A parameter of no block is
            shared: it says what crosses from one operation to the next.

    Raises:
        UsageError: if a parameter is named twice, or a block has one that there is not.

    Examples:
        >>> space = SearchSpace((Pow2("chunk", 16, 64), Choice("order", ("rows", "columns"))))
        >>> space.size
        6
        >>> print(space.at((1, 0)))
        chunk=32 order=rows
    """

    params: tuple[Param, ...]
    constraints: tuple[Constraint, ...] = ()
    default: Config = field(default_factory=lambda: Config(()))
    fallbacks: tuple[Config, ...] = ()
    before: Config = field(default_factory=lambda: Config(()))
    renamed: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        names = [param.name for param in self.params]
        if len(set(names)) != len(names):
            raise UsageError(f"a search space names a parameter twice: {names}")
        for block in self.blocks:
            if absent := [name for name in (*block.params, *block.when) if name not in names]:
                raise UsageError(f"block {block.name!r} names {absent[0]!r}, which the space does not have")

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the parameters that are no block's own."""
        owned = {name for block in self.blocks for name in block.params}
        return tuple(param.name for param in self.params if param.name not in owned)

    def chain(self, config: Config) -> tuple[Block, ...]:
        """The blocks that a pass of ``config`` has, in order."""
        return tuple(block for block in self.blocks if block.active(config))

    def seen_by(self, operation: str, config: Config) -> Config:
        """What an operation sees of a configuration: shared parameters and those of its block."""
        own = {name for block in self.chain(config) if operation in block.operations for name in block.params}
        names = own.union(self.shared)
        return Config(tuple(item for item in config.items if item[0] in names))

    @property
    def size(self) -> int:
        """Number of points before constraints."""
        return math.prod(len(param.values) for param in self.params)

    def param(self, name: str) -> Param:
        """The parameter of that name.

        Raises:
            UsageError: if there is none.
        """
        for param in self.params:
            if param.name == name:
                return param
        raise UsageError(f"no parameter {name!r}; the space has {', '.join(p.name for p in self.params)}")

    def broken(self, config: Config, problem: Problem, target: Target) -> tuple[Constraint, ...]:
        """The constraints that ``config`` does not meet, in the space's order."""
        return tuple(c for c in self.constraints if not c.holds(config, problem, target))

    def valid(self, config: Config, problem: Problem, target: Target) -> bool:
        """Whether ``config`` meets every constraint."""
        return all(c.holds(config, problem, target) for c in self.constraints)

    def checked(self, config: Config, problem: Problem, target: Target) -> Config:
        """``config`` with every parameter of the space, those that were added or renamed later as it meant them.

        Raises:
            ValueError: if one is missing that was always there, or a constraint is not met.
        """
        known = config.to_dict()
        meant = {now: known[name] for now, name in self.renamed.items() if name in known}
        missing = [param.name for param in self.params if param.name not in known]
        if unknown := [name for name in missing if name not in meant and name not in self.before]:
            raise ValueError(f"{config} has no {', '.join(unknown)}; search the problem again")
        gone = set(self.renamed.values()).difference(param.name for param in self.params)
        added = {name: meant[name] if name in meant else self.before[name] for name in missing}
        config = Config.of({name: value for name, value in (known | added).items() if name not in gone})
        if broken := self.broken(config, problem, target):
            raise ValueError(f"{broken[0].name}: {broken[0].reason} ({config})")
        return config

    def at(self, indices: Sequence[int]) -> Config:
        """The configuration at these positions in the parameters' lists of values."""
        return Config.of({p.name: p.values[i] for p, i in zip(self.params, indices, strict=True)})

    def indices(self, config: Config) -> tuple[int, ...]:
        """The inverse of :meth:`at`.

        Raises:
            KeyError, ValueError: if ``config`` is not a point of the space.
        """
        values = config.to_dict()
        return tuple(param.values.index(values[param.name]) for param in self.params)

    def __contains__(self, config: object) -> bool:
        """Whether a configuration is a point of the space, valid or not."""
        if not isinstance(config, Config):
            return False
        values = config.to_dict()
        return len(values) == len(self.params) and all(
            param.name in values and values[param.name] in param.values for param in self.params
        )

    def with_param(self, param: Param, default: Scalar) -> SearchSpace:
        """A larger space, with one more parameter and its default."""
        first, *others = (config.replace(**{param.name: default}) for config in (self.default, *self.fallbacks))
        return replace(self, params=(*self.params, param), default=first, fallbacks=tuple(others))

    def first_valid(self, ok: Callable[[Config], bool]) -> Config | None:
        """The default, or the first of its fallbacks, that ``ok`` accepts."""
        return next((config for config in (self.default, *self.fallbacks) if ok(config)), None)

    def nearest(self, problem: Problem, target: Target) -> tuple[Constraint, ...]:
        """The constraints that are not met by that default or fallback which meets most of them."""
        return min((self.broken(one, problem, target) for one in (self.default, *self.fallbacks)), key=len)

    def points(self) -> Iterator[Config]:
        """Every configuration, before constraints, in lexicographic order."""
        for values in itertools.product(*(param.values for param in self.params)):
            yield Config.of(dict(zip((param.name for param in self.params), values, strict=True)))

    def chained(self, operations: Mapping[str, tuple[str, ...]], shared: Sequence[str] = ()) -> SearchSpace:
        """The same space in blocks, one for each prefix of parameters' names, but for the ``shared`` ones.

        ``operations``: by prefix, the templates whose times are the block's.
        """
        names = [param.name for param in self.params if param.name not in shared]
        blocks = (
            Block(prefix, own, tuple(name for name in names if name.startswith(f"{prefix}_")))
            for prefix, own in operations.items()
        )
        return replace(self, blocks=tuple(blocks))

    def fixed(self, **values: Sequence[Scalar]) -> SearchSpace:
        """A smaller space: each named parameter keeps only the given values.

        Raises:
            UsageError: for an unknown parameter, or a value that the space does not have.
        """
        for name, kept in values.items():
            absent = [value for value in kept if value not in self.param(name).values]
            if absent:
                raise UsageError(f"{name}={absent[0]!r} is not in the space; it has {self.param(name).values}")
        params = tuple(Param(p.name, tuple(values.get(p.name, p.values)), p.ordered, p.help) for p in self.params)
        return replace(self, params=params)
