"""An emitted package, loaded from where it stands and held to the oracle."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mctune.core.errors import MctuneError, UsageError
from mctune.core.problem import AGGREGATIONS, RECURRENCES, SEGMENTATIONS, STATE_INITS, Problem
from mctune.runtime import manifest
from mctune.runtime.api import functional
from mctune.runtime.errors import PackageError
from mctune.runtime.kernels.support import Served, served
from mctune.runtime.kernels.table import load_table
from mctune.runtime.manifest import Contents
from mctune.verify.at_size import make
from mctune.verify.cuda_cpu.folder import active, prepare_parts
from mctune.verify.guard import Fault
from mctune.verify.inputs import judged, odd_problems
from mctune.verify.judge import Run, run_kernel, tolerance, verify_case
from mctune.verify.passes import gradients, wants
from mctune.verify.rerun import CANDIDATE, SLACK, Miss, Reruns

_LONG = {"forward": 2048, "backward": 1024, "decode": 1024}
"""Tokens of the long row, by pass."""
_RERUN_S = 1.0
"""Seconds in which a kernel is run again at size."""


@dataclass(frozen=True)
class Check:
    """One problem held to the oracle: which backend computed it, its error and the tolerance."""

    problem: Problem
    backend: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; an infinite error (NaN in the result, a wrong shape) is ``null``."""
        finite = self.error if self.error < float("inf") else None
        return {
            "problem": self.problem.to_dict(),
            "backend": self.backend,
            "error": finite,
            "tolerance": self.tolerance,
            "passed": self.passed,
        }


def load_package(path: Path) -> ModuleType:
    """Import the emitted package at ``path`` under its own name, from what was verified, its ``__init__.py`` included.

    Raises:
        UsageError: if there is no package at ``path``, or its name is taken by another module.
        MctuneError: if a file of it is missing, has changed or was added.
    """
    root, contents = _contents(path)
    loaded, init = sys.modules.get(root.name), root / "__init__.py"
    if loaded is not None:
        if loaded.__file__ != str(init):
            raise UsageError(f"a module named {root.name} is already imported from {loaded.__file__}")
        return loaded
    if not root.name.isidentifier():
        raise UsageError(f"{root.name!r} cannot be imported: name the directory like a Python module (mctune_cpu)")
    spec = importlib.util.spec_from_file_location(root.name, init, submodule_search_locations=[str(root)])
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[root.name] = module
    try:
        # No bytecode: what runs is what was verified.
        exec(compile(contents.files["__init__.py"], str(init), "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        del sys.modules[root.name]
        if isinstance(error, RuntimeError) and type(error).__name__ == "PackageError":
            raise MctuneError(str(error)) from error
        raise
    return module


def _contents(path: Path) -> tuple[Path, Contents]:
    """Where the package at ``path`` is, links not followed, and what it holds.

    Raises:
        UsageError: if there is none.
        MctuneError: if a file of it is missing, has changed or was added.
    """
    root = Path(os.path.abspath(path))
    if not any(os.path.lexists(root / name) for name in ("tuned.json", manifest.NAME, f"{manifest.NEXT}/tuned.json")):
        raise UsageError(
            f"{path} is not an emitted package (no tuned.json); `mctune search` leaves one, `mctune emit` too"
        )
    if (root / "runtime" / "dispatch.py").is_file():
        reason = "it still runs, but emit it again for this command"
        raise UsageError(f"{path} was emitted by an earlier mctune: {reason}")
    try:
        contents = manifest.verify(root)
        if "__init__.py" not in contents.files:
            raise PackageError(
                f"__init__.py is not in the manifest of {root}; emit the package again with `mctune emit`"
            )
        load_table(contents)
    except PackageError as error:
        raise MctuneError(str(error)) from error
    return root, contents


def find_entry(module: ModuleType, problem: Problem, device: str, backend: str) -> Any | None:
    """The entry of a loaded package that serves a problem on a device kind by a backend; ``None`` without one."""
    table = module.runtime.kernels.table
    names = [field.name for field in fields(table.Request) if field.name not in ("device", "hardware")]
    # A problem of matrix memories has the hidden width 0, a request none.
    request = table.Request(**{name: getattr(problem, name) or None for name in names}, device=device)
    return table.find(module.runtime.kernels.dispatch.TABLE, request, backend)


def launcher_of(module: ModuleType, entry: Any) -> Any:
    """What launches the kernel of an entry of a loaded package.

    Raises:
        MctuneError: if it cannot be run here, with what to do.
    """
    try:
        return module.runtime.kernels.dispatch.launcher(entry)
    except module.runtime.errors.KernelError as error:
        raise MctuneError(f"{entry.kernel.name}: {error}") from error


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a package's tuned table.

    Raises:
        UsageError, MctuneError: as :func:`load_package`.
    """
    return [dict(entry.record) for entry in load_table(_contents(path)[1]).entries]


def away(path: Path) -> frozenset[str]:
    """What made the kernels of a package that are for a GPU, if there is none: names of ``Served.maker``."""
    if torch.cuda.is_available():
        return frozenset()
    rows = [row_of(entry) for entry in read_entries(path)]
    return frozenset(row.maker for row in rows if row.device != "cpu")


def row_of(record: Mapping[str, Any]) -> Served:
    """What an entry of a tuned table was compiled for."""
    rows = served(family=RECURRENCES[record["problem"]["recurrence"]].family, backend=record["backend"])
    return next((row for row in rows if row.device == record.get("device")), rows[0])


def check_package(path: Path, seed: int) -> Iterator[Check]:
    """Hold every kernel of a package to the oracle, on the odd relatives of its problem and on a long row; and where it
    runs on its own device, at the size that it was timed at, again and again.

    Each kernel is launched by itself; the long rows go through ``memory_caching`` and autograd as a model's would.
    """
    module = load_package(path)
    entries = module.runtime.kernels.dispatch.TABLE.entries
    problems = [_judged(entry) for entry in entries]
    forwards = {_statics(problem) for problem in problems if problem.pass_ == "forward"}
    for entry, problem in zip(entries, problems, strict=True):
        row = row_of(entry.record)
        if row.maker == "tvm.gpu" and active():
            prepare_parts(entry.kernel.parent, dict(entry.record["parts"]))
        kernel = launcher_of(module, entry)
        launch = partial(run_kernel, kernel)
        lengths = {"segment_length": problem.segment_length} if problem.segment_length else {}
        for number, case in enumerate(odd_problems(problem)):
            yield _check(launch, case.replace(**lengths), entry.backend, seed + number)
        whole: Run = launch
        if problem.pass_ != "decode" and _statics(problem) in forwards:
            whole = _through(module, problem.pass_, entry.backend)
        yield _check(whole, problem.replace(B=1, T=min(problem.T, _LONG[problem.pass_]), H=1), entry.backend, seed + 3)
        if kernel.device == row.device:
            yield _check_at_size(kernel, problem, entry.backend, seed + 4)


def _judged(entry: Any) -> Problem:
    """The problem that an entry is held to: in Triton's interpreter one of bfloat16 is run in float16."""
    problem = Problem.from_dict(dict(entry.problem))
    return problem if row_of(entry.record).maker == "tvm.gpu" else judged(problem)


def check_defaults(seed: int) -> Iterator[Check]:
    """Hold the eager path to the oracle: every recurrence, aggregation, segmentation and state init, odd sizes."""
    eager = _through(functional, "forward", "eager")
    for recurrence, aggregation, segmentation, state_init in product(
        RECURRENCES, AGGREGATIONS, SEGMENTATIONS, STATE_INITS
    ):
        problem = Problem(
            recurrence=recurrence,
            aggregation=aggregation,
            segmentation=segmentation,
            state_init=state_init,
            T=64,
            H=2,
            Dk=8,
            Dv=8 if RECURRENCES[recurrence].deep else 12,
            segment_length=None if segmentation == "logarithmic" else 12,
        )
        for number, case in enumerate(odd_problems(problem)):
            yield _check(eager, case, "eager", seed + number)


def _check_at_size(kernel: Any, problem: Problem, backend: str, seed: int) -> Check:
    names = wants(kernel, problem) if problem.pass_ == "backward" else ()
    held, limit = Reruns(kernel, make(problem, seed, names, kernel.device)), SLACK * tolerance(problem)
    try:
        held.first()
        held.repeat(CANDIDATE, _RERUN_S / CANDIDATE.share)
        held.last()
    except Miss as miss:
        return Check(problem, backend, float("inf") if miss.outcome.error <= limit else miss.outcome.error, limit)
    return Check(problem, backend, held.error, limit)


def _statics(problem: Problem) -> tuple[object, ...]:
    """What a forward kernel and a backward kernel of the same operation share."""
    return problem.recurrence, problem.aggregation, problem.state_init, problem.Dk, problem.Dv


def _through(module: ModuleType, pass_: str, backend: str) -> Run:
    """A module's ``memory_caching``, and the gradients that autograd has of it."""

    operation = partial(module.memory_caching, backend=backend)
    if pass_ == "backward":
        return lambda case, inputs: gradients(operation, case, inputs, inputs.q.dtype)
    return lambda case, inputs: {"y": operation(**inputs.arguments(case))}


def _check(run: Run, problem: Problem, backend: str, seed: int) -> Check:
    try:
        error = verify_case(run, problem, seed)
    except Fault:
        error = float("inf")
    return Check(problem, backend, error, tolerance(problem))
