"""Ctrl-C is held back, let in, and never lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from mctune.core.interrupt import held


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[None]:
    """What runs in the background may have been told to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_comes_at_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), held():
        press()
        done.append("all")
    assert done == ["all"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_comes_where_it_is_let_in_and_not_again_on_the_way_out() -> None:
    steps = []
    with held() as ctrl_c:
        try:
            press()
            steps.append("held")
            with ctrl_c.let_in():
                steps.append("never")
        except KeyboardInterrupt:
            steps.append("came")
        try:
            with ctrl_c.let_in():
                try:
                    press()
                    steps.append("never")
                finally:
                    press()
                    steps.append("whole")
        except KeyboardInterrupt:
            steps.append("came")
        with pytest.raises(KeyboardInterrupt):
            ctrl_c.check()
        ctrl_c.check()
    assert steps == ["held", "came", "whole", "came"]


def test_a_handler_that_raises_nothing_is_called_and_what_it_interrupts_goes_on() -> None:
    called: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: called.append(number))
    with held() as ctrl_c:
        press()
        assert called == []
        with ctrl_c.let_in():
            assert len(called) == 1
            press()
            press()
            assert len(called) == 3
        press()
    assert len(called) == 4


def test_another_error_comes_first() -> None:
    with pytest.raises(OSError, match="full"), held():
        press()
        raise OSError("full")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("ignored", (signal.SIG_IGN, signal.SIG_DFL))
def test_where_it_is_ignored_or_another_threads_there_is_nothing_to_hold(ignored: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, ignored)
    handlers = []
    with held() as ctrl_c, ctrl_c.let_in():
        handlers.append(signal.getsignal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def elsewhere() -> None:
        with held() as ctrl_c, ctrl_c.let_in():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [ignored, signal.default_int_handler]
