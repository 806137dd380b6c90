"""The processes of a search: those that compile candidates, that one that times them, and that one that verifies."""

from __future__ import annotations

import json
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from mctune.backends import backend_for
from mctune.backends.kept import sweep
from mctune.core.errors import DeviceError
from mctune.core.host import usable_cores
from mctune.core.outcome import Predicted, Timed, describe, from_json, to_json
from mctune.core.target import Target
from mctune.verify.cuda_cpu.folder import environment
from mctune.workers.turns import Turns
from mctune.workers.worker import Worker, WorkerDied, WorkerTimedOut

Reply = dict[str, Any] | WorkerDied | WorkerTimedOut
_GRACE_S = 10.0
"""A candidate that is under way when the time is over may take so much longer; then its process is killed."""
_BATCH = 8
"""Candidates for a CPU that are proposed together, at most: more, and models learn little between them."""
_LEAST_S = 30.0
_TRIAL_LIMIT_S = 120.0
_INTERPRETERS = 8
"""Processes that interpret kernels side by side; each may take 2 GB."""
_MEASURED, _PREDICTED = "mctune.workers.evaluate:start", "mctune.workers.predicted:start"
_MAKING = "mctune.workers.making:start"


class Workers:
    """Workers for a target, started when they are first needed; kernels are built in ``folder``.

    A kernel that is timed must have its device to itself, so one process does the timing. Where that device is a GPU,
    other processes, one on each remaining core, compile and judge the next candidates. Where it is this CPU, processes
    on all cores compile a batch of candidates, and while one is timed they have nothing to do. For an absent GPU there
    are only those, and others to verify, since Triton's compiler and its interpreter cannot share a process.
    """

    def __init__(self, target: Target, folder: Path, *, seed: int, measure: bool, made_by: Sequence[str] = ()) -> None:
        folder = folder.resolve()
        self._makers = tuple(made_by) or (backend_for(target),)
        setup = {
            "backend": self._makers[0],
            "target": target.name,
            "folder": str(folder),
            "seed": seed,
            "threads": usable_cores(),
        }
        self._folder, self._scratch = folder, folder / f"tmp-{os.getpid()}"
        # What a killed compiler leaves goes with this folder, and a full /tmp is nothing to us.
        on_cpu, own = target.on_cpu, {"TMPDIR": str(self._scratch)}
        # Several commands may share one.
        cache = own | (
            {} if on_cpu else {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(folder.parent / "triton"))}
        )
        compiling, interpreting = {**cache, "TRITON_INTERPRET": "0"}, {**cache, "TRITON_INTERPRET": "1"}
        if not measure and "tvm.gpu" in self._makers:
            interpreting |= environment(folder / "cuda_on_cpu")
        self._device = Worker(_MEASURED, setup, env=cache) if measure else None
        compilers = usable_cores() if on_cpu else max(usable_cores() - measure, 1)
        self._on_cpu, self._turns = on_cpu, Turns(apart=on_cpu)
        entry, env = (_MAKING, own) if on_cpu else (_PREDICTED, compiling)
        self._compilers = [Worker(entry, setup, env=env) for _ in range(compilers)]
        checkers = max(min(compilers, _INTERPRETERS), 1)
        alone = [self._device] if self._device else []
        self._checkers = alone or [Worker(_PREDICTED, setup, env=interpreting) for _ in range(checkers)]
        self.count = min(_BATCH, compilers) if on_cpu else compilers
        """Candidates that are evaluated at once."""
        self.least_s = 1.0 if on_cpu else _LEAST_S
        """Seconds in which a study gets somewhere: compiling for a GPU takes most of them."""
        self._free, self._free_checkers = _queue(self._compilers), _queue(self._checkers)
        self._trying, self._sound = threading.Lock(), False
        self._held: dict[str, dict[str, float]] = {}
        """By candidate, what was held to everything: the errors of its files."""
        self._stack = ExitStack()

    def __enter__(self) -> Workers:
        for worker in (*self._compilers, *self._checkers):
            self._stack.enter_context(worker)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self._compilers, *self._checkers):
            worker.halt()
        self._stack.close()
        if self._scratch.is_dir():
            shutil.rmtree(self._scratch, ignore_errors=True)
            sweep(self._folder, but="again")

    def start(self) -> None:
        """Start the processes that time and compile, all at once, without waiting for them: each takes seconds.

        What keeps one from starting is told where it is needed.
        """
        self.prepare()
        for worker in (*([self._device] if self._device else []), *self._compilers):
            threading.Thread(target=worker.start, daemon=True).start()

    def prepare(self) -> None:
        """Make the folder that they work in; to be called before anything is asked of them.

        Raises:
            DeviceError: where that cannot be.
        """
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
            sweep(self._folder)
        except OSError as error:
            raise DeviceError(
                f"kernels cannot be written to {self._folder}: {error.strerror}; give another --out"
            ) from error

    def try_out(self, limit_s: float) -> str:
        """Why the machine cannot build and run any kernel; empty if it can. The processes that candidates go through
        try one, with nothing of what is kept on disk."""
        for maker in self._makers:
            payload = {"try_out": True, "maker": maker}
            reply = self._check(payload, limit_s) if self._on_cpu else self._compile(payload, limit_s, None)
            assert reply is not None, "without an end in time there is a reply"
            if isinstance(reply, WorkerDied):
                return reply.message
            if not isinstance(reply, dict):
                return f"a trial kernel took over {reply.seconds:g} s"
        return ""

    def _unsound(self) -> str:
        """Why no candidate needs to be tried on this machine; looked into before the first one."""
        with self._trying:
            why = "" if self._sound else self.try_out(_TRIAL_LIMIT_S)
            self._sound = not why
        return why

    def evaluate(
        self,
        candidate: dict[str, Any],
        limit_s: float,
        until: float | None = None,
        *,
        measure: bool = True,
        again: bool = False,
    ) -> Reply | None:
        """``{"outcome"}`` of one candidate; ``limit_s`` for what each process does of it.

        ``None`` if it was not done by ``until``, of ``time.monotonic``. It is timed where there is a device, unless not
        to ``measure`` is asked for. ``again``: with nothing that is kept on disk.
        """
        if until is not None and time.monotonic() >= until:
            return None
        if why := self._unsound():
            return WorkerDied(why, "try out", fault="machine")
        fresh = {"again_from_scratch": again}
        if self._device is None or not measure:
            return self._compile({"evaluate": candidate, **fresh}, limit_s, until)
        if self._on_cpu:
            return self._evaluate_here(candidate, fresh, limit_s, until)
        with tempfile.NamedTemporaryFile(prefix="mctune", suffix=".pt", dir=self._scratch) as file:
            reply = self._compile({"prepare": candidate, "into": file.name, "again": False, **fresh}, limit_s, until)
            if not isinstance(reply, dict) or not reply["ready"]:
                return reply
            with self._turns.timing():
                payload = {"evaluate": candidate, "prepared": file.name, "built": reply["built"]}
                return _noted(_within(self._device, payload, limit_s, until), reply["outcome"])

    def _evaluate_here(
        self, candidate: dict[str, Any], fresh: dict[str, Any], limit_s: float, until: float | None
    ) -> Reply | None:
        """The same on this CPU."""
        assert self._device is not None
        with self._turns.compiling():
            reply = self._compile({"make": candidate, **fresh}, limit_s, until)
        if not isinstance(reply, dict) or "built" not in reply:
            return reply
        with self._turns.timing():
            return _within(self._device, {"evaluate": candidate, "built": reply["built"]}, limit_s, until)

    def compare(self, candidates: list[dict[str, Any]], limit_s: float) -> Reply:
        """``{"samples"}``: milliseconds of each finalist in each round; none of those that are not right after all.

        ``"failures"``: what is wrong with those.
        """
        assert self._device is not None, "only a measured search times finalists"
        if not self._on_cpu:
            with ThreadPoolExecutor(self.count) as pool:
                built = list(pool.map(lambda one: self._compile({"build": one}, limit_s, None), candidates))
            if not all(isinstance(reply, dict) for reply in built):
                return next(reply for reply in built if isinstance(reply, WorkerDied | WorkerTimedOut))
            candidates = [one | reply for one, reply in zip(candidates, built, strict=True) if isinstance(reply, dict)]
        return self._device.call({"compare": candidates}, limit_s)

    def hold(self, candidate: dict[str, Any], limit_s: float, *, again: bool = False) -> Reply:
        """Hold one that is to ship to everything once more: an outcome without a time, ``Predicted`` if it is right.

        Then :meth:`ship` takes it as it is. ``again``: with nothing of what is kept on disk.
        """
        assert self._device is not None, "for an absent device there is verify"
        fresh = {"again_from_scratch": again}
        return self._remembered(candidate, self._built_and_run({"check": candidate, **fresh}, candidate, limit_s))

    def _built_and_run(self, payload: dict[str, Any], candidate: dict[str, Any], limit_s: float) -> Reply:
        """The device's reply to ``payload``, with the files of a candidate for a GPU: others compile them."""
        assert self._device is not None
        if not self._on_cpu:
            fresh = {"again_from_scratch": payload["again_from_scratch"]}
            built = self._compile({"build": candidate, **fresh}, limit_s, None)
            if not isinstance(built, dict):
                return built or WorkerDied("nothing was answered", "build")
            payload = payload | built
        with self._turns.timing():
            return self._device.call(payload, limit_s)

    def verify(self, candidate: dict[str, Any], limit_s: float) -> Reply:
        """Hold one candidate to the oracle: an outcome without a time, ``Predicted`` with its error if it is right.

        For an absent GPU that is called side by side. Then :meth:`ship` takes it as it is.
        """
        return self._remembered(candidate, self._check({"verify": candidate}, limit_s))

    def holds(self, candidate: dict[str, Any]) -> bool:
        """Whether one was held to everything, by these workers, and was right."""
        return _about(candidate) in self._held

    def _remembered(self, candidate: dict[str, Any], reply: Reply) -> Reply:
        if isinstance(reply, dict) and (held := reply.get("held")):
            self._held.setdefault(_about(candidate), {}).update(held)
        return reply

    def ship(
        self, candidate: dict[str, Any], portable_arch: str | None, limit_s: float, *, again: bool = False
    ) -> Reply:
        """The files of one candidate, verified on other inputs than before; called side by side, as a GPU's compile.

        ``again``: with nothing of what is kept on disk.
        """
        fresh = {"again_from_scratch": again}
        held = self._held.get(_about(candidate), {})
        payload = {"ship": candidate, "portable_arch": portable_arch, "held": held, **fresh}
        if self._device is None or self._on_cpu:
            return self._check(payload, limit_s)
        if held:
            return self._built_and_run(payload, candidate, limit_s)
        with tempfile.NamedTemporaryFile(prefix="mctune", suffix=".pt", dir=self._scratch) as file:
            reply = self._compile({"prepare": candidate, "into": file.name, "again": True, **fresh}, limit_s, None)
            if not isinstance(reply, dict):
                return reply or WorkerDied("nothing was answered", "compile")
            if not reply["ready"]:
                return WorkerDied(describe(from_json(reply["outcome"])), "compile")
            with self._turns.timing():
                return self._device.call(payload | {"prepared": file.name, "built": reply["built"]}, limit_s)

    def _check(self, payload: dict[str, Any], limit_s: float) -> Reply:
        """The reply of a process that verifies and has nothing else to do."""
        worker = self._free_checkers.get()
        try:
            return worker.call(payload, limit_s)
        finally:
            self._free_checkers.put(worker)

    def _compile(self, payload: dict[str, Any], limit_s: float, until: float | None) -> Reply | None:
        """The reply of a compiler that has nothing else to do."""
        worker = self._free.get()
        try:
            return _within(worker, payload, limit_s, until)
        finally:
            self._free.put(worker)


def _about(candidate: dict[str, Any]) -> str:
    return json.dumps(candidate, sort_keys=True)


def _queue(workers: Iterable[Worker]) -> queue.SimpleQueue[Worker]:
    found: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        found.put(worker)
    return found


def _within(worker: Worker, payload: dict[str, Any], limit_s: float, until: float | None) -> Reply | None:
    """A worker's reply; ``None`` where the time is over, or was ``_GRACE_S`` before there was one."""
    if until is None:
        return worker.call(payload, limit_s)
    left = until - time.monotonic()
    if left <= 0:
        return None
    reply = worker.call(payload, min(limit_s, left + _GRACE_S))
    return None if isinstance(reply, WorkerTimedOut) and reply.seconds < limit_s else reply


def _noted(reply: Reply | None, compiled: str) -> Reply | None:
    """A measured candidate's reply, with what the compiler said of it in the process that compiled it."""
    if not isinstance(reply, dict):
        return reply
    outcome, other = from_json(reply["outcome"]), from_json(compiled)
    if not isinstance(outcome, Timed) or not isinstance(other, Predicted) or not other.notes:
        return reply
    return reply | {"outcome": to_json(replace(outcome, notes=other.notes))}
