"""Which backward kernels the tests compile: every combination and formulation, configurations spread over the space."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import cycle, product

from drawn import RECURRENCES, WIDTHS, Drawn, cpu_of, host

from mctune.backends.spaces import load_space
from mctune.core.config import Config, Scalar
from mctune.core.problem import AGGREGATIONS, STATE_INITS, Problem
from mctune.core.target import Target

SEGMENT_LENGTHS = (40, 130, 24)
SPACE = load_space("tvm", "matrix", "backward")
SAFE: dict[str, Scalar] = {
    "chunk": 16, "rows": 2, "cols": 16, "key_cols": 16, "unroll": 1, "panel": 1, "read_rows": 2, "read_lanes": 16,
    "score_rows": 2, "score_lanes": 16, "state_chunk": 32, "state_rows": 2, "state_cols": 16, "saved": "states",
}  # fmt: skip
"""Valid for every width, segment length and CPU."""
_POOL, _STRIDE = 20, 50


def formulations(aggregation: str) -> list[Scalar]:
    """Those that the search space allows."""
    problem = Problem(pass_="backward", aggregation=aggregation, T=64, H=1, Dk=16, Dv=16, segment_length=64)
    values = SPACE.param("formulation").values
    return [f for f in values if SPACE.valid(Config.of({**SAFE, "formulation": f}), problem, host())]


def settings() -> Iterator[tuple[str, str, str]]:
    """Aggregation, recurrence, state init: all of them but half of soup's, whose code is grm's."""
    for aggregation, recurrence, state_init in product(AGGREGATIONS, RECURRENCES, STATE_INITS):
        if aggregation != "soup" or (recurrence == "swla") == (state_init == "checkpoint"):
            yield aggregation, recurrence, state_init


def draw() -> list[Drawn]:
    """The same kernels every time on a machine: of a few random valid configurations, the one with most news."""
    rng = random.Random(0)
    shapes = cycle(product(SEGMENT_LENGTHS, WIDTHS))
    drawn: list[Drawn] = []
    seen: set[tuple[str, Scalar]] = set()
    for aggregation, recurrence, state_init in settings():
        for formulation in formulations(aggregation):
            segment_length, (Dk, Dv) = next(shapes)
            problem = Problem(
                pass_="backward", recurrence=recurrence, aggregation=aggregation, state_init=state_init,
                T=segment_length, H=1, Dk=Dk, Dv=Dv, segment_length=segment_length,
            )  # fmt: skip
            target = cpu_of(len(drawn))
            config = max(_walk(rng, problem, formulation, target), key=lambda c: len(set(c.items) - seen))
            seen |= set(config.items)
            drawn.append(Drawn(problem, config, target))
    return drawn


def _walk(rng: random.Random, problem: Problem, formulation: Scalar, target: Target) -> Iterator[Config]:
    """Valid configurations, far apart on a random walk that changes one parameter at a time."""
    config = Config.of({**SAFE, "formulation": formulation})
    assert SPACE.valid(config, problem, target)
    for step in range(1, _POOL * _STRIDE + 1):
        param = rng.choice(SPACE.params)
        other = config.replace(**{param.name: rng.choice(param.values)})
        if other["formulation"] == formulation and SPACE.valid(other, problem, target):
            config = other
        if step % _STRIDE == 0:
            yield config
