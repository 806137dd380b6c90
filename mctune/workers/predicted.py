"""Inside a worker process: candidates for a GPU that this process does not run on, compiled and predicted; or verified.

Triton chooses its interpreter when it is imported: one process compiles (``evaluate``), another verifies (``verify``,
``ship``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mctune.backends import get_backend
from mctune.backends.protocol import Backend
from mctune.backends.triton.cost.predict import predict
from mctune.core.config import Config
from mctune.core.errors import MctuneError
from mctune.core.outcome import Crashed, Outcome, Predicted, Wrong, describe, to_json
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.verify.cuda_cpu.finalist import reports
from mctune.verify.cuda_cpu.folder import prepare_built
from mctune.verify.inputs import judged, odd_problems
from mctune.verify.judge import judge_all, kept_cases, run_kernel, save_cases, verify
from mctune.workers.evaluate import Prepared, draw_of, fingerprint, seed_of, shipment
from mctune.workers.making import build
from mctune.workers.payload import candidate, failed_build, first_line, folder_for, maker_of, try_out
from mctune.workers.worker import MACHINES, Handler, Stage

_BY = {
    "triton": "Triton's interpreter on a CPU, bfloat16 kernels in float16",
    "tvm": "their CUDA C on a CPU, under ThreadSanitizer and AddressSanitizer too",
}
"""What verifies, by backend."""


@dataclass(frozen=True)
class _Predictor:
    backend: Backend
    target: Target
    folder: Path
    seed: int

    def evaluate(self, problem: Problem, config: Config, stage: Stage) -> Outcome:
        """Compile one candidate and predict its time."""
        stage("build")
        try:
            built = self.backend.build(problem, config, self.target, self.folder)
            launches = self.backend.compile(problem, config, built, self.target)
        except (MctuneError, *MACHINES):
            raise
        except Exception as error:
            return failed_build(error)
        if not isinstance(launches, tuple):
            return launches
        stage("predict")
        return predict(launches, problem, config, self.target)

    def prepare(self, problem: Problem, config: Config, into: str, again: bool, stage: Stage) -> dict[str, Any]:
        """The same, for a candidate that will be run by another process, which then finds everything done.

        If it compiles, so do the variants of its kernels that odd sizes take; what it is held to is left in a file, on
        other inputs if that is done ``again``.
        """
        outcome = self.evaluate(problem, config, stage)
        if not isinstance(outcome, Predicted):
            return {"outcome": to_json(outcome), "ready": False}
        files = self.build(problem, config, stage)
        built = Prepared.of(files).built
        assert built is not None
        stage("compile")
        for case in odd_problems(problem):
            try:
                launches = self.backend.compile(case, config, built, self.target)
            except Exception as error:
                failed = failed_build(error)
                return {"outcome": to_json(replace(failed, message=f"{failed.message} on {case}")), "ready": False}
            if not isinstance(launches, tuple):
                return {"outcome": to_json(launches), "ready": False}
        stage("judge")
        if again:
            save_cases(judge_all(problem, seed_of(self.seed, problem, config) + 1), into)
        else:
            save_cases(kept_cases(problem, draw_of(self.seed, problem, config), self.folder / "references"), into)
        return {"outcome": to_json(outcome), "ready": True, **files}

    def build(self, problem: Problem, config: Config, stage: Stage) -> dict[str, Any]:
        """The files of a candidate."""
        return build(self.backend, problem, config, self.target, self.folder, stage)

    def verify(self, problem: Problem, config: Config, stage: Stage) -> Outcome:
        """Whether one candidate is right: ``Predicted``, without a time but with its error, if it is."""
        stage("verify")
        try:
            built = self.backend.build(problem, config, self.target, self.folder)
            if self.backend.maker == "tvm.gpu":
                stage("build")
                prepare_built(built)
                stage("verify")
            kernel = self.backend.load(problem, config, built)
            cases = judge_all(self._judged(problem), seed_of(self.seed, problem, config))
            error = verify(partial(run_kernel, kernel), self._judged(problem), cases)
        except (MctuneError, *MACHINES):
            raise
        except Exception as error_:
            return Crashed(first_line(error_))
        return error if isinstance(error, Wrong) else Predicted(0.0, "", error)

    def held(self, problem: Problem, config: Config, stage: Stage) -> dict[str, Any]:
        """The same as a worker's answer."""
        outcome = self.verify(problem, config, stage)
        if not isinstance(outcome, Predicted) or outcome.error is None:
            return {"outcome": to_json(outcome)}
        built = self.backend.build(problem, config, self.target, self.folder)
        return {"outcome": to_json(outcome), "held": {fingerprint(built): outcome.error}}

    def ship(self, problem: Problem, config: Config, held: dict[str, float], stage: Stage) -> dict[str, Any]:
        """The winner's files, verified, unless just these are ``held``.

        Raises:
            MctuneError: if the result is wrong.
        """
        stage("build")
        built = self.backend.build(problem, config, self.target, self.folder)
        error = held.get(fingerprint(built))
        if error is None:
            outcome = self.verify(problem, config, stage)
            if not isinstance(outcome, Predicted) or outcome.error is None:
                raise MctuneError(f"{problem} [{config}] is {describe(outcome)}")
            error = outcome.error
        if self.backend.maker == "tvm.gpu":
            stage("sanitize")
            if said := reports(problem, config, built, self.folder / "sanitized", self.seed):
                raise MctuneError(f"{problem} [{config}] is not sound: {said}")
        return shipment(self._judged(problem), built, error, _BY[self.backend.name])

    def _judged(self, problem: Problem) -> Problem:
        """What is run here in the place of a problem."""
        return judged(problem) if self.backend.name == "triton" else problem


def start(setup: dict[str, Any]) -> Handler:
    """The worker's handler. ``setup``: backend, target, folder, seed.

    A candidate's ``"maker"``, where it has one, is the backend instead. Payloads and what answers them:

    * ``{"evaluate": {"problem", "config"}}``: ``{"outcome"}``;
    * ``{"verify": ...}``: the same and, if it is right, ``"held"``, its error by fingerprint;
    * ``{"prepare": ..., "into": a file}``: ``{"outcome", "ready"}`` and, if it is, ``"built"``;
    * ``{"build": ...}``: ``{"built"}``;
    * ``{"ship": ..., "held": what was verified before}``: what :func:`mctune.workers.evaluate.shipment` returns;
    * ``{"try_out": True}``: nothing.
    """
    target, _ = resolve(setup["target"])
    folder, seed = Path(setup["folder"]), setup["seed"]

    def handle(payload: dict[str, Any], stage: Stage) -> dict[str, Any]:
        backend = get_backend(maker_of(payload) or setup["backend"])
        if "try_out" in payload:
            return try_out(backend, target, folder, stage)
        at_work = _Predictor(backend, target, folder_for(payload, folder), seed)
        if "ship" in payload:
            return at_work.ship(*candidate(payload["ship"]), payload.get("held", {}), stage)
        if "verify" in payload:
            return at_work.held(*candidate(payload["verify"]), stage)
        if "build" in payload:
            return at_work.build(*candidate(payload["build"]), stage)
        if "prepare" in payload:
            return at_work.prepare(*candidate(payload["prepare"]), payload["into"], payload["again"], stage)
        return {"outcome": to_json(at_work.evaluate(*candidate(payload["evaluate"]), stage))}

    return handle
