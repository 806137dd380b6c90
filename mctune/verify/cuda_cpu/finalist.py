"""What may ship, under sanitizers: a short call of it, whose launches are recorded and run again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mctune.backends.protocol import Built
from mctune.backends.tvm.gpu.backend import LAUNCHERS
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.runtime.kernels.tvm.gpu.functions import load_parts
from mctune.verify.cuda_cpu.sanitize import SANITIZERS, Launched, recorded, watched
from mctune.verify.judge import judge, run_kernel

SEGMENT, TOKENS = 32, 73
"""Two segments and a rest; sanitizers take their time."""


def reports(problem: Problem, config: Config, built: Built, folder: Path, seed: int) -> str:
    """What a sanitizer says of a candidate, and of which operation; empty if none says anything.

    ``folder``: where its programs are kept.

    Raises:
        DeviceError: if a program cannot be compiled or run.
    """
    parts, kernels = dict(built.parts), built.library.parent
    for operation, launches in launches_of(problem, config, built, seed).items():
        source = (kernels / parts[f"{operation}.cu"]).read_text(encoding="utf-8")
        for watch, (name, _) in SANITIZERS.items():
            if said := watched(launches, source, watch, folder, seed):
                return f"{operation}: {said} ({name} sanitizer)"
    return ""


def launches_of(problem: Problem, config: Config, built: Built, seed: int) -> Mapping[str, list[Launched]]:
    """What a short call launches, by operation."""
    functions, launches = recorded(load_parts(built.library.parent, dict(built.parts)))
    kernel = LAUNCHERS[problem.writes.family, problem.pass_](built.library, built.record(problem, config), functions)
    lengths = {"segment_length": SEGMENT} if problem.segment_length else {}
    case = problem.replace(B=1, H=1, T=TOKENS, **lengths)
    run_kernel(kernel, case, judge(case, seed).inputs)
    return {
        operation: [one for one in launches if one.signature.symbol in names] for operation, names in functions.items()
    }
