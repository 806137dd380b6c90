"""How well predicted times rank what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEAST = 3
"""A ranking of fewer candidates says nothing."""
TOP = 10
"""How many of the best predicted candidates :func:`regret` looks at."""


@dataclass(frozen=True)
class Accuracy:
    """How predicted and measured times of the same candidates compare.

    Attributes:
        count: candidates that were both measured and predicted.
        spearman: rank correlation, 1 to -1; ``None`` where all of one side are equal.
        regret: best measured among the ``TOP`` best predicted, over the best measured; 1 is perfect.
        factor: median of measured over predicted, or its inverse where that is greater: how far off a time is.
    """

    count: int
    spearman: float | None
    regret: float
    factor: float


def accuracy(pairs: Iterable[tuple[float, float]]) -> Accuracy | None:
    """Compare the candidates for one problem.

    Args:
        pairs: (measured, predicted) times, both positive and in the same unit.

    Returns:
        ``None`` for fewer than ``LEAST`` candidates.

    Examples:
        >>> found = accuracy([(1.0, 2.0), (2.0, 3.0), (4.0, 8.0)])
        >>> found.spearman, found.regret, found.factor
        (1.0, 1.0, 2.0)
    """
    known = list(pairs)
    if len(known) < LEAST:
        return None
    measured, predicted = [pair[0] for pair in known], [pair[1] for pair in known]
    factors = sorted(max(m / p, p / m) for m, p in known)
    middle = len(factors) // 2
    factor = factors[middle] if len(factors) % 2 else (factors[middle - 1] + factors[middle]) / 2
    return Accuracy(len(known), spearman(measured, predicted), regret(measured, predicted), factor)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, from -1 to 1: Pearson's of the ranks, where equal values share their mean rank.

    Returns:
        ``None`` where all values of one side are equal.

    Raises:
        ValueError: if the lengths differ.

    Examples:
        >>> spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
        0.5
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}")
    a, b = ranks(first), ranks(second)
    mean = (len(a) + 1) / 2
    together = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    alone = sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)
    return together / math.sqrt(alone) if alone else None


def ranks(values: Sequence[float]) -> list[float]:
    """Rank 1 for the least; equal values have the mean of their ranks.

    Examples:
        >>> ranks([0.5, 0.1, 0.5])
        [2.5, 1.0, 2.5]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for i in order[start:stop]:
            found[i] = (start + 1 + stop) / 2
        start = stop
    return found


def regret(measured: Sequence[float], predicted: Sequence[float], top: int = TOP) -> float:
    """What trusting the predictions costs: best measured time of the ``top`` best predicted, over the best of all.

    Args:
        measured, predicted: times of the same candidates, positive; candidates with equal predictions count as if the
            slowest of them were chosen first.
        top: how many candidates one would measure.

    Returns:
        At least 1, where nothing is lost.

    Raises:
        ValueError: if there are none, or the lengths differ.

    Examples:
        >>> regret([1.0, 2.0, 4.0], [3.0, 2.0, 1.0], top=1)
        4.0
    """
    if len(measured) != len(predicted) or not measured:
        raise ValueError(f"{len(measured)} measured against {len(predicted)} predicted")
    # Among equal predictions the model may as well pick the worst.
    chosen = sorted(zip(predicted, measured, strict=True), key=lambda pair: (pair[0], -pair[1]))[:top]
    return min(time for _, time in chosen) / min(measured)
