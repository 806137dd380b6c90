"""A backend with one right kernel, compiled once, and the faults of ``faults`` planted on it in each candidate."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from faults import HARMFUL, SEGMENT, TIMED_T, WRONG, Run

from mctune.backends.protocol import Built, Kernel, Watch, unwatched
from mctune.backends.tvm import TvmBackend
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.target import Target
from mctune.runtime.kernels.tvm.arguments import ARGUMENTS

_NAMES = ARGUMENTS["read_forward"]


class PlantedBackend(TvmBackend):
    """The TVM backend; ``config["fault"]`` names a fault of its forward, ``config["draw"]`` seeds it."""

    name = "planted"

    def build(self, problem: Problem, config: Config, target: Target, folder: Path) -> Built:
        space, fixed = self.space(problem), {"parallel": "segment", "cols": 16, "state_rows": 2, "state_cols": 16}
        real = space.first_valid(lambda one: space.valid(one.replace(**fixed), problem, target))
        assert real is not None
        return super().build(problem, real.replace(**fixed), target, folder)

    def load(self, problem: Problem, config: Config, built: Built, watch: Watch = unwatched) -> Kernel:
        kernel = super().load(problem, config, built, watch)
        fault, seed = str(config["fault"]), int(config["draw"])  # type: ignore[arg-type]
        plant = {**WRONG, **HARMFUL}[fault]
        right, chance = kernel.read_forward, random.Random(seed)

        def read_forward(*arguments: Any) -> None:
            right(*arguments)
            values = dict(zip(_NAMES, arguments, strict=True))
            plant(Run(values, random.Random(seed), chance))

        kernel.read_forward = read_forward
        return kernel


def problem() -> Problem:
    """What the planted candidates compute: small enough that a candidate takes a fraction of a second."""
    return Problem(aggregation="grm", B=1, T=TIMED_T, H=2, Dk=16, Dv=16, segment_length=SEGMENT)
