"""How well predicted times rank what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEAST = 3
"""Fewer candidates have no ranking worth the name."""
TOP = 10


@dataclass(frozen=True)
class Accuracy:
    """Of ``count`` candidates that were measured and predicted.

    Attributes:
        spearman: rank correlation, 1 to -1; ``None`` where all of one side are equal.
        regret: best measured among the ``TOP`` best predicted, over the best measured; 1 is perfect.
        factor: median of measured over predicted, or its inverse where that is greater: what a time is wrong by.
    """

    count: int
    spearman: float | None
    regret: float
    factor: float


def accuracy(pairs: Iterable[tuple[float, float]]) -> Accuracy | None:
    """Of (measured, predicted) times of the candidates for one problem; ``None`` for fewer than ``LEAST``."""
    known = list(pairs)
    if len(known) < LEAST:
        return None
    measured, predicted = [pair[0] for pair in known], [pair[1] for pair in known]
    factors = sorted(max(m / p, p / m) for m, p in known)
    middle = len(factors) // 2
    factor = factors[middle] if len(factors) % 2 else (factors[middle - 1] + factors[middle]) / 2
    return Accuracy(len(known), spearman(measured, predicted), regret(measured, predicted), factor)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation of the ranks, equals sharing their mean rank; ``None`` where one side has one rank.

    Raises:
        ValueError: if the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}")
    a, b = ranks(first), ranks(second)
    mean = (len(a) + 1) / 2
    together = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    alone = sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)
    return together / math.sqrt(alone) if alone else None


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the least; equal values have the mean of their ranks."""
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
    """The best measured of the ``top`` best predicted, over the best measured; of equal predictions the slowest count.

    Raises:
        ValueError: if there are none, or the lengths differ.
    """
    if len(measured) != len(predicted) or not measured:
        raise ValueError(f"{len(measured)} measured against {len(predicted)} predicted")
    # What the model cannot tell apart it may choose at its worst.
    chosen = sorted(zip(predicted, measured, strict=True), key=lambda pair: (pair[0], -pair[1]))[:top]
    return min(time for _, time in chosen) / min(measured)
