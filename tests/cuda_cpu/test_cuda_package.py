"""A package of TVM's GPU kernels on tensors of the CPU: import, dispatch, autograd, compile, the cache of a decode."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_holding import built

from mctune.core.outcome import Predicted
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.core.winner import Winner
from mctune.emit import emit_package
from mctune.runtime.errors import KernelError
from mctune.runtime.kernels.tvm.gpu import driver
from mctune.runtime.kernels.tvm.gpu.functions import Loaded, Module, Signature, aligned
from mctune.verify.cuda_cpu.folder import prepare_built
from mctune.verify.package import load_package

PROBLEM = Problem(T=64, H=2, Dk=16, Dv=16, segment_length=16, aggregation="grm", dtype="float16")
PASSES = ("forward", "backward", "decode")


@pytest.fixture(scope="module")
def package(cuda_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    winners = []
    for pass_ in PASSES:
        problem = PROBLEM.replace(pass_=pass_)
        config, made = built(problem, "t4", cuda_folder)
        prepare_built(made)
        winners.append(
            Winner(
                problem=problem, config=config, outcome=Predicted(1.0, "test", 1e-4), backend="tvm",
                library=made.library, source=made.source, portable=None, cpu_flags=(), recommended=True,
                verified={}, parts=tuple((name, cuda_folder / file) for name, file in made.parts), device="cuda",
            )
        )  # fmt: skip
    out = tmp_path_factory.mktemp("packages") / "mctune_of_t4"
    yield load_package(emit_package(out, resolve("t4")[0], winners))
    for name in [name for name in sys.modules if name.partition(".")[0] == out.name]:
        del sys.modules[name]


def leaves(seed: int, T: int = 50) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(1, T, 2, 16, generator=generator).to(torch.float16).requires_grad_() for name in "qkvu"}


def step(memory_caching: Any, backend: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """y and the gradients."""
    y = memory_caching(**inputs, aggregation="grm", segment_length=16, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), list(inputs.values()))]


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    off = (found.float() - wanted.float()).square().mean().sqrt()
    return bool(off <= 5e-3 * wanted.float().square().mean().sqrt())


@pytest.mark.parametrize("how", ("called", "compiled"))
def test_a_training_step(package: ModuleType, how: str) -> None:
    inputs, operation = leaves(0), package.memory_caching
    wanted = step(operation, "eager", inputs)
    if how == "compiled":
        torch._dynamo.reset()
        operation = torch.compile(operation, backend="aot_eager", fullgraph=True)
    found = step(operation, "tvm", inputs)
    assert all(near(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_prompt_and_tokens_after_it(package: ModuleType) -> None:
    torch.manual_seed(0)
    layer = package.MemoryCaching(
        hidden_size=32, num_heads=2, aggregation="grm", segment_length=16, layer_idx=0, backend="tvm"
    ).to(torch.float16)  # fmt: skip
    x = torch.randn(1, 37, 32, dtype=torch.float16)
    with torch.no_grad():
        layer.backend = "eager"
        wanted, _, _ = layer(x)
        layer.backend = "tvm"
        cache = package.MemoryCache()
        found = [layer(x[:, :20], past_key_values=cache, use_cache=True)[0]]
        found += [layer(x[:, t : t + 1], past_key_values=cache, use_cache=True)[0] for t in range(20, 37)]
    assert near(torch.cat(found, 1), wanted)


def test_kernels_of_one_dtype_serve_no_other(package: ModuleType) -> None:
    inputs = {name: x.detach().to(torch.bfloat16) for name, x in leaves(1).items()}
    with pytest.raises(RuntimeError, match="none of the 3 tuned kernels fits"):
        package.memory_caching(**inputs, aggregation="grm", segment_length=16, backend="tvm")


# --- what a launch refuses

ADD = Signature("add_kernel", (("x", "float*"), ("n", "int")), 32, 0)


def test_a_tensor_that_is_not_aligned(cuda_folder: Path) -> None:
    kernel = Loaded(ADD, Module(b"", "add.json", "sm_75"))
    x = torch.zeros(9)[1:]
    with pytest.raises(KernelError, match=r"x begins at an address .* 16 bytes that add_kernel .* pass x.clone\(\)"):
        kernel((1, 1, 1), {"x": x, "n": 1})
    copied = aligned(x)
    assert copied.data_ptr() % 16 == 0 and torch.equal(copied, x) and aligned(copied) is copied


def test_a_tensor_of_another_device(cuda_folder: Path) -> None:
    kernel = Loaded(ADD, Module(b"", "add.json", "sm_75"))
    with pytest.raises(KernelError, match="x is on meta, and add_kernel reads tensors of cpu"):
        kernel((1, 1, 1), {"x": torch.zeros(4, device="meta"), "n": 1})


def test_machine_code_that_is_none(cuda_folder: Path) -> None:
    kernel = Loaded(ADD, Module(b"no machine code" * 9, "add.json", "sm_75"))
    with pytest.raises(KernelError, match=r"add\.json does not load: it is no machine code"):
        kernel((1, 1, 1), {"x": torch.zeros(4), "n": 1})


def test_a_gpu_of_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "stands_in", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    with pytest.raises(
        KernelError, match=r"add\.json is machine code for sm_75, and NVIDIA H100 is sm_90; tune kernels"
    ):
        Module(b"", "add.json", "sm_75")._refuse_other(0)


def test_a_driver_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(driver.VARIABLE, "/nowhere/libcuda.so")
    with pytest.raises(KernelError, match=r"the CUDA driver /nowhere/libcuda.so does not load: .* need an NVIDIA GPU"):
        driver.driver()
    monkeypatch.delenv(driver.VARIABLE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match="torch sees no CUDA device"):
        driver.driver()
