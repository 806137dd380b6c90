"""Kernels of one operation timed against each other, each held to its results before, in between and after."""

from __future__ import annotations

from collections.abc import Sequence

from mctune.backends.protocol import Kernel
from mctune.core.outcome import describe
from mctune.core.problem import Problem
from mctune.measure.timing import time_rotated
from mctune.verify.at_size import AtSize
from mctune.verify.rerun import Miss, Reruns


def side_by_side(
    kernels: Sequence[Kernel], cases: Sequence[AtSize], *, rounds: int, limit_s: float
) -> tuple[list[list[float]], dict[int, str]]:
    """Milliseconds of each kernel in each round, in rotated order, on its case; all are on the device of the first.

    One that is wrong has no times; the second result says by the kernel's number what was wrong with it.
    """
    held: list[Reruns] = []
    sharing: dict[Problem, Reruns] = {}
    for kernel, case in zip(kernels, cases, strict=True):
        given = None if case.given else sharing.get(case.problem)
        held.append(Reruns(kernel, case, given))
        sharing.setdefault(case.problem, held[-1])
    left, failures = list(held), dict[int, str]()
    while left:
        try:
            for one in left:
                one.first()
            samples = time_rotated(left, rounds=rounds, warmup=0, limit_s=limit_s, device=kernels[0].device)
            for one in left:
                one.last()
            found = dict(zip(map(id, left), samples, strict=True))
            return [found.get(id(one), []) for one in held], failures
        except Miss as miss:
            failures[held.index(miss.reruns)] = describe(miss.outcome)
            left.remove(miss.reruns)
    return [[] for _ in held], failures
