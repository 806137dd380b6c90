"""Compiling and timing on one CPU take turns."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mctune.workers.turns import Turns


@pytest.mark.parametrize("apart", (True, False))
def test_one_times_and_nobody_compiles_beside_it(apart: bool) -> None:
    turns, lock, now, seen = Turns(apart), threading.Lock(), {"compiling": 0, "timing": 0}, set()

    def enter(what: str, by: int) -> None:
        with lock:
            now[what] += by
            seen.add((now["compiling"] > 0, now["timing"]))

    def candidate(seed: int) -> None:
        pause = random.Random(seed).uniform(0.0, 0.003)
        with turns.compiling():
            enter("compiling", 1)
            time.sleep(pause)
            enter("compiling", -1)
        with turns.timing():
            enter("timing", 1)
            time.sleep(pause)
            enter("timing", -1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(candidate, range(64)))
    assert {timing for _, timing in seen} == {0, 1}
    assert not apart or (True, 1) not in seen


def test_a_failure_ends_a_turn() -> None:
    turns = Turns(True)
    for enter in (turns.compiling, turns.timing, turns.compiling):
        with pytest.raises(OSError), enter():
            raise OSError
    with turns.timing():
        pass
