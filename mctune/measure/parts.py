"""Where the time of a pass goes: a clock between the operations of a kernel, an event between launches on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from mctune.measure.timing import Timed, time_rotated


class _Reading(Protocol):
    """One reading of a device's clock."""

    def until(self, after: Any) -> float:
        """Milliseconds from this one to ``after``; once, after all of a run."""


class _Wall:
    """This CPU's clock."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def until(self, after: _Wall) -> float:
        return (after.seconds - self.seconds) * 1e3


class _Event:
    """An event in the current GPU's stream."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def until(self, after: _Event) -> float:
        after.event.synchronize()
        return float(self.event.elapsed_time(after.event))


class Clock:
    """Times what it watches, while it is on; ``device`` as torch names it.

    Examples:
        >>> clock = Clock("cpu")
        >>> read = clock.watch("read_forward", lambda: None)
        >>> medians = clock.medians([clock.run(read) for _ in range(3)])
        >>> [name for name, ms in medians]
        ['read_forward']
    """

    def __init__(self, device: str) -> None:
        self._now: Callable[[], Any] = _Wall if device == "cpu" else _Event
        self._on = False
        self._readings: list[tuple[str, Any, Any]] = []

    def watch(self, operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with a reading before and after each call while the clock is on."""

        def watched(*arguments: Any, **named: Any) -> Any:
            if not self._on:
                return function(*arguments, **named)
            before = self._now()
            found = function(*arguments, **named)
            self._readings.append((operation, before, self._now()))
            return found

        return watched

    def run(self, function: Callable[[], object]) -> dict[str, float]:
        """Milliseconds of each operation in one call of ``function``, in the order in which they begin."""
        self.start()
        function()
        return self.stop()

    def start(self) -> None:
        """Turn it on: a run begins."""
        self._on, self._readings = True, []

    def stop(self) -> dict[str, float]:
        """Turn it off; what the run's operations took."""
        self._on = False
        found: dict[str, float] = {}
        for operation, before, after in self._readings:
            found[operation] = found.get(operation, 0.0) + before.until(after)
        return found

    @staticmethod
    def medians(runs: Sequence[dict[str, float]]) -> tuple[tuple[str, float], ...]:
        """(operation, median in milliseconds), of runs of one kernel."""
        names = dict.fromkeys(name for run in runs for name in run)
        return tuple((name, statistics.median(run.get(name, 0.0) for run in runs)) for name in names)


class Apart:
    """What is timed, with the times of its operations in each run."""

    def __init__(self, timed: Timed, clock: Clock) -> None:
        self._timed, self._clock = timed, clock
        self.runs: list[dict[str, float]] = []

    def prepare(self) -> None:
        """Before a run."""
        self._timed.prepare()

    def call(self) -> object:
        """The run."""
        self._clock.start()
        return self._timed.call()

    def compare(self, found: Any) -> None:
        """After a run, with what it returned."""
        self.runs.append(self._clock.stop())
        self._timed.compare(found)


def time_parts(
    timed: Timed, clock: Clock, *, rounds: int, most: int, limit_s: float, device: str, beside: Sequence[Timed] = ()
) -> tuple[list[list[float]], tuple[tuple[str, float], ...]]:
    """Milliseconds of a whole in each round, then of those ``beside`` it; and the medians of its operations.

    On a CPU both are of the same runs. On a GPU readings are work for the device, and have a few runs of their own.
    """
    apart = Apart(timed, clock)
    if device == "cpu":
        samples = time_rotated([apart, *beside], rounds=rounds, warmup=0, limit_s=limit_s, device=device, most=most)
    else:
        samples = time_rotated([timed, *beside], rounds=rounds, warmup=0, limit_s=limit_s, device=device, most=most)
        time_rotated([apart], rounds=3, warmup=0, limit_s=limit_s, device=device)
    return samples, clock.medians(apart.runs)
