"""Compiles the kernels of `benchmarks/contact.py` before the GPU is asked for them: one kernel a process, many at once.

What a call launches is found by making the call on tensors without memory. Each of many processes makes all calls in
the same order and compiles those kernels that nobody has claimed yet, into Triton's cache on disk. A key of that cache
holds Triton and its ptxas, the source, the types of the arguments and the compute capability, nothing else of a GPU:
what is compiled here is what the process with the GPU finds.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contact_guard import Facts, told
from contact_kernels import Kernels

if TYPE_CHECKING:
    from mctune.core.config import Config
    from mctune.core.problem import Problem

_POLL_S = 0.1


@dataclass(frozen=True)
class Job:
    """A pass whose kernels are wanted. ``name``: what it is waited for by; ``state_dtype``: of decode's cached
    states; ``variables``: of the environment, which a compiler reads."""

    name: str
    problem: Problem
    config: Config
    state_dtype: str = "float32"
    variables: tuple[tuple[str, str], ...] = ()


@dataclass
class Claims:
    """Who compiles what: a file a kernel, made by the process that compiles it, and another once it is done."""

    folder: Path
    facts: Facts
    step: str
    wait_until: float | None = None
    """With a time, kernels that another process compiles are waited for until then; without, they are left to it."""
    mine: dict[str, float] = field(default_factory=dict)

    def take(self, what: str) -> bool:
        """Whether this process should do it: no living process has begun it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self._place(what)
        own = place.with_suffix(f".{os.getpid()}")
        own.write_text(str(os.getpid()))
        try:
            os.link(own, place)
        except FileExistsError:
            if self._in_hand(place):
                return False
            own.replace(place)
        finally:
            own.unlink(missing_ok=True)
        return True

    def skip(self, *, key: str, fn: Any, **_: Any) -> bool:
        """What Triton asks before it compiles, or reads from disk: whether not to, and not to launch either."""
        what = _kernel(key, fn)
        if self.take(what):
            self.mine[what] = time.monotonic()
            return False
        if self.wait_until is None:
            return True
        place = self._place(what)
        while time.monotonic() < self.wait_until and not _finished(place).exists() and self._in_hand(place):
            time.sleep(_POLL_S)
        return _finished(place).exists()

    def done(self, *, key: str, fn: Any, **_: Any) -> None:
        """What Triton says when it has."""
        what = _kernel(key, fn)
        _finished(self._place(what)).touch()
        began = self.mine.pop(what, None)
        if began is not None:
            self.facts.add(self.step, "compiled", kernel=fn.name, seconds=round(time.monotonic() - began, 1))

    def _place(self, what: str) -> Path:
        return self.folder / hashlib.sha256(what.encode()).hexdigest()[:24]

    @staticmethod
    def _in_hand(place: Path) -> bool:
        """Whether it is done, or the process that claimed it lives."""
        try:
            os.kill(int(place.read_text()), 0)
        except (OSError, ValueError):
            return _finished(place).exists()
        return True


def _kernel(key: str, fn: Any) -> str:
    return f"{fn.module} {fn.name} {key} {_variables()}"


def _variables() -> str:
    from mctune.backends.triton.safe import ENVIRONMENT

    return " ".join(os.environ.get(name, "") for name in ENVIRONMENT.values())


def _finished(place: Path) -> Path:
    return place.with_suffix(".done")


def compile_all(jobs: Sequence[Job], kernels: Kernels, claims: Claims) -> None:
    """Compile what no process has claimed. A failed job is recorded, and the others go on.

    One that another process is rendering waits until the others have been looked at.
    """
    left = list(jobs)
    while left:
        waiting = []
        for job in left:
            if not kernels.is_built(job.problem, job.config) and not claims.take(f"render {job.problem} {job.config}"):
                waiting.append(job)
                continue
            _compile(job, kernels, claims)
        if len(waiting) == len(left):
            time.sleep(_POLL_S)
        left = waiting


def _compile(job: Job, kernels: Kernels, claims: Claims) -> None:
    os.environ.update(job.variables)
    try:
        launches(job, kernels, claims)
    except Exception as error:
        claims.facts.add(claims.step, "not compiled", job=job.name, error=told(error))
    for name, _ in job.variables:
        del os.environ[name]


def launches(job: Job, kernels: Kernels, claims: Claims | None) -> Sequence[Any]:
    """What a pass launches, compiled for the target: without ``claims`` all of it."""
    from triton import knobs

    from mctune.backends.triton.calls import call_on_meta
    from mctune.backends.triton.device import VirtualDevice

    class Device(VirtualDevice):
        """One that makes Triton's own launchers too, for which a C compiler takes a while."""

        def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
            make_launcher(src, metadata)
            return super().launcher_cls(src, metadata)

    if claims is not None:
        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = claims.skip, claims.done
    with Device(kernels.target) as device:
        call_on_meta(job.problem, kernels.load(job.problem, job.config), state_dtype=job.state_dtype)
    return device.launches


def make_launcher(src: Any, metadata: Any) -> None:
    """Leave the launcher of a kernel in Triton's cache, where its libraries are; where they are not, do without."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(src, metadata)
    except Exception as error:
        if os.environ.get("MCTUNE_CONTACT_VERBOSE"):
            print(f"no launcher: {told(error)}")


def prepared(jobs: Sequence[Job], kernels: Kernels, folder: Path, facts: Facts, step: str, limit_s: float) -> None:
    """Wait until these are compiled; compile what no process has claimed."""
    claims = Claims(folder, facts, step, time.monotonic() + limit_s)
    compile_all(jobs, kernels, claims)


def predicted(jobs: Sequence[Job], kernels: Kernels, facts: Facts, step: str) -> None:
    """What every launch takes, which known hazards it may have, and what the cost model says of it: facts."""
    from mctune.backends.triton.cost.calibrated import calibration
    from mctune.backends.triton.cost.predict import demands, estimate
    from mctune.backends.triton.exposure import exposed

    parameters, calibrated = calibration(kernels.target)
    for job in jobs:
        try:
            made = tuple(launches(job, kernels, None))
            for launch in made:
                facts.add(
                    step, "kernel", job=job.name, kernel=launch.name, warps=launch.num_warps, stages=launch.num_stages,
                    registers=launch.registers, stack=launch.spills, shared=launch.shared, notes=launch.notes,
                    hazards=exposed(launch),
                )  # fmt: skip
            asked = demands(made, job.problem, job.config, kernels.target, parameters)
            parts = estimate(asked, kernels.target, parameters)
        except Exception as error:
            facts.add(step, "not predicted", job=job.name, error=told(error))
            continue
        facts.add(
            step, "predicted", job=job.name, calibrated=calibrated, us=sum(part.us for part in parts),
            kernels=[{"kernel": part.name, "us": part.us, "bound": part.bound} for part in parts],
        )  # fmt: skip


def fresh(function: Callable[[], object]) -> None:
    """Run a partial of this module in another python, which has imported nothing yet, without the interpreter."""
    here = Path(__file__).resolve().parent
    # Through a pipe: a file could be another's by the time that it is read.
    code = "import sys; sys.path.remove(''); import pickle; pickle.load(sys.stdin.buffer)()"
    paths = os.pathsep.join([str(here), str(here.parent), *(path for path in sys.path if path)])
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, input=pickle.dumps(function), env={**env, "PYTHONPATH": paths}, check=True)


def environment(work: Path) -> Mapping[str, str]:
    """Where all processes find what one has compiled."""
    return {"TRITON_CACHE_DIR": str((work / "triton").resolve())}
