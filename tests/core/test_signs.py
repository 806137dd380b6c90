"""The sign test against the binomial distribution, exactly."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctune.core.signs import chance, tied


@given(st.lists(st.sampled_from([(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)]), max_size=60))
def test_it_is_the_tail_of_the_binomial_distribution(pairs: list[tuple[float, float]]) -> None:
    fast, slow = [a for a, _ in pairs], [b for _, b in pairs]
    wins, count = sum(b < a for a, b in pairs), sum(a != b for a, b in pairs)
    exact = Fraction(sum(math.comb(count, k) for k in range(wins + 1)), 2**count)
    assert chance(fast, slow) == pytest.approx(float(exact), rel=1e-9)
    assert tied(fast, slow) is (exact > Fraction(1, 20))


def test_more_pairs_than_a_float_has_binomials_for() -> None:
    assert chance([1.0] * 5000, [2.0] * 5000) < 1e-300
    assert chance([1.0, 2.0] * 2500, [2.0, 1.0] * 2500) == pytest.approx(0.5, abs=0.01)


def test_rounds_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError):
        chance([1.0], [1.0, 2.0])
