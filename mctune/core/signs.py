"""The sign test: whether what was timed side by side differs beyond noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

DOUBT = 0.05
"""The largest chance at which a difference is no longer called noise."""


def chance(fast: Sequence[float], slow: Sequence[float]) -> float:
    """How likely ``slow`` would be the smaller in so few places, or fewer, if neither were slower than the other.

    A one-sided sign test. Places where both are equal do not count; where all are, the chance is 1.

    Args:
        fast, slow: times in any unit, one of each a round.

    Examples:
        >>> round(chance([1.0, 1.1, 1.0, 1.2, 1.1], [2.0, 2.1, 2.0, 2.2, 2.1]), 5)
        0.03125
        >>> round(chance([1.0, 3.0], [2.0, 2.0]), 5)
        0.75
    """
    pairs = [(a, b) for a, b in zip(fast, slow, strict=True) if a != b]
    count, wins = len(pairs), sum(b < a for a, b in pairs)
    # In logarithms: the binomial coefficients of a thousand pairs are no floats.
    whole = math.lgamma(count + 1) - count * math.log(2)
    chosen = (math.exp(whole - math.lgamma(k + 1) - math.lgamma(count - k + 1)) for k in range(wins + 1))
    return min(math.fsum(chosen), 1.0)


def tied(fast: Sequence[float], slow: Sequence[float]) -> bool:
    """Whether noise alone may have made ``slow`` the slower one. With fewer than 5 rounds it always may.

    Examples:
        >>> tied([1.0] * 4, [2.0] * 4), tied([1.0] * 5, [2.0] * 5)
        (True, False)
    """
    return chance(fast, slow) > DOUBT
