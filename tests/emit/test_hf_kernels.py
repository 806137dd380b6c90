"""A repository for Hugging Face's `kernels` library, loaded by the library itself; no network is used."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packages import GRM, forget

from mctune.backends.triton.backend import TritonBackend
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.core.winner import Winner
from mctune.emit import emit_repository, package_before, place_of
from mctune.reference import memory_caching as oracle
from mctune.runtime.kernels import table
from mctune.runtime.kernels.hardware import Hardware, foreign
from mctune.verify.inputs import make_inputs

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
kernels = pytest.importorskip("kernels", reason="kernels is not installed: pip install 'mctune[dev]'")
from kernels._rust import Digest, DigestAlgorithm, Metadata  # noqa: E402

ON_GPU = GRM.replace(dtype="bfloat16")
NATIVE = "torch-stable-abi211-cpu-x86_64-linux"


@pytest.fixture
def loaded() -> Iterator[Callable[[Path], ModuleType]]:
    """The library's own loader; what it has loaded is forgotten afterwards."""
    names: list[str] = []

    def load(path: Path) -> ModuleType:
        module = kernels.get_local_kernel(path)
        names.append(module.__name__)
        return module

    yield load
    for name in names:
        forget(name)


def triton_winners(target: Target, folder: Path, *passes: str) -> list[Winner]:
    """Kernels in their default configurations; nothing is compiled."""
    backend, winners = TritonBackend(), []
    for pass_ in passes:
        problem = ON_GPU.replace(pass_=pass_)
        space = backend.space(problem)
        config = space.first_valid(lambda config, space=space, problem=problem: space.valid(config, problem, target))
        assert config is not None
        built = backend.build(problem, config, target, folder)
        winners.append(Winner(
            problem=problem, config=Config.of({**config.to_dict(), "segment_length": 32}), outcome=Predicted(1.0, "core"),
            backend="triton", device="cuda", library=built.library, source=built.source, portable=None, cpu_flags=(),
            recommended=True, verified={}, parts=tuple((name, built.library.parent / file) for name, file in built.parts),
        ))  # fmt: skip
    return winners


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def gradients(memory_caching: Callable[..., torch.Tensor], problem: Problem, **options: Any) -> list[torch.Tensor]:
    """y, and the gradients of q, k, v and u, at inputs of the problem."""
    call = make_inputs(problem, 3).arguments(problem)
    leaves = [call[name].requires_grad_() for name in ("q", "k", "v", "u")]
    y = memory_caching(**call, **options)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def assert_right(kernel: ModuleType, problem: Problem, **options: Any) -> None:
    """y and gradients are those of the oracle, in float64."""
    call = make_inputs(problem, 3).arguments(problem)
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    leaves = [wide[name].requires_grad_() for name in ("q", "k", "v", "u")]
    y = oracle(**wide)
    expected = [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]
    for found, wanted in zip(gradients(kernel.memory_caching, problem, **options), expected, strict=True):
        rms = (found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert rms < 1e-4


def test_the_library_loads_the_kernels_of_a_cpu(
    tmp_path: Path, target: Target, winners: Sequence[Winner], loaded: Callable[[Path], ModuleType]
) -> None:
    repository = emit_repository(tmp_path / "memory-caching", target, winners)
    kernel = loaded(repository)
    assert kernel.__file__ == str(repository / "build" / NATIVE / "__init__.py")
    assert len(kernel.runtime.kernels.dispatch.TABLE.entries) == len(winners)
    assert_right(kernel, GRM)
    call = make_inputs(GRM, 3).arguments(GRM)
    torch.testing.assert_close(
        kernel.memory_caching(**call, backend="tvm"),
        kernel.memory_caching(**call, backend="eager"),
        atol=1e-4,
        rtol=1e-4,
    )
    plain = loaded(repository / "build" / "torch-cpu")
    assert plain.__name__ != kernel.__name__ and not plain.runtime.kernels.dispatch.TABLE.entries
    with pytest.warns(UserWarning, match="the eager path runs: there are no tuned kernels here"):
        assert_right(plain, GRM)
    # A variant of pure Python has no machine code.
    assert not [name for name in contents(repository / "build" / "torch-cpu") if name.endswith(".so")]
