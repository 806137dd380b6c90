"""Inside the worker process: build one candidate, verify it, time it; or time several finalists side by side."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from mctune.backends import get_backend
from mctune.backends.protocol import Backend, Built, Kernel
from mctune.core.config import Config
from mctune.core.errors import DeviceError, MctuneError
from mctune.core.outcome import Crashed, FailedBuild, Outcome, Timed, Wrong, describe, to_json
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.measure.clocks import clock_and_heat
from mctune.measure.timing import summary, time_rotated
from mctune.verify.inputs import Inputs, make_inputs, odd_problems
from mctune.verify.judge import Judged, judge_all, run_kernel, verify
from mctune.verify.passes import PASSES
from mctune.workers.worker import MACHINES, Handler, Stage

_ALWAYS_COMPILE = os.environ.get("TRITON_ALWAYS_COMPILE", "0")
_ROUNDS = 7
_FINAL_ROUNDS = 21
_TIMING_S = 2.0
_FINAL_S = 20.0


@dataclass(frozen=True)
class Prepared:
    """What another process has done for a candidate: it judged the cases in a file of that name, and built it."""

    cases: str | None = None
    built: Built | None = None

    @classmethod
    def of(cls, payload: dict[str, Any]) -> Prepared:
        """From ``{"prepared", "built"}``, where a payload has them."""
        built = payload.get("built")
        if built is not None:
            parts = tuple((name, file) for name, file in built["parts"])
            built = Built(Path(built["library"]), Path(built["source"]), parts)
        return cls(payload.get("prepared"), built)

    def judged(self) -> list[Judged]:
        """The judged cases; none if no process judged any."""
        return torch.load(self.cases, weights_only=False) if self.cases else []


@dataclass(frozen=True)
class _Bench:
    backend: Backend
    target: Target
    folder: Path
    seed: int

    def evaluate(self, problem: Problem, config: Config, prepared: Prepared, stage: Stage) -> Outcome:
        """What became of one candidate; a crash or hang takes the process with it, and the parent records it."""
        stage("build")
        try:
            kernel = self._load(problem, config, prepared.built)
        except (MctuneError, *MACHINES):
            raise
        except Exception as error:
            return FailedBuild(first_line(error))
        stage("verify")
        try:
            cases = prepared.judged() or judge_all(problem, seed_of(self.seed, problem, config))
            error_ = verify(partial(run_kernel, kernel), problem, cases)
        except Exception as error:
            if kernel.device != "cpu":
                raise  # an illegal access poisons the CUDA context: the parent starts another process
            return Crashed(first_line(error))
        if isinstance(error_, Wrong):
            return error_
        stage("time")
        call = self._call(kernel, problem)
        samples = time_rotated([call], rounds=_ROUNDS, limit_s=_TIMING_S, device=kernel.device)[0]
        ms, low, high = summary(samples)
        return Timed(ms, low, high, len(samples), error_, *clock_and_heat(kernel.device))

    def compare(self, candidates: list[tuple[Problem, Config, Built | None]], stage: Stage) -> list[list[float]]:
        """Milliseconds of each finalist in each round, in rotated order."""
        stage("build")
        kernels = [self._load(problem, config, built) for problem, config, built in candidates]
        calls = [self._call(kernel, problem) for kernel, (problem, _, _) in zip(kernels, candidates, strict=True)]
        stage("time")
        return time_rotated(calls, rounds=_FINAL_ROUNDS, limit_s=_FINAL_S, device=kernels[0].device)

    def ship(
        self, problem: Problem, config: Config, portable_arch: str | None, prepared: Prepared, stage: Stage
    ) -> dict[str, Any]:
        """The winner's files, and the same source for every CPU of ``portable_arch`` if that is given, all verified."""
        built, error = self._checked(problem, config, self.target, prepared, stage)
        reply = shipment(problem, built, error, f"run on {self.target.name}")
        if portable_arch is not None:
            portable, error = self._checked(
                problem, config, replace(self.target, arch=portable_arch), Prepared(), stage
            )
            reply["portable"] = str(portable.library)
            reply["errors"].append(error)
        return reply

    def _checked(
        self, problem: Problem, config: Config, target: Target, prepared: Prepared, stage: Stage
    ) -> tuple[Built, float]:
        """Build for ``target`` and verify.

        Raises:
            MctuneError: if the result is wrong.
        """
        stage("build")
        built = prepared.built or self.backend.build(problem, config, target, self.folder)
        stage("verify")
        kernel = self.backend.load(problem, config, built)
        cases = prepared.judged() or judge_all(problem, seed_of(self.seed, problem, config) + 1)
        error = verify(partial(run_kernel, kernel), problem, cases)
        if isinstance(error, Wrong):
            raise MctuneError(f"{problem} [{config}] built for {target.arch} is {describe(error)}")
        return built, error

    def _load(self, problem: Problem, config: Config, built: Built | None) -> Kernel:
        built = built or self.backend.build(problem, config, self.target, self.folder)
        return self.backend.load(problem, config, built)

    def _call(self, kernel: Kernel, problem: Problem) -> Callable[[], object]:
        # The tensors do not depend on how a row is cut into segments, and large ones take seconds to draw.
        drawn = problem.replace(segment_length=problem.T) if problem.segmentation == "constant" else problem
        return PASSES[problem.pass_].call(kernel, problem, _inputs(drawn, self.seed))


def start(setup: dict[str, Any]) -> Handler:
    """The worker's handler. ``setup``: backend, target, folder, seed, threads.

    A payload is ``{"evaluate": {"problem", "config"}}``, answered by ``{"outcome"}``, or
    ``{"ship": {"problem", "config"}, "portable_arch": a string or None}``, answered by what ``_Bench.ship`` returns,
    both with what another process has left, ``"prepared"`` and ``"built"``, or without; or
    ``{"compare": [{"problem", "config"}, ...]}``, each with its ``"built"`` or without, answered by ``{"samples"}``; or
    ``{"try_out": True}``, see :func:`try_out`.
    """
    torch.set_num_threads(setup["threads"])
    target, _ = resolve(setup["target"])
    bench = _Bench(get_backend(setup["backend"]), target, Path(setup["folder"]), setup["seed"])

    def handle(payload: dict[str, Any], stage: Stage) -> dict[str, Any]:
        if "try_out" in payload:
            return try_out(bench.backend, target, bench.folder, stage)
        at_work = replace(bench, folder=folder_for(payload, bench.folder))
        if "ship" in payload:
            return at_work.ship(*candidate(payload["ship"]), payload["portable_arch"], Prepared.of(payload), stage)
        if "compare" in payload:
            finalists = [(*candidate(values), Prepared.of(values).built) for values in payload["compare"]]
            return {"samples": bench.compare(finalists, stage)}
        problem, config = candidate(payload["evaluate"])
        return {"outcome": to_json(at_work.evaluate(problem, config, Prepared.of(payload), stage))}

    return handle


@lru_cache(maxsize=2)
def _inputs(problem: Problem, seed: int) -> Inputs:
    return make_inputs(problem, seed)


def seed_of(seed: int, problem: Problem, config: Config) -> int:
    """Fresh inputs for every candidate, the same ones when it is evaluated again."""
    text = f"{seed} {problem.key} {config.key}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def shipment(problem: Problem, built: Built, error: float, by: str) -> dict[str, Any]:
    """What a worker answers about a winner; ``by`` says where it was verified."""
    return {
        "library": str(built.library),
        "source": str(built.source),
        "parts": {name: str(built.library.parent / file) for name, file in built.parts},
        "portable": None,
        "errors": [error],
        "by": by,
        "cases": [str(case) for case in odd_problems(problem)],
    }


def folder_for(payload: dict[str, Any], folder: Path) -> Path:
    """Where a request's kernels are built: one that is made ``"again"`` uses nothing of what is kept on disk."""
    again = bool(payload.get("again_from_scratch"))
    os.environ["TRITON_ALWAYS_COMPILE"] = "1" if again else _ALWAYS_COMPILE
    if not again:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"again-{os.getpid()}-", dir=folder))


def try_out(backend: Backend, target: Target, folder: Path, stage: Stage) -> dict[str, Any]:
    """Build, load and run a kernel that anything can: what fails then is not a candidate's fault.

    Raises:
        DeviceError: with the reason.
    """
    stage("try out")
    try:
        backend.try_out(target, folder)
    except DeviceError:
        raise
    except Exception as error:
        raise DeviceError(f"a trial kernel failed: {first_line(error)}") from error
    return {}


def candidate(values: dict[str, Any]) -> tuple[Problem, Config]:
    return Problem.from_dict(values["problem"]), Config.of(values["config"])


def first_line(error: Exception) -> str:
    """An exception's type and the line that tells most, for an outcome: the last, but of torch's CUDA errors the first.

    Those end in advice; an assembler's end in how to call it again, and say before what is wrong.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    refused = [line for line in lines if re.match(r"ptxas\b.*\b(error|fatal)\b", line)]
    line = refused[0] if refused else lines[0 if "CUDA error" in lines[0] else -1] if lines else ""
    return f"{type(error).__name__}: {line[:300]}".rstrip(": ")
