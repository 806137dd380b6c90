"""Every space has a default for every problem and target that it has any valid configuration for."""

from __future__ import annotations

import random
import secrets
import time

from mctune.backends import get_backend, makers
from mctune.core.errors import UsageError
from mctune.core.problem import AGGREGATIONS, Problem
from mctune.core.target import targets
from mctune.study.feasible import Feasible

WIDTHS = (1, 7, 16, 17, 32, 33, 64, 65, 100, 128, 129, 200, 256)
SECONDS, SEED = 4.0, secrets.randbits(32)


def drawn(rng: random.Random) -> Problem:
    while True:
        segmentation, aggregation = (
            rng.choice(("constant", "constant", "logarithmic", "packed")),
            rng.choice([*AGGREGATIONS]),
        )
        try:
            return Problem(
                recurrence=rng.choice(("linear", "swla")),
                aggregation=aggregation,
                segmentation=segmentation,
                state_init=rng.choice(("independent", "checkpoint")),
                pass_=rng.choice(("forward", "forward", "backward", "decode")),
                T=rng.choice((1, 7, 64, 300, 4096, 65536)),
                H=rng.choice((1, 4)),
                Dk=rng.choice(WIDTHS),
                Dv=rng.choice(WIDTHS),
                segment_length=None if segmentation == "logarithmic" else rng.choice((1, 8, 16, 20, 64, 256, 1024)),
                top_k=rng.choice((1, 2, 8, 32)) if AGGREGATIONS[aggregation].sparse else None,
                dtype=rng.choice(("float32", "float32", "bfloat16", "float16")),
            )
        except UsageError:
            continue


def test_a_default_is_valid_or_nothing_is() -> None:
    rng, until, found = random.Random(SEED), time.monotonic() + SECONDS, 0
    while time.monotonic() < until or found < 5:
        problem, target = drawn(rng), rng.choice(targets())
        backend = get_backend(rng.choice(makers(target)))
        if not backend.supports(problem, target):
            continue
        found += 1
        space = backend.space(problem)
        if space.first_valid(lambda config: space.valid(config, problem, target)) is None:  # noqa: B023
            rules = [
                lambda config, one=one: one.holds(config, problem, target)  # type: ignore[misc] # noqa: B023
                for one in space.constraints
            ]
            valid = next(Feasible(space, rules).ordered(), None)
            assert valid is None, f"seed {SEED}: {problem} on {target.name}, valid is {space.at(valid)}"
