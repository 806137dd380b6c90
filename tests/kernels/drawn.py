"""Which kernels the tests compile: every combination once, every formulation, configurations spread over the space."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, product

import torch

from mctune.backends.protocol import Kernel
from mctune.backends.spaces import load_space
from mctune.core.config import Config, Scalar
from mctune.core.problem import AGGREGATIONS, STATE_INITS, Problem
from mctune.core.target import Target, resolve
from mctune.verify.inputs import Inputs
from mctune.verify.judge import judge, run_kernel
from tests.instruction_sets import cpus

RECURRENCES = ("linear", "swla")
WIDTHS = ((16, 16), (20, 7), (64, 48), (32, 64), (48, 32), (7, 20), (64, 96))
SEGMENT_LENGTHS = (64, 100, 24, 256)
CPUS = cpus()
EXTRA = 3
"""Kernels beyond one for each (recurrence, aggregation, state init) and each (recurrence, formulation) of ssc."""
_POOL, _STRIDE = 20, 40
SAFE: dict[str, Scalar] = {
    "chunk": 16, "rows": 2, "cols": 16, "unroll": 1, "panel": 1, "loop_order": "rows_outer", "parallel": "segment",
    "score_rows": 2, "score_lanes": 16, "state_chunk": 32, "state_rows": 2, "state_cols": 16,
}  # fmt: skip
"""Valid for every width, segment length and CPU."""


@dataclass(frozen=True)
class Drawn:
    """One kernel: the problem that it is built for, its configuration, and the CPU that it is compiled for."""

    problem: Problem
    config: Config
    target: Target

    def __str__(self) -> str:
        p, formulation = self.problem, f"-{self.config['formulation']}" if "formulation" in self.config else ""
        return f"{p.recurrence}-{p.aggregation}-{p.state_init}{formulation}-{p.Dk}x{p.Dv}-{self.target.arch}"


def host() -> Target:
    """The CPU that this runs on."""
    return resolve("cpu")[0]


def cpu_of(number: int) -> Target:
    """The CPUs that this one can be take turns; shifted in every fourth kernel, as the other choices take turns too."""
    return CPUS[(number + number // 4) % len(CPUS)]


def y_of(kernel: Kernel, problem: Problem, inputs: Inputs) -> torch.Tensor:
    """What a forward kernel computes."""
    return run_kernel(kernel, problem, inputs)["y"]


def judged(problem: Problem, seed: int) -> tuple[Inputs, torch.Tensor]:
    """Inputs of a forward, and the oracle's y for them."""
    case = judge(problem, seed)
    return case.inputs, case.wanted["y"]


def plain(problem: Problem, **changes: Scalar) -> Config:
    """A configuration that is valid for the problem."""
    config = Config.of({**SAFE, "chunk": 32, "formulation": formulations(problem)[0], **changes})
    assert load_space("tvm", "matrix", "forward").valid(config, problem, host())
    return config


def formulations(problem: Problem) -> list[Scalar]:
    """Those that the search space allows for the problem's aggregation."""
    space = load_space("tvm", "matrix", "forward")
    rule = next(constraint for constraint in space.constraints if constraint.name == "formulation")
    values = space.param("formulation").values
    return [f for f in values if rule.holds(space.default.replace(formulation=f), problem, host())]


def draw() -> list[Drawn]:
    """The same kernels every time on a machine: of a few random valid configurations, the one with most news."""
    rng = random.Random(0)
    shapes = cycle(product(SEGMENT_LENGTHS, WIDTHS))
    wanted: list[tuple[Problem, Scalar]] = []
    for aggregation in AGGREGATIONS:
        for number, (recurrence, state_init) in enumerate(product(RECURRENCES, STATE_INITS)):
            problem = _problem(next(shapes), recurrence, aggregation, state_init)
            some = formulations(problem)
            # 0 1 1 0 of two: each recurrence and each state init meets both.
            turn = number if len(some) > 2 else number ^ number >> 1
            wanted.append((problem, some[turn % len(some)]))
    for recurrence, formulation in product(RECURRENCES, formulations(_problem((64, (16, 16)), "linear", "ssc"))):
        if not any(p.recurrence == recurrence and p.aggregation == "ssc" and f == formulation for p, f in wanted):
            wanted.append((_problem(next(shapes), recurrence, "ssc"), formulation))
    for _ in range(EXTRA):
        problem = _problem(next(shapes), *(rng.choice(c) for c in (RECURRENCES, AGGREGATIONS, STATE_INITS)))
        wanted.append((problem, rng.choice(formulations(problem))))
    drawn: list[Drawn] = []
    seen: set[tuple[str, Scalar]] = set()
    for number, (problem, formulation) in enumerate(wanted):
        target = cpu_of(number)
        config = max(_walk(rng, problem, formulation, target), key=lambda c: len(set(c.items) - seen))
        seen |= set(config.items)
        drawn.append(Drawn(problem, config, target))
    return drawn


def _problem(
    shape: tuple[int, tuple[int, int]], recurrence: str, aggregation: str, state_init: str = "independent"
) -> Problem:
    segment_length, (Dk, Dv) = shape
    return Problem(
        recurrence=recurrence, aggregation=aggregation, state_init=state_init, T=segment_length, H=1, Dk=Dk, Dv=Dv,
        segment_length=segment_length,
    )  # fmt: skip


def _walk(rng: random.Random, problem: Problem, formulation: Scalar, target: Target) -> Iterator[Config]:
    """Valid configurations, far apart on a random walk that changes one parameter at a time."""
    space = load_space("tvm", "matrix", "forward")
    config = Config.of({**SAFE, "formulation": formulation})
    assert space.valid(config, problem, target)
    for step in range(1, _POOL * _STRIDE + 1):
        param = rng.choice(space.params)
        other = config.replace(**{param.name: rng.choice(param.values)})
        if other["formulation"] == formulation and space.valid(other, problem, target):
            config = other
        if step % _STRIDE == 0:
            yield config
