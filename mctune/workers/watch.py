"""Watch one process until it has answered, ended or run out of time."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_POLL_S = 0.5
_MOST_BYTES = 256 << 20
"""An answer is never longer: a candidate that writes into the pipe must not fill this process."""


REFERENCE = "reference"
"""The stage in which a process makes what its candidates are held to; that is no candidate's time."""
_REFERENCE_S = 900.0


class Deadline:
    """When ``limit_s`` seconds are over; they stand still in the stage ``REFERENCE``."""

    def __init__(self, limit_s: float) -> None:
        self._end, self._since = time.monotonic() + limit_s, 0.0
        self.stage = "start"

    def reached(self, stage: str) -> None:
        """A stage has begun."""
        if self.stage == REFERENCE:
            self._end += self._stood()
        self.stage, self._since = stage, time.monotonic()

    def left(self) -> float:
        """Seconds."""
        return self._end + (self._stood() if self.stage == REFERENCE else 0.0) - time.monotonic()

    def _stood(self) -> float:
        return min(time.monotonic() - self._since, _REFERENCE_S)


@dataclass(frozen=True)
class Watched:
    """A child, the pipe that it answers through, the number of the request, and the seconds that it may take."""

    pid: int
    lines: int
    number: str
    limit_s: float


@dataclass(frozen=True)
class Ended:
    """It answered (``reply``), raised (``raised``) or died (``died``)."""

    kind: str
    content: Any


@dataclass(frozen=True)
class Late:
    """It was ended in ``stage`` after ``seconds``."""

    seconds: float
    stage: str


def watch(watched: Watched, stage: Callable[[str], None]) -> Ended | Late:
    """What became of a child, which has ended then. Lines that do not carry the request's number do not count."""
    deadline, buffer = Deadline(watched.limit_s), b""
    handle = os.pidfd_open(watched.pid)
    answer: Ended | None = None
    try:
        while answer is None:
            left = deadline.left()
            ready = select.select([watched.lines, handle], [], [], min(max(left, 0.0), _POLL_S))[0]
            if not ready and left > 0:
                continue
            if left <= 0:
                _end(watched.pid)
                return Late(watched.limit_s, deadline.stage)
            data = os.read(watched.lines, 1 << 16) if watched.lines in ready else b""
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for kind, content in filter(None, (parsed(line, watched.number) for line in lines)):
                if kind == "stage":
                    deadline.reached(content)
                    stage(content)
                elif answer is None:
                    answer = Ended(kind, content)
            if not data or len(buffer) > _MOST_BYTES:
                break
    finally:
        os.close(handle)
    if answer is not None:
        _end(watched.pid)
        return answer
    message, status = _how(watched.pid)
    return Ended("died", {"message": message, "status": status, "stage": deadline.stage})


def parsed(line: bytes, number: str) -> tuple[str, Any] | None:
    """Kind and content of an answer to the request ``number``; ``None`` for anything else."""
    try:
        values = json.loads(line)
        return (values["kind"], values["content"]) if values["number"] == number else None
    except (ValueError, TypeError, KeyError):
        return None


def described(status: int) -> str:
    """How a process ended, from its exit code, negative for a signal."""
    if status >= 0:
        return f"the worker process exited with status {status}"
    name = signal.Signals(-status).name
    return f"the worker process was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
    os.waitpid(pid, 0)


def _how(pid: int) -> tuple[str, int]:
    """How a child ended that has closed its pipe, or ends now: in words, and its exit code."""
    for _ in range(200):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return described(code), code
        time.sleep(0.01)
    _end(pid)
    return "the worker process closed its pipe", 0
