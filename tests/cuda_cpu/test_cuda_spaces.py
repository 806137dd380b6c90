"""Search spaces of TVM's GPU passes: a default wherever there is a template, and blocks that a GPU has memory for."""

from __future__ import annotations

import random
from importlib import import_module

import pytest

from mctune.backends.tvm.gpu.backend import WIDEST, TvmGpuBackend
from mctune.backends.tvm.gpu.operations import build_kernels, operations
from mctune.core.config import Config
from mctune.core.problem import PASSES, RECURRENCES, Problem
from mctune.core.target import Target, resolve, targets

BACKEND = TvmGpuBackend()
GPUS = {target.arch: target for target in targets() if target.arch.startswith("sm_")}
DTYPES = ("float16", "bfloat16", "float32")
WIDTHS = (1, 16, 25, 33, 64, 100, WIDEST)
RANDOM = random.Random(17)


def drawn(pass_: str, target: Target) -> Problem:
    """A random problem that there is a template for."""
    while True:
        problem = Problem(
            pass_=pass_, recurrence=RANDOM.choice(("linear", "swla")), aggregation=RANDOM.choice(("grm", "residual")),
            dtype=RANDOM.choice(DTYPES), Dk=RANDOM.choice(WIDTHS), Dv=RANDOM.choice(WIDTHS), T=RANDOM.randint(1, 900),
            H=1, segment_length=RANDOM.choice((1, 64, 100, 256)),
        )  # fmt: skip
        if BACKEND.supports(problem, target):
            return problem


def drawn_config(problem: Problem, target: Target) -> Config:
    """A random configuration that the space has, one change after the other away from the default."""
    space = BACKEND.space(problem)
    config = space.first_valid(lambda one: space.valid(one, problem, target))
    assert config is not None
    for param in RANDOM.sample(space.params, len(space.params)):
        changed = config.replace(**{param.name: RANDOM.choice(param.values)})
        config = changed if space.valid(changed, problem, target) else config
    return config


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("arch", GPUS)
def test_there_is_a_default(arch: str, pass_: str) -> None:
    matrix = [name for name, recurrence in RECURRENCES.items() if recurrence.family == "matrix"]
    for recurrence in matrix:
        for dtype in DTYPES:
            for Dk in WIDTHS:
                for Dv in WIDTHS:
                    problem = Problem(
                        pass_=pass_, recurrence=recurrence, aggregation="grm", dtype=dtype, Dk=Dk, Dv=Dv, T=500, H=1,
                        segment_length=64,
                    )  # fmt: skip
                    if BACKEND.supports(problem, GPUS[arch]):
                        space = BACKEND.space(problem)
                        found = space.first_valid(lambda one, s=space, p=problem: s.valid(one, p, GPUS[arch]))
                        assert found is not None, problem


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("gpu", ["v100", "t4", "a100"])
def test_blocks_have_the_shared_memory_that_the_space_says(gpu: str, pass_: str) -> None:
    target, _ = resolve(gpu)
    for _ in range(6):
        problem = drawn(pass_, target)
        config = drawn_config(problem, target)
        said = getattr(import_module(f"mctune_spaces.tvm.gpu.matrix.{pass_}"), "SHARED", {})
        for operation in operations(problem):
            taken = max(kernel.shared for kernel in build_kernels(operation, problem, config, target))
            assert taken <= target.shared_bytes, (operation, problem, config)
            if operation in said:
                assert taken == said[operation](config, problem), (operation, problem, config)
