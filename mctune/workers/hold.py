"""Hold the Triton templates to the oracle, on this machine's GPU or in Triton's interpreter, in many processes."""

from __future__ import annotations

import json
import os
import queue
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mctune.backends import get_backend
from mctune.backends.presence import present
from mctune.core.config import Config
from mctune.core.host import usable_cores
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.verify.inputs import judged
from mctune.verify.judge import judge, run_kernel, tolerance, verify
from mctune.verify.spread import (
    FORMULATED,
    Drawn,
    draw,
    draw_defaults,
    draw_formulations,
    draw_specialized,
    odd_cases,
)
from mctune.workers.payload import candidate, first_line
from mctune.workers.worker import Handler, Stage, Worker, WorkerDied

LIMIT_S, GRACE_S = 240.0, 20.0
"""Seconds for one candidate (compiling its kernels and running its cases), and how long it may overrun the end."""
_INTERPRETER = "Triton's interpreter"
_PASSES = ("forward", "backward", "decode")


@dataclass(frozen=True)
class Held:
    """One candidate held to the oracle.

    Attributes:
        problem: of the candidate, in the dtype that it was run in.
        config: of the candidate.
        by: what ran it: a GPU, or the interpreter.
        error: the largest RMS ratio to the oracle over its cases; ``None`` if one failed.
        failure: what failed, in words; empty if nothing did.
    """

    problem: Problem
    config: Config
    by: str
    error: float | None
    failure: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "problem": self.problem.to_dict(), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Held:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**values, "problem": Problem.from_dict(values["problem"]), "config": Config.of(values["config"])})


def candidates(target: Target) -> list[Drawn]:
    """What stands for the templates: the widest defaults and every combination in bfloat16 first, then each in one of
    the other dtypes. On the device itself last what nothing else can verify.
    """
    drawn = [one for pass_ in _PASSES for one in draw_defaults(pass_, target)]
    drawn += [one for pass_ in _PASSES for one in draw(pass_, target, ("bfloat16",))]
    drawn += [one for pass_ in FORMULATED for one in draw_formulations(pass_, target, ("bfloat16",))]
    drawn += [one for pass_ in _PASSES for one in draw(pass_, target, ("float32", "float16"))]
    drawn += [one for pass_ in FORMULATED for one in draw_formulations(pass_, target, ("float16", "float32"))]
    return drawn + (draw_specialized(target) if present(target) else [])


def hold(
    drawn: Sequence[Drawn], target: Target, record: Path | None, timeout_s: float | None, seed: int = 0
) -> Iterator[Held]:
    """Each candidate's result as it comes, those first that ``record`` has of an earlier run of the same templates.

    Every result is appended to ``record``. After ``timeout_s`` seconds no further candidate is begun, and ``GRACE_S``
    later those that are under way are given up, without a result.
    """
    by = target.title if present(target) else _INTERPRETER
    known = _read(record, by)
    left = []
    for one in drawn:
        found = known.get(_key(one.problem, one.config, by))
        if found is None:
            left.append(one)
        else:
            yield found
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        setup = {"target": target.name, "folder": folder, "seed": seed}
        # torch decides on its number of threads when it is imported; there is one process for each core.
        env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if by == _INTERPRETER:
            env["TRITON_INTERPRET"] = "1"
        free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        count = min(usable_cores(), len(left))
        workers = [stack.enter_context(Worker("mctune.workers.hold:start", setup, env=env)) for _ in range(count)]
        for worker in workers:
            free.put(worker)
        pool = stack.enter_context(ThreadPoolExecutor(max(count, 1)))
        futures: list[Future[Held | None]] = [pool.submit(_one, free, one, by, deadline) for one in left]
        try:
            for future in as_completed(futures):
                held = future.result()
                if held is not None:
                    _append(record, held)
                    yield held
        finally:
            # After Ctrl-C, do not wait for running jobs.
            for future in futures:
                future.cancel()
            for worker in workers:
                worker.halt()


def _one(free: queue.SimpleQueue[Worker], one: Drawn, by: str, deadline: float | None) -> Held | None:
    worker = free.get()
    try:
        if deadline is not None and time.monotonic() > deadline:
            return None
        problem = judged(one.problem) if by == _INTERPRETER else one.problem
        wanted = {"problem": problem.to_dict(), "config": one.config.to_dict()}
        limit_s = LIMIT_S if deadline is None else min(LIMIT_S, deadline + GRACE_S - time.monotonic())
        reply = worker.call({"hold": wanted}, limit_s)
        if isinstance(reply, dict):
            return Held(problem, one.config, by, reply["error"], reply["failure"])
        if isinstance(reply, WorkerDied):
            return Held(problem, one.config, by, None, f"crashed: {reply.message} ({reply.stage})")
        if reply.seconds < LIMIT_S:
            return None
        return Held(problem, one.config, by, None, f"timed out: {reply.stage} took longer than {reply.seconds:g} s")
    finally:
        free.put(worker)


def _key(problem: Problem, config: Config, by: str) -> tuple[str, str]:
    """The interpreter runs bfloat16 as float16; a GPU does not."""
    return (judged(problem) if by == _INTERPRETER else problem).key, config.key


def _read(record: Path | None, by: str) -> dict[tuple[str, str], Held]:
    """What an earlier run found, with the same templates, on the same device."""
    if record is None or not record.is_file():
        return {}
    known = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if values.pop("backend") == get_backend("triton").identity() and values["by"] == by:
            held = Held.from_dict(values)
            known[_key(held.problem, held.config, by)] = held
    return known


def _append(record: Path | None, held: Held) -> None:
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**held.to_dict(), "backend": get_backend("triton").identity()}) + "\n")


def start(setup: dict[str, Any]) -> Handler:
    """The worker's handler. ``setup``: target, folder, seed.

    A payload is ``{"hold": {"problem", "config"}}``, answered by ``{"error", "failure"}``.
    """
    target, _ = resolve(setup["target"])
    backend = get_backend("triton")

    def handle(payload: dict[str, Any], stage: Stage) -> dict[str, Any]:
        problem, config = candidate(payload["hold"])
        stage("build")
        try:
            kernel = backend.load(problem, config, backend.build(problem, config, target, Path(setup["folder"])))
            stage("verify")
            cases = (judge(case, setup["seed"] + number) for number, case in enumerate(odd_cases(problem)))
            error = verify(partial(run_kernel, kernel), problem, cases)
        except Exception as error_:
            # An illegal access poisons the CUDA context: the parent starts another process.
            raise RuntimeError(first_line(error_)) from error_
        if isinstance(error, float):
            return {"error": error, "failure": ""}
        return {
            "error": None, "failure": f"wrong: error {error.error:.2e} over {tolerance(problem):.0e} on {error.case}"
        }  # fmt: skip

    return handle
