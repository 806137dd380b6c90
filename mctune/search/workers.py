"""The processes of a search: those that compile candidates, that one that times them, and that one that verifies."""

from __future__ import annotations

import queue
import tempfile
import threading
from contextlib import ExitStack
from typing import Any

from mctune.backends import backend_for
from mctune.core.host import usable_cores
from mctune.search.events import SearchRequest
from mctune.search.worker import Worker, WorkerDied, WorkerTimedOut

Reply = dict[str, Any] | WorkerDied | WorkerTimedOut
_MEASURED, _PREDICTED = "mctune.search.evaluate:start", "mctune.search.predicted:start"


class Workers:
    """Workers of a request, started when they are first needed.

    A kernel that is timed must have its device for itself: one process times. Where that device is a GPU, others
    compile and judge for it what comes next, one on every other core. For a machine that is not here they are all that
    there is, and one more process, since Triton's compiler and its interpreter cannot share one, verifies.
    """

    def __init__(self, request: SearchRequest) -> None:
        folder = (request.out / "search" / "kernels").resolve()
        setup = {
            "backend": backend_for(request.target),
            "target": request.target.name,
            "folder": str(folder),
            "seed": request.seed,
            "threads": usable_cores(),
        }
        on_cpu, measure = request.target.on_cpu, request.measure
        cache = {} if on_cpu else {"TRITON_CACHE_DIR": str(folder.parent / "triton")}
        compiling, interpreting = {**cache, "TRITON_INTERPRET": "0"}, {**cache, "TRITON_INTERPRET": "1"}
        self._device = Worker(_MEASURED, setup, env=cache) if measure else None
        self._checker = self._device or Worker(_PREDICTED, setup, env=interpreting)
        compilers = 0 if on_cpu else max(usable_cores() - measure, 1)
        self._compilers = [Worker(_PREDICTED, setup, env=compiling) for _ in range(compilers)]
        self.count = compilers or 1
        """Candidates that are evaluated at once."""
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._compilers:
            self._free.put(worker)
        self._timing = threading.Lock()
        self._stack = ExitStack()

    def __enter__(self) -> Workers:
        for worker in (*self._compilers, self._checker):
            self._stack.enter_context(worker)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def evaluate(self, candidate: dict[str, Any], limit_s: float) -> Reply:
        """``{"outcome"}`` of one candidate; ``limit_s`` for what each process does of it."""
        if self._device is None:
            return self._compile({"evaluate": candidate}, limit_s)
        if not self._compilers:
            return self._device.call({"evaluate": candidate}, limit_s)
        with tempfile.NamedTemporaryFile(prefix="mctune", suffix=".pt") as file:
            reply = self._compile({"prepare": candidate, "into": file.name}, limit_s)
            if not isinstance(reply, dict) or not reply["ready"]:
                return reply
            with self._timing:
                return self._device.call({"evaluate": candidate, "prepared": file.name}, limit_s)

    def compare(self, candidates: list[dict[str, Any]], limit_s: float) -> Reply:
        """``{"samples"}``: milliseconds of each finalist in each round."""
        assert self._device is not None, "only a measured search times finalists"
        return self._device.call({"compare": candidates}, limit_s)

    def verify(self, candidate: dict[str, Any], limit_s: float) -> Reply:
        """Hold one candidate to the oracle: an outcome without a time, ``Predicted`` with its error if it is right."""
        return self._checker.call({"verify": candidate}, limit_s)

    def ship(self, candidate: dict[str, Any], portable_arch: str | None, limit_s: float) -> Reply:
        """The files of one candidate, verified."""
        return self._checker.call({"ship": candidate, "portable_arch": portable_arch}, limit_s)

    def _compile(self, payload: dict[str, Any], limit_s: float) -> Reply:
        """The reply of a compiler that has nothing else to do."""
        worker = self._free.get()
        try:
            return worker.call(payload, limit_s)
        finally:
            self._free.put(worker)
