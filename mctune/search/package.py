"""An emitted package, loaded from where it stands and held to the oracle."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from mctune.core.errors import UsageError
from mctune.core.problem import AGGREGATIONS, RECURRENCES, SEGMENTATIONS, STATE_INITS, Problem
from mctune.runtime import functional
from mctune.search.inputs import Inputs, odd_problems
from mctune.search.passes import Results
from mctune.search.verify import tolerance, verify_case


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
    """Import the emitted package at ``path`` under its own name.

    Raises:
        UsageError: if there is no package at ``path``, or its name is taken by another module.
    """
    root = path.resolve()
    if not (root / "tuned.json").is_file() or not (root / "__init__.py").is_file():
        raise UsageError(
            f"{path} is not an emitted package (no tuned.json); `mctune search` leaves one, `mctune emit` too"
        )
    loaded = sys.modules.get(root.name)
    if loaded is not None:
        if loaded.__file__ != str(root / "__init__.py"):
            raise UsageError(f"a module named {root.name} is already imported from {loaded.__file__}")
        return loaded
    spec = importlib.util.spec_from_file_location(
        root.name, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[root.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[root.name]
        raise
    return module


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a package's tuned table."""
    entries: list[dict[str, Any]] = json.loads((path / "tuned.json").read_text(encoding="utf-8"))["entries"]
    return entries


def check_package(path: Path, seed: int) -> Iterator[Check]:
    """Hold every kernel of a package to the oracle, on the odd relatives of its problem and on one long row."""
    module = load_package(path)
    for entry in read_entries(path):
        problem = Problem.from_dict(entry["problem"])
        lengths = {"segment_length": problem.segment_length} if problem.segment_length else {}
        cases = [case.replace(**lengths) for case in odd_problems(problem)]
        cases.append(problem.replace(B=1, T=min(problem.T, 2048), H=1))
        for number, case in enumerate(cases):
            yield _check(module, case, entry["backend"], seed + number)


def check_defaults(seed: int) -> Iterator[Check]:
    """Hold the eager path to the oracle: every recurrence, aggregation, segmentation and state init, odd sizes."""
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
            Dv=8 if recurrence in ("dla", "titans") else 12,
            segment_length=None if segmentation == "logarithmic" else 12,
        )
        for number, case in enumerate(odd_problems(problem)):
            yield _check(functional, case, "eager", seed + number)


def _check(module: ModuleType, problem: Problem, backend: str, seed: int) -> Check:
    def run(case: Problem, inputs: Inputs) -> Results:
        return {"y": module.memory_caching(**inputs.arguments(case), backend=backend)}

    return Check(problem, backend, verify_case(run, problem, seed), tolerance(problem))
