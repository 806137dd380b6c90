"""Candidates of TVM's GPU templates, compiled and run as CUDA C on the CPU."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mctune.backends.protocol import Built
from mctune.backends.tvm.gpu.backend import LAUNCHERS, TvmGpuBackend
from mctune.core.config import Config
from mctune.core.outcome import Wrong
from mctune.core.problem import AGGREGATIONS, Problem
from mctune.core.target import Target, resolve
from mctune.runtime.kernels.tvm.gpu.functions import Grid, Loaded, load_parts
from mctune.verify.cuda_cpu.build import prepare
from mctune.verify.cuda_cpu.folder import FOLDERS, prepare_built
from mctune.verify.cuda_cpu.sanitize import Launched, recorded
from mctune.verify.judge import judge_all, run_kernel, verify

BACKEND = TvmGpuBackend()
DTYPES = ("float16", "bfloat16", "float32")
GPUS = {"sm_70": "v100", "sm_75": "t4", "sm_80": "a100-80g"}


def config_of(problem: Problem, gpu: str, **changed: Any) -> Config:
    """The default for a problem, with some parameters changed."""
    target, space = resolve(gpu)[0], BACKEND.space(problem)
    config = space.first_valid(lambda one: space.valid(one, problem, target))
    assert config is not None, problem
    config = config.replace(**changed)
    assert not space.broken(config, problem, target), space.broken(config, problem, target)
    return config


def drawn(source: random.Random, pass_: str, target: Target) -> tuple[Problem, Config]:
    """A problem that there is a template for, and a configuration of its space, a step after the other away from the
    default."""
    pick = source.choice
    while True:
        aggregation = pick(list(AGGREGATIONS))
        segmentation = "constant" if pass_ == "decode" else pick(("constant", "constant", "logarithmic", "packed"))
        problem = Problem(
            pass_=pass_, recurrence=pick(("linear", "swla")), aggregation=aggregation, dtype=pick(DTYPES),
            Dk=pick((1, 16, 25, 40, 70, 128)), Dv=pick((1, 16, 25, 40, 70, 128)), T=source.randint(1, 200), H=2,
            segmentation=segmentation, state_init=pick(("independent", "checkpoint")),
            segment_length=None if segmentation == "logarithmic" else pick((1, 32, 64, 100)),
            top_k=pick((1, 2, 3)) if AGGREGATIONS[aggregation].sparse else None,
        )  # fmt: skip
        if BACKEND.supports(problem, target):
            break
    space, config = BACKEND.space(problem), config_of(problem, target.name)
    for param in source.sample(space.params, len(space.params)):
        changed = config.replace(**{param.name: pick(param.values)})
        config = changed if space.valid(changed, problem, target) else config
    return problem, config


def built(problem: Problem, gpu: str, folder: Path, **changed: Any) -> tuple[Config, Built]:
    """A candidate, compiled for a GPU."""
    config = config_of(problem, gpu, **changed)
    return config, BACKEND.build(problem, config, resolve(gpu)[0], folder)


def error_of(problem: Problem, gpu: str, folder: Path, **changed: Any) -> float | Wrong:
    """The error of a candidate, or what is wrong with it."""
    config, made = built(problem, gpu, folder, **changed)
    prepare_built(made)
    parts, apart = dict(made.parts), {}
    for operation, kernels in load_parts(folder, parts).items():
        source = (folder / parts[operation]).with_suffix(".cu").read_text()
        apart[operation] = {name: Apart(one, promises(source, name)) for name, one in kernels.items()}
    return _verified(problem, config, made, apart)


@dataclass
class Apart:
    """A kernel; of arrays that it takes twice, it may write none, if the compiler was told that there are none."""

    function: Loaded
    told: bool

    def __call__(self, grid: Grid, values: Mapping[str, Any]) -> None:
        tensors = {name: x for name, x in values.items() if isinstance(x, torch.Tensor) and x.numel()}
        places = Counter(x.data_ptr() for x in tensors.values())
        twice = {name: x.clone() for name, x in tensors.items() if places[x.data_ptr()] > 1}
        self.function(grid, values)
        written = [name for name, before in twice.items() if not torch.equal(_bits(before), _bits(tensors[name]))]
        assert not (written and self.told), f"{self.function.signature.symbol} writes what it takes twice: {written}"


def promises(source: str, symbol: str) -> bool:
    """Whether CUDA C tells the compiler that arrays of a kernel are apart."""
    declared = re.search(rf"\b{symbol}\(([^)]*)\) {{$", source, re.MULTILINE)
    assert declared is not None
    return "__restrict__" in declared[1]


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def launches_of(problem: Problem, config: Config, made: Built, operation: str) -> list[Launched]:
    """What the verification of a candidate launches of one operation."""
    prepare_built(made)
    kernels, launches = recorded(load_parts(made.library.parent, dict(made.parts)))
    assert isinstance(_verified(problem, config, made, kernels), float)
    return [one for one in launches if one.signature.symbol in kernels[operation]]


def with_source(problem: Problem, config: Config, made: Built, operation: str, source: str) -> float | Wrong:
    """The verification of a candidate whose CUDA C of one operation is another."""
    parts, folder = dict(made.parts), made.library.parent
    prepare_built(made)
    # The stand-in tells modules apart by their machine code, of which it reads nothing after the header.
    image, digest = bytearray((folder / parts[f"{operation}.cubin"]).read_bytes()), hashlib.sha256(source.encode())
    image[64:72] = digest.digest()[:8]
    planted = folder / f"planted_{digest.hexdigest()[:8]}.cubin"
    planted.write_bytes(bytes(image))
    prepare(bytes(image), source, Path(os.environ[FOLDERS]))
    return _verified(problem, config, made, load_parts(folder, parts | {f"{operation}.cubin": planted.name}))


def _verified(problem: Problem, config: Config, made: Built, kernels: Any) -> float | Wrong:
    kernel = LAUNCHERS[problem.writes.family, problem.pass_](made.library, made.record(problem, config), kernels)
    return verify(partial(run_kernel, kernel), problem, judge_all(problem, 1))
