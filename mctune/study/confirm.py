"""Whether a failure is the candidate's: what a machine does to a search must not be recorded of a configuration.

A failure is tried again with nothing of what is kept on disk. If it stays, a kernel that no machine in order fails on
is tried in the same processes: where that fails too, the machine is at fault, and the search ends with its reason.
"""

from __future__ import annotations

from typing import Any

from mctune.core.errors import DeviceError
from mctune.core.outcome import Crashed, FailedBuild, Outcome, TimedOut, from_json
from mctune.workers.pool import Reply, Workers
from mctune.workers.worker import WorkerDied, WorkerTimedOut

_AGAIN = {"unknown": 1, "machine": 1, "outside": 2}
"""How often a failure is tried again, by whose fault a worker says that it is."""
_TRIAL_LIMIT_S = 120.0


def checked(workers: Workers) -> None:
    """Refuse a machine that cannot build and run any kernel.

    Raises:
        DeviceError: with the reason.
    """
    why = workers.try_out(_TRIAL_LIMIT_S) and workers.try_out(_TRIAL_LIMIT_S)
    if why:
        raise DeviceError(_blameless(why))


def evaluated(
    workers: Workers, candidate: dict[str, Any], limit_s: float, until: float | None, *, measure: bool = True
) -> Outcome | None:
    """What became of a candidate, timed or predicted; ``None`` if it was not done by ``until``.

    Raises:
        DeviceError: where that says nothing of the candidate: the machine fails whatever it is given.
    """
    reply = workers.evaluate(candidate, limit_s, until, measure=measure)
    tries = 0
    while reply is not None and tries < _AGAIN.get(_fault(reply), 0):
        tries += 1
        reply = workers.evaluate(candidate, limit_s, until, measure=measure, again=True)
    if reply is None:
        return None
    if isinstance(reply, WorkerDied) and reply.fault == "machine":
        raise DeviceError(_blameless(f"{reply.message} ({reply.stage})"))
    outcome = outcome_of(reply)
    if isinstance(outcome, FailedBuild | Crashed | TimedOut):
        checked(workers)
    return outcome


def _blameless(why: str) -> str:
    return f"{why.removeprefix('DeviceError: ')}; no candidate is to blame: with this mended, the same command goes on"


def outcome_of(reply: Reply) -> Outcome:
    """The candidate's outcome in a worker's answer."""
    match reply:
        case WorkerDied(message, stage):
            return Crashed(f"{message} ({stage})")
        case WorkerTimedOut(seconds, stage):
            return TimedOut(seconds, stage)
        case _:
            return from_json(reply["outcome"])


def _fault(reply: Reply) -> str:
    """Whose fault a failure is that may not come again, as far as that is known; empty for every other reply."""
    if isinstance(reply, WorkerDied):
        return reply.fault or "unknown"
    if isinstance(reply, WorkerTimedOut):
        return ""
    return "unknown" if isinstance(from_json(reply["outcome"]), FailedBuild | Crashed) else ""
