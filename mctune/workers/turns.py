"""Compiling and timing on one CPU take turns: a batch of candidates is compiled, then they are timed one by one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Any number compile at once, or one times.

    Who wants to compile is waited for: whoever has announced it, see :meth:`compiling`, compiles before the next timing
    begins.

    Args:
        apart: whether compiling disturbs what is timed; where it does not, both happen at once, and this only keeps
            timings apart.
    """

    def __init__(self, apart: bool) -> None:
        self._apart = apart
        self._changed = threading.Condition()
        self._compiling, self._timing = 0, False

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Until this ends nothing is timed that compiling disturbs."""
        if not self._apart:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._timing)
            self._compiling += 1
        try:
            yield
        finally:
            with self._changed:
                self._compiling -= 1
                self._changed.notify_all()

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Until this ends nothing else is timed, nor compiled where that disturbs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._timing and not self._compiling)
            self._timing = True
        try:
            yield
        finally:
            with self._changed:
                self._timing = False
                self._changed.notify_all()
