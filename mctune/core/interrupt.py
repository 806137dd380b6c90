"""Ctrl-C where it may come, and held back where it would leave something half done.

Python raises ``KeyboardInterrupt`` between any two bytecodes, in the middle of a database's transaction too: what that
leaves behind (a cursor that nobody closes, a lock) is not what its library was written for.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_Handler = Callable[[int, FrameType | None], object]


class Held:
    """Ctrl-C within :func:`held`: what has come, and whether it may come now."""

    def __init__(self, handler: _Handler | None) -> None:
        self._handler = handler
        self._open = False
        self._pending = False

    @contextmanager
    def let_in(self) -> Iterator[None]:
        """Let Ctrl-C in for the block; one that came before comes at its beginning."""
        self.check()
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def check(self) -> None:
        """Where Ctrl-C has come, act on it now."""
        if self._pending and self._handler is not None:
            self._pending = False
            self._handler(signal.SIGINT, None)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if not self._open or self._handler is None:
            self._pending = True
            return
        # It raises, as a rule, and what the exception passes on its way out must not be interrupted again.
        self._open = False
        self._handler(number, frame)
        self._open = True


@contextmanager
def held() -> Iterator[Held]:
    """Hold Ctrl-C back for the block, but where :meth:`Held.let_in` lets it in; what is left comes at its end.

    Only the main thread gets Ctrl-C: in others, and where a program ignores it, there is nothing to hold.

    Example:
        >>> with held() as ctrl_c:
        ...     row = 1  # ... written to a database: whole, whatever is pressed
        ...     with ctrl_c.let_in():
        ...         time = 2.0  # ... measured: may be interrupted
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield Held(None)
        return
    ctrl_c = Held(handler)
    try:
        signal.signal(signal.SIGINT, ctrl_c._received)
        yield ctrl_c
    finally:
        signal.signal(signal.SIGINT, handler)
    ctrl_c.check()
