"""Every GPU of the registry that Triton serves compiles the corners of every space; the others say why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mctune.backends import backend_for, makers
from mctune.backends.triton.backend import TritonBackend
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import TooLarge
from mctune.core.problem import PASSES, Problem
from mctune.core.target import Target, resolve, targets

GPUS = [target for target in targets() if not target.on_cpu]
SERVED = [target for target in GPUS if target.arch not in ("sm_70", "sm_75")]
PROBLEM = Problem(aggregation="grm", T=4096, H=16, Dk=128, Dv=128, segment_length=256, dtype="bfloat16")


def corners(problem: Problem, target: Target) -> Iterator[Config]:
    """The default, and with every parameter at its first and at its last value, as far as the constraints allow."""
    backend = TritonBackend()
    space = backend.space(problem)
    default = space.first_valid(lambda config: space.valid(config, problem, target))
    assert default is not None
    yield default
    for param in space.params:
        for value in (param.values[0], param.values[-1]):
            config = default.replace(**{param.name: value})
            if config != default and space.valid(config, problem, target):
                yield config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def check(problem: Problem, config: Config, target: Target, folder: Path) -> bool:
    """Whether a candidate compiles; one that does not fit must say what it needs."""
    backend = TritonBackend()
    made = backend.compile(problem, config, backend.build(problem, config, target, folder), target)
    if isinstance(made, TooLarge):
        assert made.need > made.limit and str(made.need) in made.message and str(made.limit) in made.message
        return False
    assert made and all(launch.binary and launch.registers for launch in made)
    return True


@pytest.mark.parametrize("aggregation", ["grm", "residual"])
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("h100-sxm", 0),
        ("a100-80g", 256),
        *(pytest.param(name, 256, marks=pytest.mark.slow) for name in ("rtx4090", "b200", "rtx5090", "mi300x")),
    ],
)
def test_the_default_compiles_without_spilling_much(
    name: str, most: int, pass_: str, aggregation: str, folder: Path
) -> None:
    target, _ = resolve(name)
    backend = TritonBackend()
    problem = PROBLEM.replace(pass_=pass_, aggregation=aggregation)
    config = next(corners(problem, target))
    made = backend.compile(problem, config, backend.build(problem, config, target, folder), target)
    assert not isinstance(made, TooLarge), made
    assert {launch.name: launch.spills for launch in made if launch.spills > most} == {}


@pytest.mark.parametrize(
    ("pass_", "chosen"),
    [
        ("forward", {"formulation": "scaled", "read_BT": 256, "read_BV": 128, "read_num_warps": 16}),
        (
            "backward",
            {"dq_BT": 256, "dq_num_warps": 16, "dstates_SEGMENTS": 4, "dstates_OPERAND": "shared", "dkv_BJ": 128},
        ),
    ],
)
def test_no_constraint_takes_away_the_default_that_was_chosen(pass_: str, chosen: dict[str, object]) -> None:
    """Where a default is not valid, a fallback takes its place and says nothing."""
    target, _ = resolve("h100-sxm")
    default = next(corners(PROBLEM.replace(pass_=pass_), target)).to_dict()
    assert {name: default[name] for name in chosen} == chosen


@pytest.mark.parametrize("pass_", PASSES)
def test_the_default_fits_where_there_is_little_shared_memory(pass_: str, folder: Path) -> None:
    target, _ = resolve("mi300x")
    problem = PROBLEM.replace(pass_=pass_)
    assert check(problem, next(corners(problem, target)), target, folder)


@pytest.mark.slow
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("target", SERVED, ids=lambda target: target.name)
def test_corners_of_the_space(target: Target, pass_: str, folder: Path) -> None:
    """Aggregations and recurrences take turns over the targets, of which several are of one architecture."""
    turn = SERVED.index(target)
    aggregation, recurrence = ("grm", "ssc", "mean")[turn % 3], ("linear", "swla")[turn % 2]
    problem = PROBLEM.replace(
        pass_=pass_, aggregation=aggregation, recurrence=recurrence, top_k=4 if aggregation == "ssc" else None
    )
    fits = [check(problem, config, target, folder) for config in corners(problem, target)]
    # Decoding's space has eight parameters, the others more than twenty.
    assert any(fits) and len(fits) > (8 if pass_ == "decode" else 10)


@pytest.mark.parametrize("name", ["v100", "t4"])
def test_what_triton_cannot_serve_says_why(name: str) -> None:
    target, _ = resolve(name)
    assert backend_for(target) == "tvm.gpu"
    with pytest.raises(UsageError, match=r"no matrix units there .* take --backend tvm"):
        makers(target, "triton")


@pytest.mark.parametrize("target", SERVED, ids=lambda target: target.name)
def test_every_gpu_has_the_figures_that_the_cost_model_needs(target: Target) -> None:
    assert backend_for(target) == "triton"
    needed = ("cores", "clock_ghz", "matrix_tflops", "dram_gbs", "cache_tbs", "shared_bytes", "threads_per_core")
    assert all(getattr(target, name) for name in needed)
