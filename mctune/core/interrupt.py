"""Ctrl-C, held back where it would leave something half done.

Python raises ``KeyboardInterrupt`` between any two bytecodes, so also in the middle of a database transaction, and may
leave an open cursor or a lock behind.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_Handler = Callable[[int, FrameType | None], object]


def leave(number: int, frame: FrameType | None) -> None:
    """A handler for while nothing is begun yet: say so and go, whatever is being imported."""
    with suppress(OSError):
        os.write(2, b"mctune: interrupted\n")
    os._exit(130)


class Held:
    """Ctrl-C within :func:`held`: whether it was pressed, and whether it may act now."""

    def __init__(self, handler: _Handler | None) -> None:
        self._handler = handler
        self._open = False
        self._pending = False

    @contextmanager
    def let_in(self) -> Iterator[None]:
        """Let Ctrl-C act within the block; one that was held back acts at its beginning."""
        self.check()
        before, self._open = self._open, True
        try:
            yield
        finally:
            self._open = before

    def check(self) -> None:
        """Act now on a Ctrl-C that was held back."""
        if self._pending and self._handler is not None:
            self._pending = False
            self._handler(signal.SIGINT, None)

    def taken(self) -> bool:
        """Whether one was held back; the caller acts on it."""
        pending, self._pending = self._pending, False
        return pending

    def _received(self, number: int, frame: FrameType | None) -> None:
        if not self._open or self._handler is None:
            self._pending = True
            return
        # The handler usually raises, and what the exception unwinds must not be interrupted again.
        self._open = False
        self._handler(number, frame)
        self._open = True


_HELD: list[Held] = []
"""The one that holds Ctrl-C back now, if any does."""


@contextmanager
def held() -> Iterator[Held]:
    """Hold Ctrl-C back for the block, except within :meth:`Held.let_in`; one that was held back acts at the end.

    Within another, it is the other one that acts. Only the main thread receives Ctrl-C: other threads, and programs
    that ignore it, have nothing to hold back.

    Examples:
        >>> with held() as ctrl_c:
        ...     row = 1  # written to a database: finished whatever is pressed
        ...     with ctrl_c.let_in():
        ...         time = 2.0  # measured: may be interrupted
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield Held(None)
        return
    if _HELD and handler == _HELD[-1]._received:
        yield _HELD[-1]
        return
    ctrl_c = Held(signal.default_int_handler if handler is leave else handler)
    _HELD.append(ctrl_c)
    try:
        signal.signal(signal.SIGINT, ctrl_c._received)
        yield ctrl_c
    finally:
        signal.signal(signal.SIGINT, handler)
        _HELD.remove(ctrl_c)
    ctrl_c.check()
