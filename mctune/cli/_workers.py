"""More workers of one search on this machine: the same command in processes of their own, which search and no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mctune.cli._output import say
from mctune.core.errors import UsageError
from mctune.core.host import usable_cores
from mctune.core.target import Target

_JOIN = ("--workers", "1", "--join")
"""What a worker's command has besides this one's: search alone, and leave what was found to others."""
_DEVICES = "CUDA_VISIBLE_DEVICES"
_GRACE_S = 20.0
"""Workers that others have left nothing to do end by themselves."""


def check_workers(count: int, target: Target, measure: bool, storage: str | None) -> None:
    """Refuse what several workers cannot do on this machine.

    Raises:
        UsageError: with the remedy.
    """
    if count == 1:
        return
    from mctune.study.storage import shared, url_of

    if not shared(storage and url_of(storage)):
        raise UsageError(
            f"--workers {count}: a SQLite file is searched by one process; give a server that all of them reach, "
            "--storage postgresql://USER@HOST/DATABASE (pip install 'mctune[postgresql]')"
        )
    if target.on_cpu:
        raise UsageError(
            f"--workers {count}: one search has all cores of this CPU already, and two would disturb each other's "
            "timings; run the same command on other machines with the same CPU"
        )
    most, what = (len(_devices()), "GPUs") if measure else (usable_cores(), "cores")
    if count > most:
        raise UsageError(f"--workers {count}: this machine has {most} {what}, one for each worker; at most {most}")


@contextmanager
def joined(count: int, measure: bool, logs: Path) -> Iterator[None]:
    """Have ``count`` workers in all, this process the first of them, until the body ends; ``logs`` has what they say.

    Each has a GPU of its own, or where times are predicted a share of the cores.
    """
    if count == 1:
        yield
        return
    shares = [{_DEVICES: device} for device in _devices()] if measure else [{} for _ in range(count)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        workers = {}
        for number in range(1, count):
            log = stack.enter_context((logs / f"worker-{number}.log").open("w"))
            command = [sys.executable, "-m", "mctune", *sys.argv[1:], *_JOIN]
            # What a child inherits is set before it begins: it looks at neither before.
            if not measure:
                _confine(cores[number::count])
            env = {**os.environ, **shares[number]}
            workers[number] = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(_end, number, workers[number], logs / f"worker-{number}.log")
        if measure:
            os.environ |= shares[0]
        else:
            _confine(cores[::count])
        try:
            yield
        except BaseException:
            for worker in workers.values():
                worker.send_signal(signal.SIGINT)
            raise
        finally:
            if not measure:
                _confine(cores)


def _confine(cores: Sequence[int]) -> None:
    """Have this process, and those that it starts from now on, use just these cores, where that can be said."""
    if cores:
        os.sched_setaffinity(0, cores)


def _end(number: int, worker: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a worker, interrupt one that goes on, and say so if it failed."""
    try:
        worker.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        worker.send_signal(signal.SIGINT)
        try:
            worker.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    if worker.returncode not in (0, 130, -signal.SIGINT):
        say(f"worker {number} ended with exit code {worker.returncode}; {log} says why. What it had found is kept")


def _devices() -> list[str]:
    """The GPUs that this process may use, as their driver names or numbers them."""
    given = os.environ.get(_DEVICES)
    if given is not None:
        return [name for name in given.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
