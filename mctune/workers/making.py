"""Inside a worker process that compiles candidates for this CPU, and does nothing else with them."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from mctune.backends import get_backend
from mctune.backends.protocol import Backend
from mctune.core.config import Config
from mctune.core.errors import MctuneError
from mctune.core.outcome import to_json
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.workers.payload import candidate, failed_build, folder_for, maker_of
from mctune.workers.worker import MACHINES, Handler, Stage


def build(
    backend: Backend, problem: Problem, config: Config, target: Target, folder: Path, stage: Stage
) -> dict[str, Any]:
    """The files of a candidate, ``{"built"}``, as :meth:`mctune.workers.evaluate.Prepared.of` takes them."""
    stage("build")
    built = backend.build(problem, config, target, folder)
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
        made_by = get_backend(maker) if maker else backend
        folder = folder_for(payload, Path(setup["folder"]))
        problem, config = candidate(payload["make"])
        try:
            return build(made_by, problem, config, target, folder, stage)
        except (MctuneError, *MACHINES):
            raise
        except Exception as error:
            return {"outcome": to_json(failed_build(error))}

    return handle
