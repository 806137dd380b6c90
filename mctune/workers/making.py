"""Inside a worker process that compiles candidates for this CPU, and does nothing else with them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mctune.backends import get_backend
from mctune.backends.protocol import Backend, Built
from mctune.core.config import Config
from mctune.core.errors import MctuneError
from mctune.core.outcome import to_json
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.workers.payload import candidate, failed_build, folder_for, maker_of
from mctune.workers.worker import MACHINES, Handler, Stage


@dataclass(frozen=True)
class Maker:
    """Builds candidates for ``target`` in ``folder``."""

    backend: Backend
    target: Target
    folder: Path

    def make(self, problem: Problem, config: Config, stage: Stage) -> dict[str, Any]:
        """The files of a candidate, or the outcome of one that does not compile."""
        try:
            return self.build(problem, config, stage)
        except (MctuneError, *MACHINES):
            raise
        except Exception as error:
            return {"outcome": to_json(failed_build(error))}

    def build(self, problem: Problem, config: Config, stage: Stage) -> dict[str, Any]:
        """The files of a candidate, ``{"built"}``."""
        stage("build")
        return files_of(self.backend.build(problem, config, self.target, self.folder))


def files_of(built: Built) -> dict[str, Any]:
    """What is told of a candidate's files, as :meth:`mctune.workers.evaluate.Prepared.of` takes it."""
    return {"built": {"library": str(built.library), "source": str(built.source), "parts": built.parts}}


def start(setup: dict[str, Any]) -> Handler:
    """The worker's handler. ``setup``: backend, target, folder.

    A candidate's ``"maker"``, where it has one, is the backend instead. A payload is ``{"make": {"problem",
    "config"}}``, answered by ``{"built"}``, or ``{"outcome"}`` where it does not compile.
    """
    target, _ = resolve(setup["target"])
    backend = get_backend(setup["backend"])
    with suppress(ImportError):  # why it cannot be imported is told of the first candidate
        import_module("tvm")

    def handle(payload: dict[str, Any], stage: Stage) -> dict[str, Any]:
        maker = maker_of(payload)
        at_work = Maker(get_backend(maker) if maker else backend, target, folder_for(payload, Path(setup["folder"])))
        return at_work.make(*candidate(payload["make"]), stage)

    return handle
