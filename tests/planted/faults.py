"""What a kernel may do wrong, planted on one that is right: it acts on the arrays that the kernel itself is given.

A fault is a function of :class:`Run`. ``Run.draw`` gives its random numbers, the same ones for the same candidate.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

TIMED_T = 400
"""Tokens of the problem that the planted candidates are timed at."""
SEGMENT = 96


@dataclass(frozen=True)
class Run:
    """One run of a kernel that was right so far: its arrays and numbers by name, and random numbers of the candidate.

    ``draw`` begins anew in each run, ``chance`` does not.
    """

    values: Mapping[str, Any]
    draw: random.Random
    chance: random.Random

    @property
    def y(self) -> torch.Tensor:
        y: torch.Tensor = self.values["y"]
        return y

    @property
    def T(self) -> int:
        return int(self.values["tokens"])

    @property
    def lanes(self) -> int:
        return self.y.shape[0] // self.T


def spoil(run: Run) -> None:
    """Make y wrong: a number, a row, all of it; by little or by much."""
    y = run.y
    row = run.draw.randrange(len(y))
    match run.draw.randrange(5):
        case 0:
            y[row] += 0.02 * y.abs().mean()
        case 1:
            y[row, run.draw.randrange(y.shape[1])] += y.abs().mean()
        case 2:
            y *= 1.001
        case 3:
            y[row] = float("nan")
        case _:
            y[row] = 0.0


def _beside(x: torch.Tensor, offset: int, value: float) -> None:
    """Write a number ``offset`` numbers from the begin of ``x``."""
    ctypes.c_float.from_address(x.data_ptr() + 4 * offset).value = value


def before(run: Run, name: str) -> None:
    _beside(run.values[name], -run.draw.randint(1, 16), run.draw.choice((0.0, 1.0, -3.5)))


def after(run: Run, name: str) -> None:
    x = run.values[name]
    _beside(x, x.numel() - 1 + run.draw.randint(1, 16), run.draw.choice((0.0, 1.0, -3.5)))


def _touch(x: torch.Tensor, draw: random.Random) -> None:
    flat = x.view(-1)
    flat[draw.randrange(len(flat))] += 1


def overwrites(run: Run, name: str) -> None:
    _touch(run.values[name], run.draw)


def one_in(run: Run, n: int) -> None:
    if run.chance.random() < 1 / n:
        spoil(run)


def writes_everywhere(run: Run) -> None:
    """What other parts of this process have cached: tensors that the collector knows."""
    import gc

    for x in gc.get_objects():
        if type(x) is torch.Tensor and x.is_floating_point() and x.device.type == "cpu":
            x.data.mul_(1.5)


def forge(run: Run) -> None:
    """Answers on everything that is open, and on what a kernel prints to."""
    lines = b'{"number": "0", "kind": "reply", "content": {"outcome": "{}"}}\n' * run.draw.randint(1, 3)
    for fd in range(1, 64):
        try:
            os.write(fd, lines)
        except OSError:
            continue


def leak(run: Run) -> None:
    """State of the process, wrong from now on."""
    match run.draw.randrange(6):
        case 0:
            os.environ.update(OMP_NUM_THREADS="x", PATH="", TMPDIR="/nowhere", CC="false", CXX="false")
        case 1:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_IGN)
        case 2:
            torch.set_flush_denormal(True)
            ctypes.CDLL("libm.so.6").fesetround(0x400)  # downwards
        case 3:
            torch.set_num_threads(1)
            torch.set_default_dtype(torch.float16)
        case 4:
            torch.manual_seed(0)
            torch.use_deterministic_algorithms(True)
        case _:
            resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))


def removes_directory(run: Run) -> None:
    shutil.rmtree(os.getcwd(), ignore_errors=True)


def hog(run: Run) -> None:
    held = []
    while True:
        held.append(torch.ones(1 << 24))


def starts_a_session(run: Run) -> None:
    """A child that would outlive the search, as many as it gets time for."""
    subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(3600)", "mctune-planted"], start_new_session=True
    )


def hang(run: Run) -> None:
    while True:
        time.sleep(1)


def crash(run: Run) -> None:
    match run.draw.randrange(4):
        case 0:
            os.abort()
        case 1:
            ctypes.string_at(8)
        case 2:
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            os._exit(0)


def when(condition: Callable[[Run], bool], fault: Callable[[Run], None]) -> Callable[[Run], None]:
    def planted(run: Run) -> None:
        if condition(run):
            fault(run)

    return planted


def _several(run: Run) -> bool:
    """Whether there are several segments of the timed length."""
    lengths = run.values["end"] - run.values["begin"]
    return int((lengths == SEGMENT).sum()) >= 2


def _of(fault: Callable[..., None], *arguments: Any) -> Callable[[Run], None]:
    return lambda run: fault(run, *arguments)


def _at_size(run: Run) -> bool:
    return run.T == TIMED_T


WRONG: Mapping[str, Callable[[Run], None]] = {
    "wrong": spoil,
    "large_T": when(lambda run: run.T >= TIMED_T - 12, spoil),
    "timed_T": when(_at_size, spoil),
    "several_segments": when(_several, spoil),
    "many_heads": when(lambda run: run.lanes > 4, spoil),
    "one_in_twenty": _of(one_in, 20),
    "one_in_twenty_at_size": when(_at_size, _of(one_in, 20)),
    **{f"overwrites_{name}": _of(overwrites, name) for name in ("q", "k", "v", "u")},
    "overwrites_at_size": when(_at_size, _of(overwrites, "v")),
    **{f"overwrites_{name}": _of(overwrites, name) for name in ("begin", "end", "first")},
    "overwrites_segments_at_size": when(_at_size, _of(overwrites, "first")),
    **{f"before_{name}": _of(before, name) for name in ("y", "q", "v", "states", "means")},
    **{f"after_{name}": _of(after, name) for name in ("y", "q", "v", "states", "means")},
    "before_y_at_size": when(_at_size, _of(before, "y")),
    "after_y_at_size": when(_at_size, _of(after, "y")),
    "crash": crash,
    "crash_at_size": when(_at_size, crash),
    "hang": hang,
    "hang_at_size": when(_at_size, hang),
    "hog": hog,
}
"""None of these may be recorded as right."""
HARMFUL: Mapping[str, Callable[[Run], None]] = {
    "none": lambda run: None,
    "writes_everywhere": writes_everywhere,
    "forges": forge,
    "leaks": leak,
    "removes_directory": removes_directory,
    "starts_a_session": starts_a_session,
}
"""Whatever becomes of these, the candidates after them are judged as ever; ``none`` is right."""
SLOW = ("hang", "hang_at_size", "hog")
"""They take as long as they are let."""
