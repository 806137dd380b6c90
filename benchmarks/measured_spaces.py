"""Spaces that were measured whole, by somebody else or by ``exhaust_space.py``: what a file of one says.

The schema is in the help of ``search_replay.py``.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

from mctune.core.config import Config, Scalar
from mctune.core.errors import UsageError
from mctune.core.outcome import Crashed, FailedBuild, Outcome, Timed
from mctune.core.space import Block, Choice, Int, Param, SearchSpace


@dataclass(frozen=True)
class Measured:
    """A space with every configuration's outcome, and rules that those meet; ``optimum`` in milliseconds."""

    name: str
    space: SearchSpace
    outcomes: Mapping[Config, Outcome]
    optimum: float
    rules: tuple[Callable[[Config], bool], ...] = ()


class Composed(Mapping[Config, Outcome]):
    """The outcomes of a pass whose blocks were measured: sums of ``times``, by block and its values, and ``rest``."""

    def __init__(self, blocks: Sequence[Block], times: Mapping[str, Mapping[Config, float]], rest: float) -> None:
        self.blocks, self.times, self.rest = blocks, times, rest

    def own(self, block: Block, config: Config) -> Config:
        """A block's values in a configuration."""
        return Config.of({name: config[name] for name in block.params})

    def rule(self, block: Block) -> Callable[[Config], bool]:
        """That a block's values were measured; it answers as soon as the first few of them say that they were not."""
        known = {
            tuple(own[name] for name in block.params[:count])
            for own in self.times[block.name]
            for count in range(len(block.params) + 1)
        }

        def holds(config: Config) -> bool:
            values: tuple[Scalar, ...] = ()
            for name in block.params:
                values += (config[name],)
                if values not in known:
                    return False
            return True

        return holds

    def __getitem__(self, config: Config) -> Outcome:
        parts = tuple((block.operations[0], self.times[block.name][self.own(block, config)]) for block in self.blocks)
        ms = self.rest + sum(one for _, one in parts)
        return Timed(ms, ms, ms, 1, 0.0, parts=parts)

    def __iter__(self) -> Iterator[Config]:
        for owns in product(*(self.times[block.name] for block in self.blocks)):
            yield Config.of(dict(chain.from_iterable(own.items for own in owns)))

    def __len__(self) -> int:
        return math.prod(len(self.times[block.name]) for block in self.blocks)


def load(path: Path | str) -> Measured:
    """Read one space, or of a pass in blocks the composed one; or the one that ``#`` names.

    Raises:
        UsageError: if the file is missing or is not such a space.
    """
    file, _, chosen = str(path).partition("#")
    path = Path(file)
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        document = json.loads(text)
        names = list(document["tune_params_keys"])
        listed = {name: document["tune_params"][name] for name in names}
        cache = document["cache"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a measured space: {error!r}; the schema is in this command's --help") from None
    space = SearchSpace(tuple(_param(name, listed[name]) for name in names))
    spelled = {name: {str(value): _scalar(value) for value in listed[name]} for name in names}
    outcomes: dict[Config, Outcome] = {}
    for key, record in cache.items():
        parts = dict(zip(names, key.split(","), strict=True))
        outcomes[Config.of({name: spelled[name][part] for name, part in parts.items()})] = _outcome(record)
    if "blocks" in document:
        again = {config for config, record in zip(outcomes, cache.values(), strict=True) if record.get("again")}
        return _composed(path, chosen, space, document["blocks"], outcomes, again)
    times = [outcome.ms for outcome in outcomes.values() if isinstance(outcome, Timed)]
    if not times:
        raise UsageError(f"{path}: no configuration has a time")
    return Measured(_name(path), space, outcomes, min(times), (outcomes.__contains__,))


def _name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".json")


def _composed(
    path: Path,
    chosen: str,
    space: SearchSpace,
    told: Mapping[str, Any],
    outcomes: Mapping[Config, Outcome],
    again: AbstractSet[Config],
) -> Measured:
    """A pass whose operations were measured: all of it, or one of its blocks; what was timed ``again`` counts alone."""
    blocks = [Block(name, tuple(one["operations"]), tuple(one["params"])) for name, one in told.items()]
    found: dict[str, dict[Config, dict[bool, list[float]]]] = {block.name: {} for block in blocks}
    rest = []
    for config, outcome in outcomes.items():
        if isinstance(outcome, Timed):
            taken = dict(outcome.parts)
            for block in blocks:
                own = Config.of({name: config[name] for name in block.params})
                times_of = found[block.name].setdefault(own, {True: [], False: []})
                times_of[config in again].append(sum(taken.get(one, 0.0) for one in block.operations))
            rest.append(outcome.ms - sum(taken.values()))
    times = {
        name: {own: statistics.median(each[True] or each[False]) for own, each in one.items()}
        for name, one in found.items()
    }
    if chosen:
        if chosen not in times:
            raise UsageError(f"{path} has no block {chosen!r}; it has {', '.join(times)}")
        alone = SearchSpace(
            tuple(space.param(name) for block in blocks if block.name == chosen for name in block.params)
        )
        single = {own: Timed(ms, ms, ms, 1, 0.0) for own, ms in times[chosen].items()}
        optimum = min(times[chosen].values())
        return Measured(f"{_name(path)}#{chosen}", alone, single, optimum, (single.__contains__,))
    params = tuple(space.param(name) for block in blocks for name in block.params)
    composed = Composed(blocks, times, statistics.median(rest))
    default = next(iter(outcomes))
    own_default = Config.of({param.name: default[param.name] for param in params})
    optimum = composed.rest + sum(min(one.values()) for one in times.values())
    whole = SearchSpace(params, default=own_default, blocks=tuple(blocks))
    return Measured(_name(path), whole, composed, optimum, tuple(composed.rule(block) for block in blocks))


def _scalar(value: Any) -> Scalar:
    return value if isinstance(value, bool | int | str) else str(value)


def _param(name: str, values: Sequence[Any]) -> Param:
    """Three or more numbers in order are an ordered parameter, anything else a choice."""
    ordered = len(values) > 2 and all(isinstance(v, int | float) for v in values) and list(values) == sorted(values)
    scalars = [_scalar(value) for value in values]
    if ordered and all(isinstance(scalar, int) for scalar in scalars):
        return Int(name, [int(scalar) for scalar in scalars])
    return Param(name, tuple(scalars), True) if ordered else Choice(name, scalars)


def _outcome(record: Mapping[str, Any]) -> Outcome:
    measured = record["time"]
    if isinstance(measured, str):
        return FailedBuild(measured) if "Compil" in measured else Crashed(measured)
    samples = sorted(record.get("times") or [measured])
    low, high = samples[len(samples) // 5], samples[-1 - len(samples) // 5]
    return Timed(float(measured), low, high, len(samples), 0.0, parts=tuple(record.get("parts", {}).items()))
