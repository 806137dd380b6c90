"""Processes that a candidate leaves behind: they become children of this one (Linux), and are ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_LIMIT_S = 5.0


def adopt() -> None:
    """From now on the orphans among this process's descendants become its children, whatever session they are in."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> None:
    """End every child and what becomes a child by that, until there is none."""
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        found = _children()
        for child in found:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for child in found:
            try:
                os.waitpid(child, 0)
            except ChildProcessError:
                continue
        if not found:
            return


def _children() -> list[int]:
    """The children of this process; none where the system does not say."""
    try:
        tasks = Path("/proc/self/task").iterdir()
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:
        return _children_by_parent()


def _children_by_parent() -> list[int]:
    """The same on a kernel that does not list them."""
    found, own = [], os.getpid()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == own:
            found.append(int(status.parent.name))
    return found
