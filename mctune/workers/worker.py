"""A process that runs candidates and can be killed: a crash, a hang or a poisoned device context dies with it.

Parent and child speak JSON lines over two pipes of their own, so whatever a candidate prints cannot disturb them, and
every answer carries the number of its request, so that a line too many is nobody's answer. The child leads a process
group (compilers it starts die with it) and dies with its parent; what it does in between is in ``child``.

A worker is called by one thread at a time; any other may ``halt`` it meanwhile.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from mctune.core.child import command
from mctune.core.errors import DeviceError, UsageError
from mctune.workers.child import LOG_TAIL, MACHINES, Handler, Stage, write_all
from mctune.workers.watch import Deadline, described, parsed

__all__ = ["MACHINES", "Handler", "Stage", "Worker", "WorkerDied", "WorkerTimedOut"]

_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)
_STARTS, _PAUSE_S = 3, 0.5
_POLL_S = 0.5
_GRACE_S = 20.0
"""A child that runs candidates in forks ends one that is late by itself, and has so long to say so."""
_END_S = 5.0
_MAIN = "mctune.workers.child:main"
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="mctune-starter")
"""Starts all children. Linux ends them with the thread that did (``_die_with`` of ``child``): this one lasts."""


@dataclass(frozen=True)
class WorkerDied:
    """The child crashed, raised or exited during ``stage``; ``log`` is the end of what it printed.

    ``fault`` is whose it was, where that is known: ``machine`` (one of :data:`MACHINES` was raised), ``outside`` (ended
    by a signal that no code of its own sends), else empty.
    """

    message: str
    stage: str = ""
    log: str = ""
    fault: str = ""


@dataclass(frozen=True)
class WorkerTimedOut:
    """The child was killed in ``stage`` after ``seconds``."""

    seconds: float
    stage: str


class Worker:
    """Runs ``entry`` in a child that is started on the first call, and again on the call after one that it lost.

    ``entry`` is ``"module:function"``. In the child, ``function(setup)`` is called once and returns the handler;
    ``handler(payload, stage)`` is called for each payload and returns a JSON-able dict; it calls ``stage("build")`` and
    so on as it goes. A handler that raises loses its process: only a fresh one is known to be sound. One that has the
    attribute ``isolated`` has a process for each payload, and ``memory_bytes`` is what one may take.

    Args:
        entry: what to run.
        setup: JSON-able argument of the entry function.
        env: environment variables to add for the child.
        start_limit_s: seconds that starting (imports and ``function(setup)``) may take.
    """

    def __init__(
        self, entry: str, setup: Any = None, *, env: Mapping[str, str] | None = None, start_limit_s: float = 180.0
    ) -> None:
        if entry.count(":") != 1:
            raise UsageError(f"worker entry {entry!r} is not of the form module:function")
        self.started = 0
        """Processes started so far."""
        self._entry, self._setup, self._env, self._start_limit_s = entry, setup, dict(env or {}), start_limit_s
        self._child: _Child | None = None
        self._busy = threading.RLock()
        self._halted = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, payload: dict[str, Any], limit_s: float) -> dict[str, Any] | WorkerDied | WorkerTimedOut:
        """The handler's reply to ``payload``, or what became of the child within ``limit_s`` (start-up apart).

        Raises:
            DeviceError: the child could not be started, more than once: the entry does not import, or fails on
                ``setup``.
        """
        with self._busy:
            if self._halted:
                return WorkerDied("the worker was halted")
            try:
                return self._ready_child().ask(payload, limit_s)
            finally:
                # A child that died, hung or was interrupted half-way through an answer cannot be used again.
                if self._child is not None and not self._child.in_step:
                    self.close()

    def start(self) -> None:
        """Start the child before there is anything to call it with; a failure is left to the first call."""
        with suppress(DeviceError), self._busy:
            if not self._halted:
                self._ready_child()

    def close(self) -> None:
        """Kill the child, if there is one; a call that another thread is in ends first."""
        with self._busy:
            child, self._child = self._child, None
            if child is not None:
                child.kill()

    def halt(self) -> None:
        """End a call that another thread is in, and have every later one answer :class:`WorkerDied`."""
        self._halted = True
        child = self._child
        if child is not None:
            child.end()

    def _ready_child(self) -> _Child:
        if self._child is not None and self._child.exited():
            self.close()
        for attempt in range(_STARTS):
            if self._child is not None:
                return self._child
            if attempt:  # short of memory or processes, or killed: it may be over
                time.sleep(_PAUSE_S * attempt)
            failure = self._start()
            if self._halted:
                break
        if self._child is None:
            raise DeviceError(f"the worker process for {self._entry} did not start: {failure}")
        return self._child

    def _start(self) -> str:
        """Start a child; why that failed."""
        try:
            self._child = _Child(self._entry, self._env)
        except OSError as error:
            return str(error)
        self.started += 1
        if self._halted:
            self._child.end()
        answer = self._child.ask(self._setup, self._start_limit_s)
        if isinstance(answer, dict):
            self._child.isolates = answer["isolated"]
            return ""
        self.close()
        if isinstance(answer, WorkerTimedOut):
            return f"no answer in {answer.seconds:g} s"
        return answer.message + (f"\n{answer.log}" if answer.log else "")


class _Child:
    """One process; ``in_step`` is false from a request until its answer, ``isolates`` whether it runs them in forks."""

    def __init__(self, entry: str, env: Mapping[str, str]) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._log: IO[bytes] = tempfile.TemporaryFile("a+b", buffering=0)
        self._buffer = b""
        self.in_step, self.isolates = True, False
        try:
            self._process = _started(
                command(_MAIN, entry, str(requests), str(answers), str(os.getpid())),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(requests, answers),
                start_new_session=True,
                env={**os.environ, **env},
                cwd=None if os.path.isdir(".") else "/",  # it may have been removed
            )
        except BaseException:
            self._close_pipes()
            raise
        finally:
            os.close(requests)
            os.close(answers)

    def ask(self, payload: Any, limit_s: float) -> dict[str, Any] | WorkerDied | WorkerTimedOut:
        """Send one payload and wait for the answer, its stages noted on the way."""
        deadline = Deadline(limit_s + (_GRACE_S if self.isolates else 0.0))
        number = secrets.token_hex(8)
        line = json.dumps({"number": number, "limit_s": limit_s, "payload": payload}).encode() + b"\n"
        self.in_step = False
        self._log.truncate(0)
        try:
            write_all(self._requests, line)
        except BrokenPipeError:
            return self._died(deadline.stage)
        while True:
            answer = self._next_line(deadline)
            if answer is None:
                return WorkerTimedOut(limit_s, deadline.stage)
            if answer == b"":
                return self._died(deadline.stage)
            found = parsed(answer, number)
            if found is not None and found[0] == "stage":
                deadline.reached(found[1])
            elif found is not None:
                return self._answer(*found, deadline.stage)

    def _answer(self, kind: str, content: Any, stage: str) -> dict[str, Any] | WorkerDied | WorkerTimedOut:
        """What an answer says; the child goes on after one, unless it raised itself or says that it is its last."""
        self.in_step = self.isolates or kind == "reply"
        match kind:
            case "raised":
                return WorkerDied(content["message"], stage, content["traceback"], content["fault"])
            case "died":
                outside = "outside" if -content["status"] in _FROM_OUTSIDE else ""
                return WorkerDied(content["message"], content["stage"], self._tail(), outside)
            case "late":
                return WorkerTimedOut(content["seconds"], content["stage"])
            case _:
                reply: dict[str, Any] = content
                return reply

    def exited(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def end(self) -> None:
        """End the process and everything in its group; where it keeps what its forks started, it ends that first."""
        try:
            if self.isolates:
                self._process.terminate()
                self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # no process left, or (macOS) only a zombie
            pass

    def kill(self) -> None:
        """The same, and leave nothing behind."""
        self.end()
        self._process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        os.close(self._requests)
        os.close(self._answers)
        self._log.close()

    def _next_line(self, deadline: Deadline) -> bytes | None:
        """The next line without its end; ``b""`` when the process is gone, ``None`` past the deadline."""
        while b"\n" not in self._buffer:
            wait = deadline.left()
            if wait <= 0:
                return None
            # A grandchild may hold the pipe open after the child's death: look at the process too.
            if not select.select([self._answers], [], [], min(wait, _POLL_S))[0]:
                if self.exited():
                    return b""
                continue
            data = os.read(self._answers, 1 << 16)
            if not data:
                return b""
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _died(self, stage: str) -> WorkerDied:
        message = self._exit_message()
        outside = -(self._process.poll() or 0) in _FROM_OUTSIDE
        return WorkerDied(message, stage, self._tail(), "outside" if outside else "")

    def _exit_message(self) -> str:
        """How the process ended; its pipe has closed, so it is ending, unless a candidate closed the pipe."""
        try:
            return described(self._process.wait(timeout=2.0))
        except subprocess.TimeoutExpired:
            return "the worker process closed its pipe"

    def _tail(self) -> str:
        """The end of what the child printed since the last request."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - LOG_TAIL))
        return self._log.read().decode(errors="replace").strip("\0 \n")


def _started(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """A process that lives until this one ends, whichever thread asks for it."""

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(words, **options)

    future = _STARTER.submit(start)
    try:
        return future.result()
    except KeyboardInterrupt:
        future.result().kill()
        raise
