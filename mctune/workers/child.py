"""The child's side of a worker: messages in, answers out, and each message in a process of its own where that is asked.

A handler whose attribute ``isolated`` is true (Linux) is run in a fork of the child for every message. What a
candidate leaves behind (overwritten tensors, a removed working directory, an environment, signal handlers, rounding
modes, threads, memory, processes in sessions of their own) ends with that fork; the child itself never runs one.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mctune.core.errors import DeviceError
from mctune.workers.orphans import adopt, end_children
from mctune.workers.watch import Ended, Late, Watched, watch

Stage = Callable[[str], None]
Handler = Callable[[dict[str, Any], Stage], dict[str, Any]]
Send = Callable[[str, Any], None]

MACHINES = (DeviceError, OSError)
"""What is raised where a machine, not a candidate, is at fault: no space, no permission, no compiler."""
LOG_TAIL = 4000
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """The child: ``ENTRY REQUEST_FD ANSWER_FD PARENT_PID``, then JSON lines until the request pipe closes."""
    entry, requests, answers, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    _die_with(parent, signal.SIGKILL)
    faulthandler.enable()
    os.set_inheritable(requests, False)
    os.set_inheritable(answers, False)
    handler: Handler | None = None
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            message = json.loads(line)

            def send(kind: str, content: Any, number: str = message["number"]) -> None:
                write_all(answers, answer_line(number, kind, content))

            if handler is not None and getattr(handler, "isolated", False):
                _isolated(handler, message, (requests, answers), send)
                continue
            try:
                if handler is None:
                    handler = _entry(entry)(message["payload"])
                    reply: dict[str, Any] = {"isolated": bool(getattr(handler, "isolated", False))}
                    if reply["isolated"]:
                        _stand_apart(parent)
                else:
                    reply = handler(message["payload"], lambda name: send("stage", name))
                send("last" if _grown(handler) else "reply", reply)
            except BaseException as error:
                send("raised", _raised(error))
                # No interpreter shutdown: it may hang or crash on what the candidate left behind.
                os._exit(1)
    end_children()
    os._exit(0)


def answer_line(number: str, kind: str, content: Any) -> bytes:
    """One line of the protocol; ``number`` is that of the request, which nobody else knows."""
    return json.dumps({"number": number, "kind": kind, "content": content}).encode() + b"\n"


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data``."""
    while data:
        data = data[os.write(fd, data) :]


def _raised(error: BaseException) -> dict[str, str]:
    """What is told of an exception under way."""
    fault = "machine" if isinstance(error, MACHINES) else ""
    return {"message": one_line(error), "traceback": traceback.format_exc()[-LOG_TAIL:], "fault": fault}


def one_line(error: BaseException) -> str:
    """An exception's type and text in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def _entry(entry: str) -> Callable[[Any], Handler]:
    module, _, function = entry.partition(":")
    found: Callable[[Any], Handler] = getattr(importlib.import_module(module), function)
    return found


def _stand_apart(parent: int) -> None:
    """Become what ends everything that a candidate starts: its orphans come here, and go when this process is ended."""
    adopt()
    os.chdir("/")

    def end(*_: object) -> None:
        end_children()
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    _die_with(parent, signal.SIGTERM)


def _isolated(handler: Handler, message: dict[str, Any], pipes: tuple[int, int], send: Send) -> None:
    """Answer ``message`` from a fork, which has an empty directory to work in."""
    try:
        folder = tempfile.mkdtemp(prefix="mctune-candidate-")
    except OSError as error:
        send("raised", _raised(error))
        return
    try:
        lines, into = os.pipe()
        child = os.fork()
        if child == 0:
            for fd in (*pipes, lines):
                os.close(fd)
            _run(handler, message, into, folder)
        os.close(into)
        try:
            watched = Watched(child, lines, message["number"], message["limit_s"])
            ended = watch(watched, lambda name: send("stage", name))
        finally:
            os.close(lines)
            end_children()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    match ended:
        case Late(seconds, stage):
            send("late", {"seconds": seconds, "stage": stage})
        case Ended(kind, content):
            send(kind, content)


def _run(handler: Handler, message: dict[str, Any], into: int, folder: str) -> None:
    """In the fork: one message, then the end."""
    number = message["number"]
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _die_with(os.getppid(), signal.SIGKILL)
        os.chdir(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        limit_memory(getattr(handler, "memory_bytes", None))
        reply = handler(message["payload"], lambda name: write_all(into, answer_line(number, "stage", name)))
        write_all(into, answer_line(number, "reply", reply))
    except BaseException as error:
        write_all(into, answer_line(number, "raised", _raised(error)))
    finally:
        os._exit(0)


def limit_memory(more: int | None) -> None:
    """Let this process have so many bytes more than it has now; by default most of what the machine has left."""
    import resource

    if more is None:
        more = int(0.8 * _available())
    held = _field("/proc/self/status", "VmData")
    if held and more:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (held + more, hard))


def _grown(handler: Handler) -> bool:
    """Whether this process holds so much memory that another should take its place."""
    most = getattr(handler, "memory_bytes", None) or _field("/proc/meminfo", "MemTotal") // 2
    return 0 < most < _field("/proc/self/status", "VmRSS")


def _available() -> int:
    """Bytes that the machine, and the group that this process is in, have left; 0 where that is not known."""
    found = _field("/proc/meminfo", "MemAvailable")
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        # Cached files count as used and are given up first.
        cached = int(dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["file"])
        return min(found, int(limit) - used + cached) if limit != "max" else found
    except (OSError, ValueError, KeyError):
        return found


def _field(file: str, name: str) -> int:
    """A field of /proc in bytes; 0 where there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _die_with(parent: int, how: signal.Signals) -> None:
    """Have the kernel send ``how`` when the thread that started this process ends (Linux), which does with its process;
    elsewhere the closing pipe ends an idle one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call
            end_children()
            os._exit(1)
