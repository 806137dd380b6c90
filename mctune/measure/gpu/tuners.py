"""Kernels that choose among many configurations when they first run, as fla's do: 165 of them for a training step.

Compiled one after the other, and timed for as long as Triton's tuner does by itself, they take minutes. All are still
tried: several processes compile a part each, and the process that times the contenders finds them on disk and times
each more briefly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

from triton.runtime.autotuner import Autotuner
from triton.testing import do_bench

WARMUP_MS, REPEATED_MS = 5, 20
"""A fifth of what Triton's tuner spends on a configuration: still hundreds of runs."""


def time_briefly() -> None:
    """From now on in this process."""

    def bench(self: Autotuner, call: Callable[[], None], quantiles: Sequence[float]) -> object:
        return do_bench(call, warmup=WARMUP_MS, rep=REPEATED_MS, quantiles=quantiles)

    Autotuner.do_bench = bench


def compile_part(part: int, parts: int) -> None:
    """From now on in this process: every ``parts``-th configuration is compiled, by being run once, and none is timed.

    One of those that run here is chosen, or else the first, so that what comes after it is compiled too.
    """
    numbers = count()

    def bench(self: Autotuner, call: Callable[[], None], quantiles: Sequence[float]) -> list[float]:
        if next(numbers) % parts != part:
            return [float("inf")] * len(quantiles)
        call()
        return [0.0] * len(quantiles)

    Autotuner.do_bench = bench
