"""Compile for GPUs that are not there."""

from __future__ import annotations

import contextlib
import importlib
import os

import pytest
import torch
import triton

from mctune.backends.triton.backend import TritonBackend
from mctune.backends.triton.device import DoesNotFit, VirtualDevice
from mctune.backends.triton.versions import numbers
from mctune.core.errors import DeviceError
from mctune.core.target import resolve, targets

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets Triton kernels", allow_module_level=True)

import small_kernel

SERVED = [target for target in targets() if target.arch not in ("sm_70", "sm_75") and not target.on_cpu]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def launch(target, dtype=torch.bfloat16, BT=64, stages=2, warps=4):
    x = torch.empty(4096, 64, dtype=dtype, device="meta")
    with VirtualDevice(target) as device:
        small_kernel.gram(x, x.new_empty(4096, BT, dtype=torch.float32), BT=BT, num_stages=stages, num_warps=warps)
    return device


@pytest.mark.parametrize("target", SERVED, ids=lambda target: target.name)
def test_every_target_gets_code_for_its_matrix_units(target):
    """What Triton's own instruction for the architecture is in the assembly, and the launch is noted as called."""
    unit = {"sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "mfma"}.get(target.arch, "mma.sync")
    (noted,) = launch(target).launches
    assert unit in noted.asm
    assert (noted.name, noted.grid, noted.num_warps, noted.num_stages) == ("gram_kernel", (64, 1, 1), 4, 2)
    assert noted.blocks == 64
    assert noted.threads == (256 if target.kind == "hip" else 128)
    assert dict(noted.arguments) == {"x": "*bf16", "y": "*fp32", "T": "i32"}
    assert dict(noted.values) == {"T": 4096, "D": 64, "BT": 64}
    assert 0 < noted.shared <= target.shared_bytes
    assert 16 <= noted.registers <= 512 and noted.spills == 0 and noted.binary


@pytest.mark.parametrize("name", ["h100-sxm", "mi300x"])
def test_arguments_without_a_use_are_not_noted(name):
    """Tensors of a named tuple among them, that others read, and None: they move no bytes."""
    x = torch.empty(1000, dtype=torch.bfloat16, device="meta")
    with VirtualDevice(resolve(name)[0]) as device:
        small_kernel.copy(x, torch.empty_like(x), BT=128)
    assert device.launches[0].arguments == (("read", "*bf16"), ("y", "*bf16"), ("T", "i32"))


def test_two_targets_in_one_process_do_not_share_kernels():
    h100, a100 = (resolve(name)[0] for name in ("h100-sxm", "a100-80g"))
    assert "sm_90" in launch(h100).launches[0].asm
    assert "sm_80" in launch(a100).launches[0].asm
    assert "sm_90" in launch(h100).launches[0].asm


def test_spills_are_counted():
    assert launch(resolve("a100-80g")[0], torch.float32, BT=256, warps=4, stages=1).launches[0].spills > 0


def test_too_much_shared_memory_says_need_and_limit():
    """A block of an RTX 4090 has 99 KiB, of an H100 227: the same launch fits one and not the other."""
    large = {"dtype": torch.float32, "BT": 128, "stages": 4, "warps": 8}
    assert launch(resolve("h100-sxm")[0], **large).launches
    with pytest.raises(DoesNotFit) as caught:
        launch(resolve("rtx4090")[0], **large)
    error = caught.value
    assert error.limit == 101376 < error.need
    assert str(error) == (
        f"gram_kernel with 8 warps and 4 stages needs {error.need} B of shared memory, a block has 101376"
    )
    with pytest.raises(DoesNotFit):  # again: Triton keeps the kernel, not the refusal
        launch(resolve("rtx4090")[0], **large)


def test_more_threads_than_a_block_has():
    with pytest.raises(DoesNotFit, match="needs 2048 threads, a block has 1024"):
        launch(resolve("mi300x")[0], warps=32)


def test_more_tensor_memory_than_a_block_has():
    too_much = "gram_kernel with 8 warps and 1 stages needs 2048 columns of tensor memory, a block has 512"
    # Triton 3.6 gives up before it has counted them.
    refused, told = (DoesNotFit, too_much) if numbers(triton.__version__) >= (3, 7) else (RuntimeError, "PassManager")
    for _ in range(2):  # again: Triton keeps the kernel, not the refusal
        with pytest.raises(refused, match=told):
            launch(resolve("b200")[0], BT=512, stages=1, warps=8)


def test_a_product_of_more_registers_than_a_thread_has():
    """512 threads have 128 registers each, all of which the sum would take."""
    too_much = r"gram_kernel needs \d+ registers, a thread of its blocks has 128"
    for _ in range(2):
        with pytest.raises(DoesNotFit, match=too_much) as caught:
            launch(resolve("h100-sxm")[0], BT=256, stages=1, warps=16)
        assert caught.value.limit == 128 < caught.value.need


@pytest.mark.parametrize(
    ("version", "numpy", "runs"), [("3.6.0", "2.3.5", 1), ("3.6.0", "2.5.2", 0), ("3.7.1", "2.5.2", 1)]
)
def test_an_interpreter_that_does_not_run_is_no_fault_of_a_candidate(version, numpy, runs, monkeypatch):
    found = {"triton": version, "numpy": numpy, "libcst": "1.8"}
    monkeypatch.setattr("mctune.backends.triton.versions.version", found.get)
    TritonBackend().ready()
    with (
        contextlib.nullcontext()
        if runs
        else pytest.raises(DeviceError, match=f"numpy {numpy}; pip install 'numpy<2.4'")
    ):
        TritonBackend().ready(here=False)


def test_the_driver_is_restored(monkeypatch):
    from triton import knobs
    from triton.runtime import driver

    before = driver._active, knobs.compilation.listener, list(knobs.runtime.kernel_load_start_hook.calls)
    with pytest.raises(ZeroDivisionError), VirtualDevice(resolve("a100-80g")[0]):
        raise ZeroDivisionError
    assert before == (driver._active, knobs.compilation.listener, knobs.runtime.kernel_load_start_hook.calls)


def test_a_second_process_finds_what_was_compiled():
    """Within one process the JIT forgets nothing, so the cache on disk is asked through fresh copies of the module."""
    target = resolve("l4")[0]
    importlib.reload(small_kernel)
    assert launch(target).compiled == ["gram_kernel"]
    importlib.reload(small_kernel)
    assert launch(target).compiled == []
