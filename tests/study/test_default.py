"""Wherever a space has a valid configuration, one of its defaults is valid: no search begins nowhere."""

from __future__ import annotations

import random
import secrets
import time

import numpy as np

from mctune.backends import backend_for, get_backend
from mctune.backends.registry import support
from mctune.core.errors import UsageError
from mctune.core.problem import AGGREGATIONS, DTYPES, PASSES, STATE_INITS, Problem
from mctune.core.target import Target, targets
from mctune.study.feasible import Feasible

WIDTHS = (1, 7, 16, 17, 32, 33, 48, 64, 80, 96, 128, 200, 256)
SECONDS = 4.0
LEAST = 25
"""Problems, on however busy a machine."""


def drawn(rng: random.Random) -> Problem:
    """A problem of a matrix memory, odd sizes included."""
    pass_, aggregation = rng.choice(PASSES), rng.choice(list(AGGREGATIONS))
    even = pass_ == "decode" or rng.random() < 0.7
    return Problem(
        recurrence=rng.choice(("linear", "swla")),
        aggregation=aggregation,
        segmentation="constant" if even else "logarithmic",
        state_init=rng.choice(STATE_INITS),
        pass_=pass_,
        B=rng.choice((1, 3)),
        T=rng.choice((1, 16, 100, 512, 4096, 65536)),
        H=rng.choice((1, 2, 5)),
        Dk=rng.choice(WIDTHS),
        Dv=rng.choice(WIDTHS),
        segment_length=rng.choice((16, 17, 32, 64, 100, 256, 1000)) if even else None,
        top_k=rng.choice((1, 2, 4, 16, 64)) if aggregation == "ssc" else None,
        dtype=rng.choice(("float32", *DTYPES)),
    )


def begins(problem: Problem, target: Target) -> bool:
    """Whether a default is valid, or none of the space's points is."""
    space = get_backend(backend_for(target)).space(problem)
    if space.first_valid(lambda config: space.valid(config, problem, target)) is not None:
        return True
    rules = [lambda config, c=c: c.holds(config, problem, target) for c in space.constraints]
    point = Feasible(space, rules).repair(space.indices(space.default), np.random.default_rng(0))
    return point is None


def test_random_problems_have_a_default() -> None:
    seed, begun = secrets.randbits(31), time.monotonic()
    rng, tried = random.Random(seed), 0
    while tried < LEAST or time.monotonic() - begun < SECONDS:
        target = rng.choice(targets())
        try:
            problem, tried = drawn(rng), tried + 1
            found = begins(problem, target)
        except UsageError:
            continue  # What is not supported says why.
        assert found, f"seed {seed}: no default for {problem} on {target.name}, which has valid configurations"


def test_narrow_values_in_float32() -> None:
    """Tiles wider than the values are one with the widest: it was not among the defaults that keep little."""
    for aggregation, Dk, Dv in (("grm", 64, 16), ("soup", 33, 7), ("ssc", 128, 1)):
        problem = Problem(aggregation=aggregation, T=512, H=2, Dk=Dk, Dv=Dv, segment_length=64)
        assert all(begins(problem, target) for target in targets() if support("triton", target))
