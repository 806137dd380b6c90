"""The processes of a search: one that times candidates, or several that compile them and one that verifies."""

from __future__ import annotations

import queue
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

    A kernel that is timed must have the machine for itself. Kernels that are compiled for a machine that is not here do
    not disturb each other; Triton's compiler and its interpreter, which verifies them, cannot share a process.
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
        env = {} if request.target.on_cpu else {"TRITON_CACHE_DIR": str(folder.parent / "triton")}
        self.count = 1 if request.measure else usable_cores()
        """Candidates that are evaluated at once."""
        entry = _MEASURED if request.measure else _PREDICTED
        self._all = [Worker(entry, setup, env=env) for _ in range(self.count)]
        self._checker = self._all[0] if request.measure else Worker(entry, setup, env={"TRITON_INTERPRET": "1"})
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._all:
            self._free.put(worker)
        self._stack = ExitStack()

    def __enter__(self) -> Workers:
        for worker in dict.fromkeys((*self._all, self._checker)):
            self._stack.enter_context(worker)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def call(self, payload: dict[str, Any], limit_s: float) -> Reply:
        """The reply of a worker that has nothing else to do."""
        worker = self._free.get()
        try:
            return worker.call(payload, limit_s)
        finally:
            self._free.put(worker)

    def verify(self, candidate: dict[str, Any], limit_s: float) -> Reply:
        """Hold one candidate to the oracle: an outcome without a time, ``Predicted`` with its error if it is right."""
        return self._checker.call({"verify": candidate}, limit_s)

    def ship(self, candidate: dict[str, Any], portable_arch: str | None, limit_s: float) -> Reply:
        """The files of one candidate, verified."""
        return self._checker.call({"ship": candidate, "portable_arch": portable_arch}, limit_s)
