"""Which kernels of deep memories the tests compile: a few of each pass, and in the slow run every combination.

As in :mod:`tests.draw`, what is wanted is known at once; its configuration is drawn when a test asks for it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import cycle, product

import pytest

from mctune.backends.spaces import load_space
from mctune.core.config import Config, Scalar
from mctune.core.problem import AGGREGATIONS, PASSES, STATE_INITS, Problem
from mctune.core.problem import RECURRENCES as ALL
from mctune.core.space import SearchSpace
from mctune.runtime.kernels.support import served
from tests import draw

RECURRENCES = tuple(name for name, row in ALL.items() if row.deep)
SPACES = {row: load_space("tvm", "deep", row) for row in served(backend="tvm", family="deep")[0].passes}
WIDTHS = ((16, 16, 8), (20, 7, 3), (24, 24, 2), (7, 7, 3), (12, 20, 1), (48, 48, 1), (17, 17, 5))
"""Dk, Dv, E / Dk."""
WIDE = {"forward": (64, 64, 4), "backward": (32, 32, 2), "decode": (64, 64, 4)}
"""Of the first kernel of a pass: what only wide layers allow is drawn there. A backward of 64 compiles for a minute."""
SEGMENT_LENGTHS = (256, 100, 256, 24)
"""What kernels are tuned at: a chunk of tokens is no longer than that."""
COMBINATIONS = {
    "forward": (
        ("dla", "residual", "independent"), ("titans", "residual", "checkpoint"),
        ("dla", "grm", "checkpoint"), ("titans", "grm", "independent"),
        ("titans", "soup", "independent"), ("dla", "soup", "checkpoint"),
        ("titans", "ssc", "checkpoint"), ("dla", "ssc", "independent"),
        ("titans", "mean", "checkpoint"), ("dla", "mean", "independent"),
    ),
    "backward": (
        ("titans", "grm", "independent"), ("dla", "grm", "checkpoint"),
        ("dla", "residual", "independent"), ("dla", "soup", "independent"),
        ("titans", "ssc", "checkpoint"), ("dla", "ssc", "independent"),
        ("titans", "mean", "checkpoint"),
    ),
    "decode": (
        ("titans", "residual", "independent"), ("dla", "grm", "checkpoint"),
        ("titans", "grm", "independent"), ("dla", "soup", "independent"),
        ("titans", "soup", "checkpoint"), ("titans", "ssc", "checkpoint"),
        ("dla", "ssc", "independent"), ("dla", "mean", "checkpoint"),
    ),
}  # fmt: skip
"""Recurrence, aggregation and state init of those that are compiled in every run; the others are in the slow one."""
FIXED: dict[tuple[str, str, str, str], dict[str, Scalar]] = {
    ("backward", "titans", "grm", "independent"): {"groups": 4},
    ("backward", "dla", "grm", "checkpoint"): {"groups": 2},
    ("backward", "dla", "ssc", "independent"): {"saved": "nothing", "groups": 1},
    ("backward", "titans", "ssc", "checkpoint"): {"groups": 8},
}
"""What a few must have."""
_POOL, _STRIDE = 20, 45


class Wanted(draw.Wanted):
    """A kernel of a deep memory."""

    def __str__(self) -> str:
        p = self.problem
        return f"{p.recurrence}-{p.aggregation}-{p.state_init}-{p.Dk}x{p.E}x{p.Dv}-{self.target.arch}"

    @property
    def config(self) -> Config:
        return _configs(self.problem.pass_)[self.number]


@cache
def wanted(pass_: str) -> tuple[Wanted, ...]:
    """Those of every run, then the others; the same every time on a machine."""
    every = product(RECURRENCES, AGGREGATIONS, STATE_INITS)
    others = [one for one in every if one not in COMBINATIONS[pass_]]
    lengths, widths = cycle(SEGMENT_LENGTHS), cycle(WIDTHS)
    found = []
    for number, (recurrence, aggregation, state_init) in enumerate((*COMBINATIONS[pass_], *others)):
        Dk, Dv, expansion = next(widths) if number else WIDE[pass_]
        problem = Problem(
            pass_=pass_, recurrence=recurrence, aggregation=aggregation, state_init=state_init, T=64, H=1, Dk=Dk,
            Dv=Dv, expansion=expansion, segment_length=next(lengths), inner_chunk=8,
        )  # fmt: skip
        target = draw.CPUS[(number + number // 4) % len(draw.CPUS)]
        found.append(Wanted(number, problem, "", target))
    return tuple(found)


def parameters(pass_: str) -> list[object]:
    """For ``pytest.mark.parametrize``."""
    ordinary = len(COMBINATIONS[pass_])
    return [
        one if one.number < ordinary else pytest.param(one, marks=pytest.mark.slow, id=str(one))
        for one in wanted(pass_)
    ]


def ordinary(pass_: str) -> tuple[Wanted, ...]:
    """Those of every run."""
    return wanted(pass_)[: len(COMBINATIONS[pass_])]


def wanted_for(pass_: str, recurrence: str, aggregation: str, state_init: str) -> Wanted:
    """The kernel that is compiled for it anyway."""
    return next(one for one in ordinary(pass_) if one.combination == (recurrence, aggregation, state_init))


def start(space: SearchSpace, one: draw.Wanted) -> Config:
    """The default, or what it is shrunk to."""
    config = space.first_valid(lambda config: space.valid(config, one.problem, one.target))
    assert config is not None
    return config


# --- and how they are computed


@cache
def _configs(pass_: str) -> tuple[Config, ...]:
    """Of a few valid configurations far apart, the one with the most news: a value that few problems allow is more."""
    rng, space = random.Random(0), SPACES[pass_]
    pools = [list(_walk(rng, space, one)) for one in wanted(pass_)]
    allowing = Counter(item for pool in pools for item in {item for config in pool for item in config.items})
    chosen: list[Config] = []
    seen: set[tuple[str, Scalar]] = set()
    for pool in pools:
        chosen.append(max(pool, key=lambda config: sum(1 / allowing[item] for item in set(config.items) - seen)))
        seen |= set(chosen[-1].items)
    _complete(space, ordinary(pass_), chosen)
    return tuple(chosen)


def _complete(space: SearchSpace, drawn: tuple[Wanted, ...], chosen: list[Config]) -> None:
    """A value that none of them has takes the place of one that another has too."""
    for param in space.params:
        for value in param.values:
            having = Counter(chosen[one.number][param.name] for one in drawn)
            if value in having:
                continue
            for one in drawn:
                config = chosen[one.number].replace(**{param.name: value})
                fixed = FIXED.get((one.problem.pass_, *one.combination), {})
                spare = having[chosen[one.number][param.name]] > 1 and param.name not in fixed
                if spare and space.valid(config, one.problem, one.target):
                    chosen[one.number] = config
                    break


def _walk(rng: random.Random, space: SearchSpace, one: Wanted) -> Iterator[Config]:
    """Valid configurations, far apart on a random walk that changes one parameter at a time."""
    fixed = FIXED.get((one.problem.pass_, *one.combination), {})
    config = start(space, one).replace(**fixed)
    assert space.valid(config, one.problem, one.target)
    for step in range(1, _POOL * _STRIDE + 1):
        param = rng.choice(space.params)
        other = config.replace(**{param.name: rng.choice(param.values)})
        if param.name not in fixed and space.valid(other, one.problem, one.target):
            config = other
        if step % _STRIDE == 0:
            yield config


def hold_spread(pass_: str) -> None:
    """Every value of every parameter is drawn in every run, if one of the problems allows it."""
    space, drawn = SPACES[pass_], ordinary(pass_)
    for param in space.params:
        used = {one.config[param.name] for one in drawn}
        for value in set(param.values) - used:
            # Only what no drawn problem allows is missing.
            changed = [(one, one.config.replace(**{param.name: value})) for one in drawn]
            assert not any(space.valid(config, one.problem, one.target) for one, config in changed), (param.name, value)
    assert all(space.valid(one.config, one.problem, one.target) for one in wanted(pass_))


def hold_combinations(pass_: str) -> None:
    """Every combination is compiled; in every run, each recurrence, aggregation and state init meets two others."""
    assert {one.combination for one in wanted(pass_)} == set(product(RECURRENCES, AGGREGATIONS, STATE_INITS))
    few = {one.combination for one in ordinary(pass_)}
    assert len(few) == len(COMBINATIONS[pass_])
    assert {(recurrence, state_init) for recurrence, _, state_init in few} == set(product(RECURRENCES, STATE_INITS))
    assert {aggregation for _, aggregation, _ in few} == set(AGGREGATIONS)


assert set(SPACES) == set(PASSES)
