"""What `benchmarks/contact.py` stands on: facts, a JSON line each, and steps that cannot take the others along.

A step runs in a child that is forked from a process which has imported torch and has never touched the GPU. A crash, a
hang or a poisoned CUDA context ends with the child, whose time is limited; the facts that it had written stay.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "facts.jsonl"
_POLL_S, _REAP_S = 0.05, 3.0
_LAST_LINES = 3
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Facts:
    """Facts, appended to ``folder / NAME`` as they come, by any number of processes.

    Attributes:
        began: of ``time.monotonic``, from which the seconds of a fact count.
    """

    folder: Path
    began: float = field(default_factory=time.monotonic)
    _read: dict[int, list[dict[str, Any]]] = field(default_factory=dict, compare=False, repr=False)
    """What was read of the file, by its size: it only grows."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, step: str, fact: str, **values: Any) -> None:
        """One line, in one write: another process's may come before or after, not between."""
        line = {"at": round(time.monotonic() - self.began, 2), "step": step, "fact": fact, **values}
        text = json.dumps(line, default=str, allow_nan=True) + "\n"
        place = os.open(self.folder / NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(place, text.encode())
        finally:
            os.close(place)

    def all(self) -> list[dict[str, Any]]:
        """What there is; a line that a killed process left half written is passed over."""
        try:
            text = (self.folder / NAME).read_bytes()
        except OSError:
            return []
        if len(text) not in self._read:
            found = []
            for line in text.decode("utf-8", "replace").splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
            self._read.clear()
            self._read[len(text)] = found
        return self._read[len(text)]

    def of(self, fact: str, **wanted: Any) -> list[dict[str, Any]]:
        """Those of a kind, with these values."""
        return [
            line for line in self.all() if line["fact"] == fact and all(line.get(k) == v for k, v in wanted.items())
        ]


class Background:
    """A step that goes on while others run."""

    def __init__(self, guard: Guard, step: str, pid: int, quiet: bool) -> None:
        self._guard, self.step, self._pid, self._quiet = guard, step, pid, quiet
        self._since, self.outcome = time.monotonic(), ""

    def poll(self) -> bool:
        """Whether it has ended."""
        if not self.outcome:
            done, status, used = os.wait4(self._pid, os.WNOHANG)
            if done:
                self._end(_how(status), round(used.ru_utime + used.ru_stime, 1))
        return bool(self.outcome)

    def stop(self, why: str) -> None:
        """Kill it and whatever it has started, if it has not ended."""
        if self.poll():
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._kill_group()
        until = time.monotonic() + _REAP_S
        while time.monotonic() < until and not os.waitpid(self._pid, os.WNOHANG)[0]:
            # A process that waits in the GPU's driver may survive even this, and is left behind.
            time.sleep(_POLL_S)
        self._end(why)

    def _end(self, how: str, cpu_s: float | None = None) -> None:
        self._kill_group()
        self.outcome = how
        seconds = round(time.monotonic() - self._since, 1)
        self._guard.facts.add(self.step, "step", outcome=how, seconds=seconds, cpu_s=cpu_s)
        if not self._quiet or how != "ok":
            self._guard.say(f"{time.monotonic() - self._guard.facts.began:6.1f} s  {self.step}: {how}, {seconds} s")

    def _kill_group(self) -> None:
        """Whatever it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)


@dataclass(frozen=True)
class Guard:
    """Runs steps; what they print goes to ``log``.

    Attributes:
        deadline: of ``time.monotonic``, after which no step is begun and none goes on.
    """

    facts: Facts
    log: Path
    deadline: float

    @property
    def left(self) -> float:
        """Seconds."""
        return max(self.deadline - time.monotonic(), 0.0)

    def say(self, text: str) -> None:
        """To the terminal and to the log."""
        print(text, flush=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def run(self, step: str, function: Callable[[], object], limit_s: float) -> str:
        """What became of it: ``ok``, ``raised``, ``killed by SIGSEGV``, ``not done after 30 s`` or ``no time``."""
        limit_s = min(limit_s, self.left)
        if limit_s <= 0:
            self.facts.add(step, "step", outcome="no time", seconds=0.0)
            self.say(f"{time.monotonic() - self.facts.began:6.1f} s  {step}: no time")
            return "no time"
        running = self.start(step, function)
        until = time.monotonic() + limit_s
        while not running.poll():
            if time.monotonic() > until:
                running.stop(f"not done after {limit_s:.0f} s")
            time.sleep(_POLL_S)
        return running.outcome

    def start(self, step: str, function: Callable[[], object], quiet: bool = False) -> Background:
        """The same, without waiting for it, and without a line where it ends well and ``quiet``."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            self._child(step, function, parent)
        return Background(self, step, pid, quiet)

    def _child(self, step: str, function: Callable[[], object], parent: int) -> None:
        status = 1
        try:
            os.setsid()
            _die_with(parent)
            # The parent decides when this process ends.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for stream in (1, 2):
                os.dup2(log, stream)
            # Line-buffered, so that a killed process leaves what it printed.
            sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1, encoding="utf-8", errors="replace")
            function()
            status = 0
        except BaseException as error:
            traceback.print_exc()
            self.facts.add(step, "raised", error=told(error), where=_where(error))
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            # No interpreter shutdown: it may hang or crash on what the step left behind.
            os._exit(status)


def _die_with(parent: int) -> None:
    """A child of a process that is killed would go on: it is of another session."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def told(error: BaseException) -> str:
    """The type of an error, its first line and its last."""
    lines = [line.strip()[:300] for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}" if lines else repr(error)


def _where(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)[-_LAST_LINES:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in frames]


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return "ok" if os.WEXITSTATUS(status) == 0 else "raised"
