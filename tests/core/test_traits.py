"""The table of traits, which the runtime and the core share."""

from __future__ import annotations

import pytest

from mctune.core import problem
from mctune.runtime import traits


def test_the_core_has_the_runtimes_tables() -> None:
    for name in problem.__all__:
        if hasattr(traits, name):
            assert getattr(problem, name) is getattr(traits, name)
    assert {row.family for row in traits.RECURRENCES.values()} == set(traits.FAMILIES)


def test_rows_are_named_as_they_are_called() -> None:
    for table in (traits.AGGREGATIONS, traits.RECURRENCES):
        assert all(name == row.name for name, row in table.items())


@pytest.mark.parametrize("contradiction", [{"sparse": True}, {"averages": True, "routed": True}])
def test_a_contradiction_is_refused(contradiction: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="new: what is"):
        traits.Aggregation("new", **contradiction)
