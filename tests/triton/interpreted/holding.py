"""One candidate against the oracle, in this process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mctune.backends import get_backend
from mctune.core.target import resolve
from mctune.search.spread import Drawn, draw, odd_cases
from mctune.search.verify import run_kernel, tolerance, verify_case

TARGET, _ = resolve("a100")
DTYPES = ("float32", "float16")


def drawn(pass_: str) -> list[Drawn]:
    """Every combination; each pair of recurrence and aggregation meets both dtypes."""
    return draw(pass_, TARGET, DTYPES)


def hold(one: Drawn, folder: Path) -> None:
    """Every odd case of a candidate."""
    backend = get_backend("triton")
    kernel = backend.load(one.problem, one.config, backend.build(one.problem, one.config, TARGET, folder))
    for seed, problem in enumerate(odd_cases(one.problem)):
        error = verify_case(partial(run_kernel, kernel), problem, seed)
        assert error <= tolerance(problem), f"{problem} with {one.config}"
