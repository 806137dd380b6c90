"""One candidate against the oracle, in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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


def drawn(pass_: str) -> list[Drawn]:
    """Every combination."""
    return draw.interpreted(pass_, TARGET, DTYPES)


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
