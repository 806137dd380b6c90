"""Wall-clock timing on a CPU: warm-up, a cold cache before each repeat, medians, several functions in rotated order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

_FLUSH_BYTES = 64 << 20


def _flush(scratch: torch.Tensor) -> None:
    """Push everything else out of the caches."""
    scratch.add_(1)


def time_rotated(
    functions: Sequence[Callable[[], object]], *, rounds: int, warmup: int = 1, limit_s: float = 60.0
) -> list[list[float]]:
    """Milliseconds of each function in each round; every round starts one function later than the one before.

    Stops early, after whole rounds and at least three of them, when ``limit_s`` seconds are over.
    """
    scratch = torch.zeros(_FLUSH_BYTES // 4)
    for function in functions:
        for _ in range(warmup):
            function()
    samples: list[list[float]] = [[] for _ in functions]
    deadline = time.monotonic() + limit_s
    for round_ in range(rounds):
        if round_ >= 3 and time.monotonic() > deadline:
            break
        for offset in range(len(functions)):
            index = (round_ + offset) % len(functions)
            _flush(scratch)
            start = time.perf_counter()
            functions[index]()
            samples[index].append((time.perf_counter() - start) * 1e3)
    return samples


def summary(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
