"""What stands for a segment length: the best of those that are right when they are held to everything once more."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctune.core.config import Config
from mctune.core.outcome import Predicted, Timed, Wrong, to_json
from mctune.study.leaders import Deciding, Leader
from mctune.study.record import Trial
from mctune.workers.pool import Workers
from mctune.workers.worker import WorkerDied

_ROUNDS = 21


class Finalists:
    """Stands in for workers: number n takes n ms; some are ``wrong``, and ``crash`` takes all down that it is with."""

    def __init__(self, wrong: tuple[int, ...] = (), crash: tuple[int, ...] = (), fault: str = "") -> None:
        self.wrong, self.crash, self.fault = wrong, crash, fault
        self.compared: list[list[int]] = []
        self.held: Counter[int] = Counter()

    def compare(self, candidates: list[dict[str, Any]], limit_s: float) -> dict[str, Any] | WorkerDied:
        numbers = [one["n"] for one in candidates]
        self.compared.append(numbers)
        if set(numbers) & set(self.crash):
            return WorkerDied("killed by SIGSEGV", "time")
        return {"samples": [[float(n)] * _ROUNDS for n in numbers], "failures": []}

    def hold(self, candidate: dict[str, Any], limit_s: float, *, again: bool = False) -> dict[str, Any] | WorkerDied:
        number = candidate["n"]
        self.held[number] += 1
        if self.fault and not again:
            return WorkerDied("killed by SIGKILL", "verify", fault=self.fault)
        if number in self.crash:
            return WorkerDied("killed by SIGSEGV", "verify")
        return {"outcome": to_json(Wrong(1.0, 1e-5, "odd") if number in self.wrong else Predicted(0.0, "", 1e-7))}


def trials(numbers: range) -> list[Trial]:
    return [Trial(n, Config.of({"n": n}), Timed(n / 100 + 1, 1.0, 1.0, 7, 1e-7), 0.1) for n in numbers]


def decided(workers: Finalists, **groups: range) -> tuple[dict[int, Leader] | None, list[str]]:
    notes: list[str] = []
    listener: Any = type("Listener", (), {"note": lambda self, text: notes.append(text)})()
    deciding = Deciding(cast(Workers, workers), listener, lambda config: {"n": config["n"]}, 1.0)
    return deciding.time_again({int(C[1:]): trials(numbers) for C, numbers in groups.items()}), notes


def test_only_what_stands_for_its_length_is_held_to_everything() -> None:
    workers = Finalists()
    leaders, notes = decided(workers, C64=range(1, 5), C128=range(11, 15))
    assert leaders is not None and {C: leader.trial.number for C, leader in leaders.items()} == {64: 1, 128: 11}
    assert workers.compared == [[1, 2, 3, 4, 11, 12, 13, 14]] and workers.held == {1: 1, 11: 1}
    assert leaders[64].trial.ms == 1.0 and notes == ["timing 8 finalists against each other"]


@given(wrong=st.sets(st.integers(1, 6)), crash=st.sets(st.integers(1, 6)))
def test_the_fastest_that_is_right_stands(wrong: set[int], crash: set[int]) -> None:
    """Whatever is wrong with those before it; none if none is right, and each that fails is told of once."""
    workers = Finalists(tuple(wrong), tuple(crash))
    leaders, notes = decided(workers, C64=range(1, 7))
    right = sorted(set(range(1, 7)) - wrong - crash)
    assert leaders is not None
    assert [leader.trial.number for leader in leaders.values()] == right[:1]
    failed = [note for note in notes if "not right after all" in note]
    assert len(failed) == len([n for n in workers.held if n in wrong | crash])
    assert all(count <= 2 for count in workers.held.values())


@pytest.mark.parametrize("fault", ["machine", "outside"])
def test_what_the_machine_did_is_tried_again(fault: str) -> None:
    workers = Finalists(fault=fault)
    leaders, notes = decided(workers, C64=range(1, 4))
    assert leaders is not None and leaders[64].trial.number == 1
    assert workers.held == {1: 2} and len(notes) == 1
