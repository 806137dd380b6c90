"""A clock between the operations of a kernel."""

from __future__ import annotations

import time
from typing import Any

from mctune.measure.parts import Clock, time_parts


class Two:
    """A pass of two operations, one of which is launched twice."""

    def __init__(self, clock: Clock) -> None:
        self.read = clock.watch("read", lambda: time.sleep(0.004))
        self.write = clock.watch("write", lambda: time.sleep(0.001))
        self.prepared = self.compared = 0

    def prepare(self) -> None:
        self.prepared += 1

    def call(self) -> str:
        self.write()
        self.read()
        self.write()
        return "found"

    def compare(self, found: Any) -> None:
        assert found == "found"
        self.compared += 1


def test_parts_are_of_the_runs_that_are_timed() -> None:
    clock = Clock("cpu")
    two = Two(clock)
    two.call()  # not under the clock
    other = Two(clock)
    (samples, beside), parts = time_parts(two, clock, rounds=5, most=5, limit_s=10.0, device="cpu", beside=[other])
    assert len(beside) == other.compared == 5 and min(beside) >= 6.0
    assert len(samples) == two.prepared == two.compared == 5
    assert [name for name, _ in parts] == ["write", "read"]
    # What sleeps takes at least that long, and no operation longer than all.
    assert dict(parts)["read"] >= 4.0 and dict(parts)["write"] >= 2.0
    assert max(ms for _, ms in parts) <= max(samples)
