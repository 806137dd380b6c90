"""Which candidates the interpreter judges: every combination once, configurations spread over the space."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

from mctune.backends.protocol import Kernel
from mctune.backends.triton.backend import TritonBackend
from mctune.core.config import Config
from mctune.core.problem import AGGREGATIONS, STATE_INITS, Problem
from mctune.core.target import resolve

RECURRENCES = ("linear", "swla")
SHAPES = ((24, 40, 24), (16, 16, 32), (20, 33, 40), (64, 32, 16), (48, 80, 50), (7, 20, 33))
"""Dk, Dv, segment length."""
TARGET, _ = resolve("a100")
_STEPS, _PATIENCE = 60, 4000


@dataclass(frozen=True)
class Drawn:
    """A problem, and a configuration of its templates."""

    problem: Problem
    config: Config

    def __str__(self) -> str:
        p = self.problem
        how = f"-{self.config['formulation']}" if "formulation" in self.config else ""
        return f"{p.recurrence}-{p.aggregation}-{p.state_init}{how}-{p.Dk}x{p.Dv}-{p.dtype}"

    def kernel(self, folder: Path) -> Kernel:
        """The rendered candidate."""
        backend = TritonBackend()
        return backend.load(self.problem, self.config, backend.build(self.problem, self.config, TARGET, folder))


def draw(pass_: str) -> list[Drawn]:
    """One candidate for each recurrence, aggregation and state init; each pair of the first two meets both dtypes."""
    rng = random.Random(1)
    shapes = cycle(SHAPES)
    drawn = []
    for recurrence, aggregation in product(RECURRENCES, AGGREGATIONS):
        for state_init, dtype in zip(STATE_INITS, ("float32", "float16"), strict=True):
            Dk, Dv, C = next(shapes)
            problem = Problem(
                recurrence=recurrence, aggregation=aggregation, state_init=state_init, pass_=pass_, B=2,
                T=3 * C + 5, H=2, Dk=Dk, Dv=Dv, segment_length=C, dtype=dtype,
                top_k=2 if aggregation == "ssc" else None,
            )  # fmt: skip
            drawn.append(Drawn(problem, walk(rng, problem)))
    return drawn


def walk(rng: random.Random, problem: Problem, **fixed: str) -> Config:
    """A valid configuration, far along a random walk that changes one parameter at a time; ``fixed`` ones stay."""
    space = TritonBackend().space(problem)

    def valid(config: Config) -> bool:
        return space.valid(config, problem, TARGET)

    config = next(c.replace(**fixed) for c in (space.default, *space.fallbacks) if valid(c.replace(**fixed)))
    steps = 0
    for _ in range(_PATIENCE):
        param = rng.choice(space.params)
        other = config.replace(**{param.name: rng.choice(param.values)})
        if param.name not in fixed and other != config and valid(other):
            config, steps = other, steps + 1
        if steps == _STEPS:
            break
    return config
