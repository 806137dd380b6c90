"""Which kernels the tests compile: every combination once, every formulation, configurations spread over the spaces.

What is wanted is known at once, so that pytest can collect it; its configuration is drawn when a test asks for it. For
a matrix memory soup is grm (``tests/test_soup.py``): one draw of a pass is for it, to see that it is served.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, product

from mctune.backends import get_backend
from mctune.backends.spaces import load_space
from mctune.core.config import Config, Scalar
from mctune.core.problem import AGGREGATIONS, STATE_INITS, Problem
from mctune.core.space import SearchSpace
from mctune.core.target import Target, resolve
from mctune.verify import spread
from tests.instruction_sets import cpus

RECURRENCES = ("linear", "swla")
DISTINCT = tuple(aggregation for aggregation in AGGREGATIONS if aggregation != "soup")
CPUS = cpus()
SPACES = {pass_: load_space("tvm", "matrix", pass_) for pass_ in ("forward", "backward", "decode")}
SAFE: dict[str, dict[str, Scalar]] = {
    "forward": {
        "chunk": 16, "rows": 2, "cols": 16, "unroll": 1, "panel": 1, "loop_order": "rows_outer", "parallel": "segment",
        "score_rows": 2, "score_lanes": 16, "state_chunk": 32, "state_rows": 2, "state_cols": 16,
    },
    "backward": {
        "chunk": 16, "saved": "states", "state_chunk": 32, "state_rows": 2, "state_cols": 16,
        "dq_rows": 2, "dq_key_cols": 16, "dq_unroll": 1, "dq_read_rows": 2, "dq_read_lanes": 16, "dq_score_rows": 2,
        "dq_score_lanes": 16, "dq_state_rows": 2, "dq_state_cols": 16,
        "dstates_chunk": 32, "dstates_rows": 2, "dstates_cols": 16, "dstates_panel": 1,
        "dkv_rows": 2, "dkv_cols": 16, "dkv_key_cols": 16, "dkv_unroll": 1, "dkv_score_rows": 2, "dkv_score_lanes": 16,
        "dkv_state_rows": 2, "dkv_state_cols": 16,
    },
    "decode": {"split": 1, "cols": 16, "rows": 1, "streams": 1, "prefetch": 0},
}  # fmt: skip
"""Valid for every width, segment length and CPU."""
WIDTHS = ((16, 16), (20, 7), (64, 48), (32, 64), (48, 32), (7, 20), (64, 96))
DECODE_WIDTHS = ((16, 16), (20, 7), (64, 48), (17, 33), (1, 1), (7, 192), (33, 256))
SEGMENT_LENGTHS = {"forward": (64, 100, 24, 256), "backward": (40, 130, 24), "decode": (16,)}
EXTRA = 3
"""Forward kernels beyond one for each recurrence, aggregation, state init and each recurrence, formulation of ssc."""
_POOL, _STRIDE = 20, 45


@dataclass(frozen=True)
class Wanted:
    """A problem that a kernel is built for, how it is computed where that is chosen, and the CPU to compile for."""

    number: int
    problem: Problem
    formulation: Scalar
    target: Target

    def __str__(self) -> str:
        p, formulation = self.problem, f"-{self.formulation}" if self.formulation else ""
        return f"{p.recurrence}-{p.aggregation}-{p.state_init}{formulation}-{p.Dk}x{p.Dv}-{self.target.arch}"

    @property
    def config(self) -> Config:
        return _configs(self.problem.pass_)[self.number]

    @property
    def combination(self) -> tuple[str, str, str]:
        return self.problem.recurrence, self.problem.aggregation, self.problem.state_init


def host() -> Target:
    """The CPU that this runs on."""
    return resolve("cpu")[0]


def formulations(pass_: str, aggregation: str) -> list[Scalar]:
    """Those that the search space allows."""
    if pass_ == "decode":
        return [""]
    space = SPACES[pass_]
    problem = Problem(pass_=pass_, aggregation=aggregation, T=64, H=1, Dk=16, Dv=16, segment_length=64)
    values = space.param("formulation").values
    return [f for f in values if space.valid(Config.of({**SAFE[pass_], "formulation": f}), problem, host())]


def plain(problem: Problem, **changes: Scalar) -> Config:
    """A configuration of the forward that is valid for the problem."""
    chosen = formulations("forward", problem.aggregation)[0]
    config = Config.of({**SAFE["forward"], "chunk": 32, "formulation": chosen, **changes})
    assert SPACES["forward"].valid(config, problem, host())
    return config


def wanted_for(pass_: str, recurrence: str, aggregation: str, state_init: str) -> Wanted:
    """The kernel that is compiled for it anyway."""
    return next(one for one in wanted(pass_) if one.combination == (recurrence, aggregation, state_init))


@cache
def wanted(pass_: str) -> tuple[Wanted, ...]:
    """The same every time on a machine."""
    # Seven widths and three or four lengths meet all of each other, by turns.
    shapes = zip(cycle(SEGMENT_LENGTHS[pass_]), cycle(DECODE_WIDTHS if pass_ == "decode" else WIDTHS), strict=False)
    found = []
    for recurrence, aggregation, state_init, formulation in _COMBINATIONS[pass_]():
        segment_length, (Dk, Dv) = next(shapes)
        problem = Problem(
            pass_=pass_, recurrence=recurrence, aggregation=aggregation, state_init=state_init, H=1, Dk=Dk, Dv=Dv,
            T=64 if pass_ == "decode" else segment_length, segment_length=segment_length,
        )  # fmt: skip
        # The CPUs that this one can be take turns; shifted in every fourth kernel, as the other choices take turns too.
        target = CPUS[(len(found) + len(found) // 4) % len(CPUS)]
        found.append(Wanted(len(found), problem, formulation, target))
    return tuple(found)


def interpreted(pass_: str, target: Target, dtypes: Sequence[str]) -> list[spread.Drawn]:
    """Triton's: each pair of recurrence and aggregation meets both dtypes; soup once for all matrix memories."""
    drawn = [_lighter(one, target) for one in spread.draw(pass_, target, dtypes)]
    once = next(one for one in drawn if one.problem.aggregation == "soup")
    return [one for one in drawn if one.problem.aggregation != "soup" or one.problem.deep or one is once]


def _lighter(one: spread.Drawn, target: Target) -> spread.Drawn:
    """Sixteen splits are more than there are states in any case; each is a program to interpret.

    So is a block of hidden units of a deep memory, and few of them say as much.
    """
    given = one.config.to_dict()
    changes: dict[str, Scalar] = {}
    most = 4 if one.problem.deep else 16
    splits = given.get("decode_SPLITS", 0)
    if isinstance(splits, int) and splits > most:
        changes["decode_SPLITS"] = most
    if one.problem.deep:
        changes |= {name: 32 for name, value in given.items() if name.endswith("_EB") and value == 16}
    space = get_backend("triton").space(one.problem)
    for name, value in changes.items():
        config = one.config.replace(**{name: value})
        if space.valid(config, one.problem, target):
            one = spread.Drawn(one.problem, config)
    return one


# --- which combinations


def _forward() -> Iterator[tuple[str, str, str, Scalar]]:
    met: set[tuple[str, str, Scalar]] = set()
    for aggregation in DISTINCT:
        some = formulations("forward", aggregation)
        for number, (recurrence, state_init) in enumerate(product(RECURRENCES, STATE_INITS)):
            # 0 1 1 0 of two: each recurrence and each state init meets both.
            turn = number if len(some) > 2 else number ^ number >> 1
            met.add((recurrence, aggregation, some[turn % len(some)]))
            yield recurrence, aggregation, state_init, some[turn % len(some)]
    for recurrence, formulation in product(RECURRENCES, formulations("forward", "ssc")):
        if (recurrence, "ssc", formulation) not in met:
            yield recurrence, "ssc", "independent", formulation
    yield "swla", "soup", "checkpoint", formulations("forward", "soup")[-1]
    rng = random.Random(0)
    for _ in range(EXTRA):
        recurrence, aggregation, state_init = (rng.choice(c) for c in (RECURRENCES, DISTINCT, STATE_INITS))
        yield recurrence, aggregation, state_init, rng.choice(formulations("forward", aggregation))


def _backward() -> Iterator[tuple[str, str, str, Scalar]]:
    for aggregation, recurrence, state_init in product(DISTINCT, RECURRENCES, STATE_INITS):
        for formulation in formulations("backward", aggregation):
            yield recurrence, aggregation, state_init, formulation
    yield "linear", "soup", "independent", formulations("backward", "soup")[0]


def _decode() -> Iterator[tuple[str, str, str, Scalar]]:
    """All of grm and ssc; residual and mean, of one code, share."""
    for aggregation, recurrence, state_init in product(DISTINCT, RECURRENCES, STATE_INITS):
        alike = (recurrence == "swla") == (state_init == "checkpoint")
        if aggregation in ("grm", "ssc") or alike == (aggregation == "mean"):
            yield recurrence, aggregation, state_init, ""
    yield "linear", "soup", "checkpoint", ""


_COMBINATIONS = {"forward": _forward, "backward": _backward, "decode": _decode}


# --- and how they are computed


@cache
def _configs(pass_: str) -> tuple[Config, ...]:
    """The most different ones of the valid configurations, or of a few of them far apart."""
    rng, space = random.Random(0), SPACES[pass_]
    pools = [list(_points(space, one) if pass_ == "decode" else _walk(rng, space, one)) for one in wanted(pass_)]
    # Where all are known, a value that few of the problems allow is the greater news.
    allowing = Counter(item for pool in pools for item in {item for config in pool for item in config.items})
    weight = {item: 1 / count if pass_ == "decode" else 1.0 for item, count in allowing.items()}
    chosen: list[Config] = []
    seen: set[tuple[str, Scalar]] = set()
    for pool in pools:
        shuffled = rng.sample(pool, len(pool))
        chosen.append(max(shuffled, key=lambda config: sum(weight[item] for item in set(config.items) - seen)))
        seen |= set(chosen[-1].items)
    return tuple(chosen)


def _points(space: SearchSpace, one: Wanted) -> Iterator[Config]:
    return (config for config in space.points() if space.valid(config, one.problem, one.target))


def _walk(rng: random.Random, space: SearchSpace, one: Wanted) -> Iterator[Config]:
    """Valid configurations, far apart on a random walk that changes one parameter at a time."""
    config = Config.of({**SAFE[one.problem.pass_], "formulation": one.formulation})
    assert space.valid(config, one.problem, one.target)
    for step in range(1, _POOL * _STRIDE + 1):
        param = rng.choice(space.params)
        other = config.replace(**{param.name: rng.choice(param.values)})
        if other["formulation"] == one.formulation and space.valid(other, one.problem, one.target):
            config = other
        if step % _STRIDE == 0:
            yield config
