"""Hold every run at the timed size to the reference, and to each other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from mctune.backends.protocol import Kernel
from mctune.core.outcome import Wrong
from mctune.verify.at_size import AtSize
from mctune.verify.fences import Fences
from mctune.verify.guard import Fault, Guarded, same
from mctune.verify.judge import poisoned_memory, tolerance, vanishing
from mctune.verify.passes import Results

Tensor = torch.Tensor
SLACK = 2.0
"""Candidate and reference are both rounded: they may be so many times as far apart as a candidate and the oracle."""
LOCAL = 8.0
"""A single row may be so many times as far off as all rows together: no row may be lost among many that are right."""


_LEAST_S = 30.0
"""However slow a kernel is, it is run again for at most so long."""


@dataclass(frozen=True)
class Effort:
    """How often a kernel is run beside what is timed.

    Attributes:
        repeats: runs of each small case.
        least, most: runs at size, beyond the least as long as they take no more than ``share`` of the time that went
            into the candidate before.
    """

    repeats: int
    least: int
    most: int
    share: float


CANDIDATE = Effort(repeats=3, least=0, most=48, share=0.05)
FINALIST = Effort(repeats=30, least=100, most=580, share=0.5)
"""Ten times that: what comes from it ships."""


class Miss(Exception):
    """A run at size was not what it must be."""

    def __init__(self, reruns: Reruns, outcome: Wrong) -> None:
        super().__init__(outcome.case)
        self.reruns, self.outcome = reruns, outcome


class Reruns:
    """A kernel at the size that is timed, on its own copies of the arguments, or on those of ``beside``.

    Raises:
        Miss: from any method, if a run missed the reference, gave other bits than the first, wrote to an input or
            beside an array.
    """

    def __init__(self, kernel: Kernel, case: AtSize, beside: Reruns | None = None) -> None:
        self.runs = 0
        """Runs that were compared so far."""
        self.error = 0.0
        """The largest error of a run against the reference."""
        self._kernel, self._case, self._first = kernel, case, dict[str, Tensor]()
        # Pairs that are grouped by atomics come in any order, and their sums are rounded in any order.
        self._exact = getattr(kernel, "pair_order", None) is None
        if beside is None:
            self._fences, self._arguments = Fences(), case.arguments()
            self._copy = self._arguments.copied(self._fences)
        else:
            self._fences, self._arguments, self._copy = beside._fences, beside._arguments, beside._copy

    def first(self) -> None:
        """A watched run, held to the reference: what all others are compared with."""
        found = self._watched()
        self._hold(found)
        self._first = {name: x.clone() for name, x in found.items()}
        self.runs += 1

    def prepare(self) -> None:
        """Before a run: a memory that the last one has written to is as it was."""
        self._arguments.restore(self._copy)

    def call(self) -> Any:
        """One run: what is timed."""
        return self._copy.run(self._kernel)

    def compare(self, found: Any) -> None:
        """After a run: it gave what the first one gave."""
        self._compare(self._case.results(found, self._copy))

    def repeat(self, effort: Effort, spent_s: float) -> None:
        """Run again and compare, for a candidate that took ``spent_s`` so far; every tenth run is watched."""
        begun, runs = time.monotonic(), 0
        while runs < effort.most:
            took = time.monotonic() - begun
            if took > _LEAST_S or (runs >= effort.least and took > effort.share * spent_s):
                break
            runs += 1
            if runs % 10:
                self.prepare()
                self.compare(self.call())
            else:
                self._compare(self._watched())

    def last(self) -> None:
        """After all runs: what they were given, and the memory beside it, is as it was; and one more watched run."""
        if fault := self._fences.broken() or self._arguments.overwritten(self._copy):
            raise self._fault(fault)
        self._compare(self._watched())

    def _watched(self) -> Results:
        # What a decode step writes to is copied back, and the next run needs it as it is.
        arguments = self._arguments.copied(Fences()) if self._arguments.written else self._arguments
        try:
            with poisoned_memory():
                found = arguments.run(Guarded(self._kernel))
        except Fault as fault:
            raise self._fault(str(fault)) from None
        return self._case.results(found, arguments)

    def _compare(self, found: Results) -> None:
        self.runs += 1
        if not self._exact:
            self._hold(found)
            return
        apart = [name for name, x in self._first.items() if not same(found[name], x)]
        if apart:
            error = error_at_size(found, self._case.wanted)
            raise self._miss(error, f", where run {self.runs} gave another {apart[0]} than the first")

    def _hold(self, found: Results) -> None:
        error = error_at_size(found, self._case.wanted)
        if not error <= SLACK * tolerance(self._case.problem):
            raise self._miss(error, ", at the size that is timed")
        self.error = max(self.error, error)

    def _fault(self, text: str) -> Miss:
        return self._miss(float("inf"), f": {text}")

    def _miss(self, error: float, text: str) -> Miss:
        limit = SLACK * tolerance(self._case.problem)
        return Miss(self, Wrong(error, limit, f"{self._case.problem}{text}"))


def error_at_size(found: Results, wanted: Results) -> float:
    """The largest error of any result, inf for NaN or a wrong shape: RMS(difference) / RMS(reference), over all rows,
    and over each row, relative to the larger of its own RMS and that of all, for ``LOCAL`` times as much.

    A row is what the last axis holds; of gates, single numbers.
    """
    if set(found) != set(wanted):
        return float("inf")
    sizes = {name: _rms(x) for name, x in wanted.items()}
    floor = vanishing(sizes)
    worst = 0.0
    for name, reference in wanted.items():
        if found[name].shape != reference.shape:
            return float("inf")
        if reference.numel() == 0:
            continue
        apart, reference = found[name].float() - reference.float(), reference.float()
        size = max(sizes[name], floor, 1e-8)
        if apart.dim() > 3:
            rows, own = (x.square().mean(-1).sqrt() for x in (apart, reference))
        else:
            rows, own = apart.abs(), reference.abs()
        local = float((rows / own.clamp(min=size)).max()) / LOCAL
        for error in (_rms(apart) / size, local):
            if not error < float("inf"):
                return float("inf")
            worst = max(worst, error)
    return worst


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt()) if x.numel() else 0.0
