"""Inside the worker process: build one candidate, verify it, time it; or time several finalists side by side."""

from __future__ import annotations

import hashlib
import importlib
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mctune.backends import get_backend
from mctune.backends.protocol import Backend, Built, Kernel, Watch, unwatched
from mctune.core.config import Config
from mctune.core.errors import MctuneError
from mctune.core.outcome import Crashed, Outcome, Predicted, Timed, Wrong, describe, to_json
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.measure.clocks import clock_and_heat
from mctune.measure.parts import Clock, time_parts
from mctune.measure.side_by_side import side_by_side
from mctune.measure.timing import ratio, summary
from mctune.runtime.manifest import digest
from mctune.verify.at_size import AtSize, at_size
from mctune.verify.inputs import odd_problems, sized_problems
from mctune.verify.judge import Judged, judge_all, kept_cases, load_cases, run_kernel, tolerance, verify
from mctune.verify.rerun import CANDIDATE, FINALIST, Effort, Miss, Reruns
from mctune.workers.payload import Beside, candidate, failed_build, first_line, folder_for, maker_of, try_out
from mctune.workers.watch import REFERENCE
from mctune.workers.worker import MACHINES, Handler, Stage

_DRAWS = 4
"""What the oracle says of one takes a second of a backward; what may ship meets inputs that no candidate has met."""
_ROUNDS = 7
_MOST = 28  # where the machine is not quiet
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
        return load_cases(self.cases) if self.cases else []


@dataclass(frozen=True)
class _Bench:
    backend: Backend
    """Of the candidate at work."""
    target: Target
    folder: Path
    references: Path
    """Where the cases at size are kept."""
    seed: int

    def evaluate(
        self, problem: Problem, config: Config, prepared: Prepared, stage: Stage, beside: Beside | None = None
    ) -> Outcome:
        """What became of one candidate; a crash or hang takes the process with it, and the parent records it.

        With another one ``beside`` it, the outcome says at what pace the machine was.
        """
        begun = time.monotonic()
        stage("build")
        clock = Clock("cuda" if torch.cuda.is_available() and not self.target.on_cpu else "cpu")
        try:
            kernel = self._load(problem, config, prepared.built, clock.watch)
        except (MctuneError, *MACHINES):
            raise
        except Exception as error:
            return failed_build(error)
        others = [] if beside is None else [self._load(problem, beside.config, None)]
        stage(REFERENCE)
        cases = self._at_size(kernel, problem)
        judged = prepared.judged() or kept_cases(problem, draw_of(self.seed, problem, config), self.references)
        stage("verify")
        samples: list[list[float]] = []
        parts: tuple[tuple[str, float], ...] = ()

        def timed(held: Reruns) -> None:
            nonlocal samples, parts
            rest = [Reruns(other, cases[0], held) for other in others]
            samples, parts = time_parts(
                held, clock, rounds=_ROUNDS, most=_MOST, limit_s=_TIMING_S, device=kernel.device, beside=rest
            )
            held.repeat(CANDIDATE, time.monotonic() - begun)

        try:
            error_ = _verify(kernel, problem, judged, CANDIDATE)
            if isinstance(error_, Wrong):
                return error_
            stage("time")
            for case in cases[1:]:
                _hold(Reruns(kernel, case))
            _hold(Reruns(kernel, cases[0]), timed)
        except Miss as miss:
            return miss.outcome
        except Exception as error:
            if kernel.device != "cpu":
                raise  # an illegal access poisons the CUDA context: the parent starts another process
            return Crashed(first_line(error))
        ms, low, high = summary(samples[0])
        pace = ms / (beside.ms * ratio(samples[0], samples[1])) if beside else 1.0
        return Timed(ms, low, high, len(samples[0]), error_, *clock_and_heat(kernel.device), parts=parts, pace=pace)

    def check(
        self, problem: Problem, config: Config, prepared: Prepared, stage: Stage, target: Target | None = None
    ) -> tuple[Built, float | Wrong]:
        """Hold what may ship to the oracle again, on other inputs, and ten times as often to all else."""
        begun = time.monotonic()
        stage("build")
        built = prepared.built or self.backend.build(problem, config, target or self.target, self.folder)
        kernel = self.backend.load(problem, config, built)
        stage(REFERENCE)
        cases = self._at_size(kernel, problem)
        stage("verify")
        judged = prepared.judged() or judge_all(problem, seed_of(self.seed, problem, config) + 1)
        # Triton's interpreter takes one step after the other: runs differ in nothing there.
        effort = CANDIDATE if kernel.device == "cpu" and not self.target.on_cpu else FINALIST
        error = _verify(kernel, problem, judged, effort)
        if isinstance(error, Wrong):
            return built, error
        try:
            for case in cases:
                _hold(Reruns(kernel, case), lambda held: held.repeat(effort, time.monotonic() - begun))
        except Miss as miss:
            return built, miss.outcome
        return built, error

    def compare(
        self, candidates: list[tuple[Problem, Config, Built | None]], stage: Stage
    ) -> tuple[list[list[float]], list[str]]:
        """Milliseconds of each finalist in each round, in rotated order; and what was wrong with those without any."""
        stage("build")
        kernels = [self._load(problem, config, built) for problem, config, built in candidates]
        stage(REFERENCE)
        cases = [self._at_size(kernel, one[0])[0] for kernel, one in zip(kernels, candidates, strict=True)]
        stage("time")
        timed, failures = side_by_side(kernels, cases, rounds=_FINAL_ROUNDS, limit_s=_FINAL_S)
        return timed, list(failures.values())

    def ship(
        self,
        problem: Problem,
        config: Config,
        portable_arch: str | None,
        prepared: Prepared,
        held: dict[str, float],
        stage: Stage,
    ) -> dict[str, Any]:
        """The winner's files, and the same source for every CPU of ``portable_arch`` if that is given, all verified.

        ``held``: the errors of those that were checked already in this search, by :func:`fingerprint`.
        """
        built, error = self._checked(problem, config, self.target, prepared, held, stage)
        reply = shipment(problem, built, error, f"run on {self.target.name}")
        if portable_arch is not None:
            # What was just checked need not be again where the portable form is that of this CPU.
            known = {**held, fingerprint(built): error}
            portable, error = self._checked(
                problem, config, replace(self.target, arch=portable_arch), Prepared(), known, stage
            )
            reply["portable"] = str(portable.library)
            reply["errors"].append(error)
        reply["cases"] += [str(case) for case in sized_problems(problem)]
        return reply

    def _checked(
        self, problem: Problem, config: Config, target: Target, prepared: Prepared, held: dict[str, float], stage: Stage
    ) -> tuple[Built, float]:
        """Build for ``target`` and check, unless just these files are ``held``.

        Raises:
            MctuneError: if the result is wrong.
        """
        stage("build")
        built = prepared.built or self.backend.build(problem, config, target, self.folder)
        known = held.get(fingerprint(built))
        if known is not None:
            return built, known
        built, error = self.check(problem, config, replace(prepared, built=built), stage, target)
        if isinstance(error, Wrong):
            raise MctuneError(f"{problem} [{config}] built for {target.arch} is {describe(error)}")
        return built, error

    def _load(self, problem: Problem, config: Config, built: Built | None, watch: Watch = unwatched) -> Kernel:
        built = built or self.backend.build(problem, config, self.target, self.folder)
        return self.backend.load(problem, config, built, watch)

    def _at_size(self, kernel: Kernel, problem: Problem) -> list[AtSize]:
        return [at_size(kernel, one, self.seed, self.references) for one in sized_problems(problem)]


def _verify(kernel: Kernel, problem: Problem, cases: Iterable[Judged], effort: Effort) -> float | Wrong:
    exact = getattr(kernel, "pair_order", None) is None
    return verify(partial(run_kernel, kernel), problem, cases, effort.repeats, exact)


def _hold(held: Reruns, between: Callable[[Reruns], None] = lambda held: None) -> None:
    """Hold a kernel at size before and after what is between."""
    held.first()
    between(held)
    held.last()


@dataclass(frozen=True)
class _Handler:
    """The handler, with what the process that calls it asks of it."""

    bench: _Bench
    isolated: bool
    memory_bytes: int | None

    def __call__(self, payload: dict[str, Any], stage: Stage) -> dict[str, Any]:
        maker = maker_of(payload)
        backend = self.bench.backend if maker is None else get_backend(maker)
        if "try_out" in payload:
            return try_out(backend, self.bench.target, self.bench.folder, stage)
        bench = replace(self.bench, backend=backend, folder=folder_for(payload, self.bench.folder))
        prepared = Prepared.of(payload)
        if "ship" in payload:
            held = payload.get("held", {})
            return bench.ship(*candidate(payload["ship"]), payload["portable_arch"], prepared, held, stage)
        if "check" in payload:
            built, error = bench.check(*candidate(payload["check"]), prepared, stage)
            if isinstance(error, Wrong):
                return {"outcome": to_json(error)}
            return {"outcome": to_json(Predicted(0.0, "", error)), "held": {fingerprint(built): error}}
        if "compare" in payload:
            finalists = [(*candidate(values), Prepared.of(values).built) for values in payload["compare"]]
            samples, failures = bench.compare(finalists, stage)
            return {"samples": samples, "failures": failures}
        asked = payload["evaluate"]
        return {"outcome": to_json(bench.evaluate(*candidate(asked), prepared, stage, Beside.of(asked)))}


def start(setup: dict[str, Any]) -> Handler:
    """The worker's handler. ``setup``: backend, target, folder, seed, threads, and bytes of memory for a candidate.

    A candidate's ``"maker"``, where it has one, is the backend instead. Payloads and what answers them:

    * ``{"evaluate": {"problem", "config"}}``, perhaps with another one ``"beside"`` it: ``{"outcome"}``;
    * ``{"check": ...}``: ``{"outcome"}`` without a time and, if it is right, ``"held"``, its error by fingerprint;
    * ``{"ship": ..., "portable_arch": a string or None, "held": what was checked before}``: what ``_Bench.ship``
      returns;
    * ``{"compare": [{"problem", "config"}, ...]}``, each with its ``"built"`` or without: ``{"samples", "failures"}``;
    * ``{"try_out": True}``: see :func:`try_out`.

    The first three may have what another process has left: ``"prepared"`` and ``"built"``.

    On a CPU every payload has a process of its own, a fork of this one. A GPU cannot be used in a fork.
    """
    torch.set_num_threads(setup["threads"])
    target, _ = resolve(setup["target"])
    folder = Path(setup["folder"])
    bench = _Bench(get_backend(setup["backend"]), target, folder, folder / "references", setup["seed"])
    isolated = target.on_cpu and sys.platform == "linux"
    if isolated:
        # Forks have what is imported before; each of them would take seconds.
        for name in ("tvm", "tvm_ffi"):
            with suppress(ImportError):
                importlib.import_module(name)
    return _Handler(bench, isolated, setup.get("memory_bytes"))


def seed_of(seed: int, problem: Problem, config: Config) -> int:
    """Fresh inputs for what may ship, the same ones when it is held to them again."""
    text = f"{seed} {problem.key} {config.key}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def draw_of(seed: int, problem: Problem, config: Config) -> int:
    """The inputs that a candidate meets: one of a few draws, which a study's candidates share, see ``_DRAWS``."""
    return (seed * _DRAWS + seed_of(seed, problem, config) % _DRAWS) % 2**32


def fingerprint(built: Built) -> str:
    """A digest of all files that are run of a candidate."""
    files = (built.library, *(built.library.parent / file for _, file in built.parts))
    return digest(" ".join(digest(file.read_bytes()) for file in files).encode())


def shipment(problem: Problem, built: Built, error: float, by: str) -> dict[str, Any]:
    """What a worker answers about a winner; ``by`` says where it was verified."""
    return {
        "tolerance": tolerance(problem),
        "library": str(built.library),
        "source": str(built.source),
        "parts": {name: str(built.library.parent / file) for name, file in built.parts},
        "portable": None,
        "errors": [error],
        "by": by,
        "cases": [str(case) for case in odd_problems(problem)],
    }
