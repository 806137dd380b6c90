"""Looks after the process in which `mctune bench` measures: what ends it or holds it up is left out of the next.

After an illegal access a CUDA context is of no more use, and a crash or an endless kernel says nothing: whatever was
being tried is recorded, and another process goes on.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from mctune.core import child
from mctune.core.remark import say
from mctune.measure.gpu.record import ALL, Identity, Record, Trying

COMMAND = tuple(child.command("mctune.measure.gpu.run"))
"""What measures, and compiles beforehand."""
AGAIN = 75
"""Exit status of a process that has recorded a fault and cannot go on."""
HANG_S = 150.0
"""A contender that takes longer, compiled as it is, or all of them together, do not end."""
_POLL_S, _PATIENCE_S = 0.2, 25.0


def supervise(command: Sequence[str], budget: float | None, out: Path, made_by: Identity, small: bool) -> int:
    """Have everything measured by processes of ``command``; the exit status of the last one."""
    deadline = None if budget is None else time.monotonic() + budget
    trying, record = Trying(out.with_suffix(".trying")), Record(out.with_suffix(".jsonl"), made_by)
    arguments = [*command, "--inside"]
    while True:
        trying.end()
        left = [] if deadline is None else ["--budget", f"{max(deadline - time.monotonic(), 0.0):.0f}"]
        status = _watched([*arguments, *left], trying, HANG_S * (4 if small else 1))
        at = trying.now()
        trying.end()
        if status >= 0 and status != AGAIN:
            return status
        if status < 0:
            name = signal.Signals(-status).name
            if at is None:
                say(f"the process that measures was ended by {name}")
                return 1
            what = "everything timed together" if at[1] == ALL else at[1]
            say(f"  {what} at {at[0]} ended the process that measures ({name}); it is left out")
            record.leave_out(at[0], {at[1]: f"it ended its process: {name}"})
        if "--again" not in arguments:
            arguments.append("--again")


def _watched(command: list[str], trying: Trying, hang_s: float) -> int:
    """The exit status of a process; one that does not get on is killed, and Ctrl-C is waited for."""
    process = subprocess.Popen(command)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_S)
            since = trying.since()
            if since is not None and time.time() - since > hang_s:
                process.kill()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return max(process.wait(_PATIENCE_S), 1)
        return 130
    finally:
        process.kill()
        process.wait()
