"""Timing: warm-up, a cold cache before each repeat, medians, several functions in rotated order.

Wall clock on a CPU. On a GPU events of its stream, around work that the host has queued in full before the GPU begins
with it: what the host takes to launch kernels is no part of the time, and is measured by itself.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_FLUSH_BYTES = 64 << 20
_FLUSH_GPU_BYTES = 256 << 20
_FLUSH_ROWS = 4096
_WARM_S = 0.3
_MOST_FLUSHES = 64
_HOST_CALLS = 5
_CERTAIN = 0.02  # a mean that is off by no more than this share needs no further rounds
_LEAST_MS = 1e-6

Function = Callable[[], object]


class Timed(Protocol):
    """What is timed, and what comes before and after each run of it, outside of the time."""

    def prepare(self) -> None:
        """Before a run."""

    def call(self) -> object:
        """The run."""

    def compare(self, found: Any) -> None:
        """After a run, with what it returned."""


@dataclass(frozen=True)
class Alone:
    """A function with nothing before and after it."""

    call: Function

    def prepare(self) -> None:
        """Nothing."""

    def compare(self, found: Any) -> None:
        """Nothing."""


class _Cpu:
    """Times on this CPU."""

    def __init__(self) -> None:
        self.scratch = torch.zeros(_FLUSH_BYTES // 4)

    def prepare(self, functions: Sequence[Timed]) -> None:
        """Nothing: a CPU is warm as it is."""

    def once(self, timed: Timed) -> float:
        """Milliseconds of one run on cold caches."""
        timed.prepare()
        _flush(self.scratch)
        start = time.perf_counter()
        found = timed.call()
        took = (time.perf_counter() - start) * 1e3
        timed.compare(found)
        return took


class _Gpu:
    """Times on the current GPU: its clocks brought up first, and so many flushes before each run that the host has
    queued the run before the last of them ends."""

    def __init__(self, device: str) -> None:
        self.scratch = torch.zeros(_FLUSH_ROWS, _FLUSH_GPU_BYTES // 4 // _FLUSH_ROWS, device=device)
        self.sums = torch.zeros(_FLUSH_ROWS, device=device)
        self.flushes: dict[int, int] = {}

    def prepare(self, functions: Sequence[Timed]) -> None:
        """Bring the clocks up, and see how long the host takes to launch each function."""
        deadline = time.monotonic() + _WARM_S
        while time.monotonic() < deadline:
            self._flush(10)
            torch.cuda.synchronize()
        # Ten in a row, so that the time includes no launch overhead of the first.
        flush = self._events(lambda: self._flush(10))[0] / 10
        for function in functions:
            queued = host_ms(function.call)
            self.flushes[id(function)] = min(max(math.ceil(1.5 * queued / flush), 1), _MOST_FLUSHES)

    def once(self, timed: Timed) -> float:
        """Milliseconds of one run on a cold L2."""
        timed.prepare()
        self._flush(self.flushes[id(timed)])
        took, found = self._events(timed.call)
        timed.compare(found)
        return took

    def _flush(self, times: int) -> None:
        for _ in range(times):
            _flush_by_reading(self.scratch, self.sums)

    def _events(self, function: Function) -> tuple[float, object]:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        found = function()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)), found


def _flush(scratch: torch.Tensor) -> None:
    """Push everything else out of the caches."""
    scratch.add_(1)


def _flush_by_reading(scratch: torch.Tensor, sums: torch.Tensor) -> None:
    """The same, with nothing left in the caches that must be written back while the next kernel runs."""
    torch.sum(scratch, dim=1, out=sums)


def host_ms(function: Function) -> float:
    """Milliseconds that the host is busy with one call: on a GPU what it takes to launch it; the median of a few."""
    samples = []
    for _ in range(_HOST_CALLS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples)


def time_rotated(
    functions: Sequence[Function | Timed],
    *,
    rounds: int,
    warmup: int = 1,
    limit_s: float = 60.0,
    device: str = "cpu",
    most: int = 0,
) -> list[list[float]]:
    """Milliseconds of each function in each round; every round starts one function later than the one before.

    What else belongs to a run of a :class:`Timed` is outside of its time, its warm-up included.

    Goes on beyond ``rounds``, to ``most``, as long as the first function's time is uncertain (:func:`uncertainty`).
    Stops early, after whole rounds and at least three of them, when ``limit_s`` seconds are over.
    """
    clock = _Cpu() if device == "cpu" else _Gpu(device)
    all_ = [Alone(function) if callable(function) else function for function in functions]
    for timed in all_:
        for _ in range(warmup):
            timed.prepare()
            timed.compare(timed.call())
    clock.prepare(all_)
    samples: list[list[float]] = [[] for _ in functions]
    deadline = time.monotonic() + limit_s
    for round_ in range(max(rounds, most)):
        if round_ >= 3 and time.monotonic() > deadline:
            break
        if round_ >= rounds and uncertainty(*samples[:2]) <= _CERTAIN:
            break
        for offset in range(len(functions)):
            index = (round_ + offset) % len(functions)
            samples[index].append(clock.once(all_[index]))
    return samples


def ratio(samples: Sequence[float], beside: Sequence[float]) -> float:
    """How many times as long one took as another that was timed beside it, in the same rounds.

    The geometric mean of the rounds' ratios but for the least and the greatest: a machine whose pace changes from
    round to round changes both, and medians of each may be of different moments.

    Examples:
        >>> ratio([2, 20, 200, 2, 9], [1, 10, 100, 1, 1])
        2.0
    """
    logs = sorted(_logs(samples, beside))
    return math.exp(statistics.fmean(logs[1:-1] if len(logs) > 2 else logs))


def uncertainty(samples: Sequence[float], beside: Sequence[float] | None = None) -> float:
    """By what share a mean over these rounds may be off: the standard error of the mean logarithm.

    Examples:
        >>> uncertainty([1.0, 2.0, 4.0], [3.0, 6.0, 12.0]), round(uncertainty([1.0, 1.2, 1.0, 1.2]), 3)
        (0.0, 0.053)
    """
    logs = _logs(samples, beside)
    return statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf


def _logs(samples: Sequence[float], beside: Sequence[float] | None) -> list[float]:
    other = [1.0] * len(samples) if beside is None else beside
    return [math.log(max(a, _LEAST_MS) / max(b, _LEAST_MS)) for a, b in zip(samples, other, strict=True)]


def summary(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
