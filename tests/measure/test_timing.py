"""How long a candidate is timed, and what of a machine that is not quiet is left in the figure."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctune.measure import timing
from mctune.measure.timing import ratio, time_rotated, uncertainty

SLOWDOWNS = st.lists(st.floats(0.01, 100.0), min_size=7, max_size=40)


@given(slowdowns=SLOWDOWNS, times=st.floats(0.1, 10.0), ms=st.floats(0.01, 1000.0), round_=st.integers(0, 6))
def test_what_a_machine_does_to_both_is_in_no_ratio(
    slowdowns: list[float], times: float, ms: float, round_: int
) -> None:
    """Nor what it does to one of them in one round."""
    own, beside = [ms * times * slow for slow in slowdowns], [ms * slow for slow in slowdowns]
    assert math.isclose(ratio(own, beside), times, rel_tol=1e-9)
    assert uncertainty(own, beside) < 1e-9
    beside[round_] *= 1e3
    assert math.isclose(ratio(own, beside), times, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("slowdowns", "alone", "beside"),
    [((1.0,), 7, 7), ((1.0, 1.0, 3.0, 3.0), 28, 7), ((1.0, 3.0), 28, 28), ((1.0, 1.1), 7, 24)],
)
def test_timing_goes_on_while_the_machine_is_not_quiet(
    monkeypatch: pytest.MonkeyPatch, slowdowns: tuple[float, ...], alone: int, beside: int
) -> None:
    """Two that are timed by turns are both slower in a round, or neither, or by turns."""
    taken: itertools.count[int] = itertools.count()

    class Paced:
        def prepare(self, functions: object) -> None:
            """Nothing to prepare."""

        def once(self, timed: object) -> float:
            return slowdowns[next(taken) % len(slowdowns)]

    monkeypatch.setattr(timing, "_Cpu", Paced)
    (one,) = time_rotated([lambda: None], rounds=7, most=28, warmup=0)
    assert len(one) == alone
    taken = itertools.count()
    own, other = time_rotated([lambda: None] * 2, rounds=7, most=28, warmup=0)
    assert len(own) == len(other) == beside
