"""Timing: warm-up, a cold cache before each repeat, medians, several functions in rotated order.

Wall clock on a CPU, events of the stream on a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

_FLUSH_BYTES = 64 << 20
_FLUSH_GPU_BYTES = 256 << 20


def _flush(scratch: torch.Tensor) -> None:
    """Push everything else out of the caches."""
    scratch.add_(1)


def _once(function: Callable[[], object], scratch: torch.Tensor) -> float:
    """Milliseconds of one run on cold caches."""
    _flush(scratch)
    if scratch.is_cuda:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        function()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after))
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def time_rotated(
    functions: Sequence[Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    limit_s: float = 60.0,
    device: str = "cpu",
) -> list[list[float]]:
    """Milliseconds of each function in each round; every round starts one function later than the one before.

    Stops early, after whole rounds and at least three of them, when ``limit_s`` seconds are over.
    """
    scratch = torch.zeros((_FLUSH_BYTES if device == "cpu" else _FLUSH_GPU_BYTES) // 4, device=device)
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
            samples[index].append(_once(functions[index], scratch))
    return samples


def summary(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
