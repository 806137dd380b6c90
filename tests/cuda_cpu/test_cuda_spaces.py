"""Search spaces of TVM's GPU passes: a default wherever there is a template, and blocks that a GPU has memory for."""

from __future__ import annotations

import random
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
from cuda_holding import BACKEND, DTYPES, config_of, drawn, error_of

from mctune.backends.tvm.gpu.backend import WIDEST
from mctune.backends.tvm.gpu.operations import build_kernels, operations
from mctune.core.problem import PASSES, RECURRENCES, Problem
from mctune.core.target import resolve, targets
from mctune.verify.judge import tolerance

GPUS = {target.arch: target for target in targets() if target.arch.startswith("sm_")}
WIDTHS = (1, 16, 25, 33, 64, 100, WIDEST)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("arch", GPUS)
def test_there_is_a_default(arch: str, pass_: str) -> None:
    matrix = [name for name, recurrence in RECURRENCES.items() if recurrence.family == "matrix"]
    for recurrence, dtype, Dk, Dv in product(matrix, DTYPES, WIDTHS, WIDTHS):
        problem = Problem(
            pass_=pass_, recurrence=recurrence, aggregation="grm", dtype=dtype, Dk=Dk, Dv=Dv, T=500, H=1,
            segment_length=64,
        )  # fmt: skip
        if BACKEND.supports(problem, GPUS[arch]):
            config_of(problem, GPUS[arch].name)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("gpu", ["v100", "t4", "a100"])
def test_blocks_have_the_shared_memory_that_the_space_says(gpu: str, pass_: str) -> None:
    target, _ = resolve(gpu)
    for seed in range(6):
        problem, config = drawn(random.Random(seed), pass_, target)
        said = getattr(import_module(f"mctune_spaces.tvm.gpu.matrix.{pass_}"), "SHARED", {})
        for operation in operations(problem):
            taken = max(kernel.shared for kernel in build_kernels(operation, problem, config, target))
            assert taken <= target.shared_bytes, (operation, problem, config)
            if operation in said:
                assert taken == said[operation](config, problem), (operation, problem, config)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("gpu", ["v100", "t4", "a100"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(None, marks=pytest.mark.slow, id=f"any-{n}") for n in range(4))])
def test_a_random_candidate_is_right(seed: int | None, gpu: str, pass_: str, cuda_folder: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    problem, config = drawn(random.Random(seed), pass_, resolve(gpu)[0])
    error = error_of(problem, gpu, cuda_folder, **config.to_dict())
    assert isinstance(error, float) and error <= tolerance(problem), (seed, problem, config, error)
