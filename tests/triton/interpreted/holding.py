"""One candidate against the oracle, in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mctune.backends import get_backend
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.verify.inputs import Inputs
from mctune.verify.judge import run_kernel, tolerance, verify_case
from mctune.verify.passes import Results
from mctune.verify.spread import Drawn, odd_cases
from tests import draw

TARGET, _ = resolve("a100")
DTYPES = ("float32", "float16")


_OFTEN = {
    "dla": (("grm", "independent"), ("soup", "checkpoint")),
    "titans": (("ssc", "checkpoint"), ("soup", "independent")),
}
"""Deep memories of every run, by aggregation and state init: the others take the interpreter half an hour."""


def drawn(pass_: str) -> list[Any]:
    """Every combination, a :class:`Drawn` each; most of deep memories are marked slow."""
    return [one if _often(one.problem) else pytest.param(one, marks=pytest.mark.slow) for one in every(pass_)]


def every(pass_: str) -> list[Drawn]:
    """The same without marks."""
    return draw.interpreted(pass_, TARGET, DTYPES)


def _often(problem: Problem) -> bool:
    return not problem.deep or (problem.aggregation, problem.state_init) in _OFTEN[problem.recurrence]


def fenced(inputs: Inputs) -> Inputs:
    """The same between NaN: a row or a column too many that is read, even times 0, shows in the result."""

    def between(x: torch.Tensor) -> torch.Tensor:
        room = torch.full((x.numel() + 1024,), float("nan"), dtype=x.dtype)
        inside = room[512:-512].view(x.shape)
        return inside.copy_(x)

    gates = {name: between(gate) for name, gate in inputs.gates.items()}
    return replace(inputs, gates=gates, **{name: between(getattr(inputs, name)) for name in ("q", "k", "v", "u", "dy")})


def hold(one: Drawn, folder: Path) -> None:
    """Every odd case of a candidate."""
    backend = get_backend("triton")
    kernel = backend.load(one.problem, one.config, backend.build(one.problem, one.config, TARGET, folder))

    def run(problem: Problem, inputs: Inputs) -> Results:
        return run_kernel(kernel, problem, fenced(inputs))

    for seed, problem in enumerate(odd_cases(one.problem)):
        error = verify_case(run, problem, seed)
        assert error <= tolerance(problem), f"{problem} with {one.config}"
