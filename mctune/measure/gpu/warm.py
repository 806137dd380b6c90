"""What `mctune bench` compares is compiled beforehand, side by side: each contender is run once in a process."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mctune.core.host import usable_cores
from mctune.core.remark import say
from mctune.measure.gpu.contenders import Contender, contenders
from mctune.measure.gpu.record import this_target
from mctune.measure.gpu.shapes import Data, Shape
from mctune.measure.gpu.supervise import COMMAND
from mctune.measure.gpu.tuners import compile_part

_CHECKED, _REHEARSED_S = 2048, 20.0
_PARTS = 8
"""Most processes among which the configurations of one contender's kernels are divided."""


@dataclass(frozen=True)
class Job:
    """A contender and a shape whose kernels it compiles, or a part of their configurations; they serve all of
    ``shapes``."""

    name: str
    shape: Shape
    shapes: tuple[Shape, ...]
    part: int = 0
    parts: int = 1


def jobs(chosen: Sequence[tuple[Shape, Contender]]) -> Iterator[Job]:
    """What to run so that every chosen contender finds its kernels: once at every width and segment length.

    A training step has the kernels of a forward too.
    """
    grouped: dict[tuple[object, ...], list[tuple[Shape, Contender]]] = {}
    for shape, contender in chosen:
        if contender.built:
            continue
        own = shape if contender.exact else None
        segment = shape.C if contender.name.startswith("mctune") else 0
        key = (contender.name, shape.kind == "decode", shape.D, segment, own)
        grouped.setdefault(key, []).append((shape, contender))
    for group in grouped.values():
        shape, contender = next((one for one in group if one[0].kind == "training"), group[0])
        if not contender.exact and shape.kind != "decode":
            shape = replace(shape, B=1, T=min(shape.T, max(4 * shape.C, _CHECKED)))
        parts = min(_PARTS, max(usable_cores() // 2, 1)) if contender.tunes else 1
        for part in range(parts):
            yield Job(contender.name, shape, tuple(shape for shape, _ in group), part, parts)


def warm(
    chosen: Sequence[tuple[Shape, Contender]], package: Path | None, small: bool, limit_s: float
) -> dict[tuple[Shape, str], str]:
    """Run every job; what each compiles is on disk then. Those that ``limit_s`` did not suffice for, and why.

    A rehearsal, which is ``small``, tries a few and goes without: an interpreter compiles nothing.
    """
    limit_s = min(limit_s, _REHEARSED_S) if small else limit_s
    deadline = time.monotonic() + limit_s
    # The tuner runs later, in the process that times: alone on the GPU it chooses better, from what is compiled here.
    env = {**os.environ, "FLA_CACHE_RESULTS": "0"}

    def run(job: Job) -> dict[tuple[Shape, str], str]:
        arguments = ["--one", json.dumps([asdict(job.shape), job.name, job.part, job.parts])]
        arguments += ["--package", str(package)] if package else []
        arguments += ["--small"] if small else []
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise subprocess.TimeoutExpired(arguments, limit_s)
            command = [*COMMAND, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=left, env=env)
        except subprocess.TimeoutExpired:
            say(f"  {job.name} is not compiled after {limit_s:.0f} s at {job.shape}")
            return {} if small else {(shape, job.name): f"not compiled after {limit_s:.0f} s" for shape in job.shapes}
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
            say(f"  {job.name} at {job.shape}: {lines[-1][:300]}")
        return {}

    pool = ThreadPoolExecutor(max(usable_cores() - 1, 1))
    try:
        late: dict[tuple[Shape, str], str] = {}
        for found in pool.map(run, jobs(chosen)):
            late |= found
        return late
    finally:
        pool.shutdown(cancel_futures=True)


def run_one(shape: Shape, name: str, part: int, parts: int, package: Path | None) -> None:
    """What a process of :func:`warm` does."""
    compile_part(part, parts)
    with tempfile.TemporaryDirectory() as folder:
        contender = next(c for c in contenders(shape, this_target(), package, Path(folder)) if c.name == name)
        contender.make(shape, Data.of(shape))()
