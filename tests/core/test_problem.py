"""The runtime, which is copied into packages and imports nothing of the search, says the same as the core."""

from __future__ import annotations

from mctune.core import problem
from mctune.runtime import arguments


def test_the_runtime_names_the_same_problems() -> None:
    for name in ("AGGREGATIONS", "ROUTED", "STATE_INITS", "DEEP"):
        assert getattr(arguments, name) == getattr(problem, name)
    assert tuple(arguments.GATES) == problem.RECURRENCES
    assert set(problem.ROUTED) < set(problem.AGGREGATIONS)
