"""Which worker evaluates which trial, where several share a study, and who notices that one of them is gone.

A worker claims a point by creating a running trial that has it. The storage numbers trials one after the other, so of
two workers that create the same point at the same moment the one with the later number sees the earlier, and gives way.
While it evaluates, a worker counts up a *beat* on its trial, every few seconds. Others watch the beats by their own
monotonic clock: no two machines' clocks are ever compared. A trial whose beat stands still for ``grace_s`` is taken
from its worker: it becomes FAIL, and its point is free again. A process of the same machine that has ended is noticed
at once.

A worker that cannot judge does not: time in which it slept itself (SIGSTOP, a laptop's lid) or could not reach the
storage does not count, so that the first worker to come back after a server's restart does not take everybody's trials.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial

from mctune.study.record import Look
from mctune.study.storage import BROKEN, ILLEGIBLE

OWNER = "owner"
"""User attribute of a trial: the process that has claimed it."""
_BEAT = "mctune:beat"
_HERE: set[str] = set()
"""The runs that this process is in."""


@dataclass(frozen=True)
class Timing:
    """Seconds between two beats, and without one until a trial is taken over."""

    beat_s: float = 5.0
    grace_s: float = 30.0


USUAL = Timing()
"""For candidates that take seconds, and servers that may be away for some."""


@cache
def process() -> str:
    """This process, as no other one ever: the boot of its machine, its process namespace, its number and start."""
    with suppress(OSError, ValueError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino} {os.getpid()} {_started(os.getpid())}"
    return ""


def ended(who: str) -> bool:
    """Whether a :func:`process` has surely ended; never sure of those on other machines."""
    mine, parts = process().split(), who.split()
    if len(parts) != 4 or parts[:2] != mine[:2]:
        return False
    try:
        return _started(int(parts[2])) != parts[3]
    except (FileNotFoundError, ProcessLookupError):
        return True
    except (OSError, ValueError):
        return False


def _started(pid: int) -> str:
    """When a process began, in ticks since the boot; nothing where it has died and its parent has not noticed."""
    state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]


@dataclass
class Claims:
    """The trials that one run evaluates, and what it makes of everybody else's.

    Args:
        study: where they are.
        run: the run's name.
        timing: how often it shows that it is alive, and how long it waits for others to.
        shared: whether there can be others; else nothing of the others runs any more.
    """

    study: optuna.Study
    run: str
    timing: Timing
    shared: bool
    _mine: dict[int, float] = field(default_factory=dict)  # trial id -> since when
    _beats: dict[int, tuple[int, float]] = field(default_factory=dict)  # trial id -> its beat, first seen when
    _runs: dict[str, tuple[str, int, float]] = field(default_factory=dict)  # run -> process, last trial, first seen
    _awake: float = field(default_factory=time.monotonic)
    _ticked: float = field(default_factory=time.monotonic)
    _done: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Claims:
        _HERE.add(self.run)
        self._awake = self._ticked = time.monotonic()
        if self.shared:
            self._thread = threading.Thread(target=self._beat, name="mctune beat", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _HERE.discard(self.run)
        self._done.set()
        if self._thread is not None:
            self._thread.join(2 * self.timing.beat_s)

    def attrs(self) -> dict[str, str]:
        """What a trial says of who evaluates it."""
        return {"run": self.run, OWNER: process()} if self.shared else {"run": self.run}

    def take(self, trial: int) -> None:
        """Keep the claim on the trial of this id alive."""
        self._mine[trial] = time.monotonic()

    def leave(self, trial: int) -> None:
        """Keep it no longer."""
        self._mine.pop(trial, None)

    def is_mine(self, trial: FrozenTrial) -> bool:
        """Whether this run evaluates it now."""
        return trial._trial_id in self._mine

    def all_mine(self, look: Look) -> list[FrozenTrial]:
        """Those running trials that this run evaluates, or that were written twice by it."""
        return [trial for trial in look.running if trial.user_attrs.get("run") == self.run]

    def shaken(self) -> None:
        """The storage could not be reached: nobody else may have reached it either."""
        self._awake = time.monotonic()

    def abandoned(self, look: Look) -> list[FrozenTrial]:
        """Those running trials that nobody evaluates any more."""
        if look.at - self._ticked > 2 * self.timing.beat_s:  # asleep, and the thread is not yet awake either
            self._awake = max(self._awake, look.at)
        return [trial for trial in look.running if self._abandoned(trial, look.at)]

    def _abandoned(self, trial: FrozenTrial, read_at: float) -> bool:
        run, owner = str(trial.user_attrs.get("run", "")), str(trial.user_attrs.get(OWNER, ""))
        if run == self.run:  # one that is not known was written twice, since the answer to the first was lost
            return not self.is_mine(trial)
        if not self.shared:  # somebody's who looks at the file with a program of his own
            return False
        return self._gone(run, owner) or self._still((trial._trial_id, int(trial.system_attrs.get(_BEAT, 0))), read_at)

    def _still(self, beat: tuple[int, int], read_at: float) -> bool:
        """Whether a trial's beat has stood still for too long."""
        trial, count = beat
        if self._beats.get(trial, (-1, 0.0))[0] != count:
            self._beats[trial] = count, read_at
        return read_at - max(self._beats[trial][1], self._awake) > self.timing.grace_s

    def note(self, look: Look) -> None:
        """Notice which runs are getting on."""
        for trial in look.since if self.shared else ():
            run = str(trial.user_attrs.get("run", ""))
            if self._runs.get(run, ("", -1, 0.0))[1] < trial.number:
                self._runs[run] = str(trial.user_attrs.get(OWNER, "")), trial.number, look.at

    def over(self, look: Look) -> Callable[[str], bool]:
        """Whether a run has ended: nothing of it is running, and it has begun nothing for long."""
        alive = {self.run, *(str(trial.user_attrs.get("run", "")) for trial in look.running)}

        def ended_(run: str) -> bool:
            owner, _, since = self._runs.get(run, ("", -1, 0.0))
            if run in alive or not self.shared:
                return run not in alive
            return self._gone(run, owner) or look.at - max(since, self._awake) > self.timing.grace_s

        return ended_

    def _gone(self, run: str, owner: str) -> bool:
        """Whether a run has surely ended."""
        return ended(owner) or (owner != "" and owner == process() and run not in _HERE)

    def _beat(self) -> None:
        """Count up the beats of this run's trials; in a thread of its own."""
        count = 0
        while not self._done.wait(self.timing.beat_s):
            now, count = time.monotonic(), count + 1
            if now - self._ticked > 2 * self.timing.beat_s:
                self._awake = now
            for trial, since in list(self._mine.items()):
                if now - since < self.timing.beat_s:
                    continue  # most are over before anybody could miss them
                try:
                    self.study._storage.set_trial_system_attr(trial, _BEAT, count)
                except UpdateFinishedTrialError:
                    self.leave(trial)  # taken over; what becomes of it is told to nobody
                except (*BROKEN, *ILLEGIBLE):
                    self.shaken()
            self._ticked = time.monotonic()
