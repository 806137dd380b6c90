"""What ptxas says of kernels: heard while they compile, kept in Triton's cache, asked for again where it is not."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mctune.backends.protocol import Launch
from mctune.backends.triton import notes
from mctune.backends.triton.cost import trips
from mctune.backends.triton.cost.parameters import Parameters
from mctune.backends.triton.cost.predict import demands, estimate, predict
from mctune.backends.triton.cost.walk import Source
from mctune.backends.triton.device import VirtualDevice
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.target import resolve

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets Triton kernels", allow_module_level=True)

import small_kernel

H100 = resolve("h100-sxm")[0]
T, D, BT = 4096, 128, 32
LOG = """ptxas info    : 0 bytes gmem
ptxas info    : (C7507) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirements.
ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma \
instructions reading accumulator registers of  a wgmma between start and end of the pipeline stage in the function 'a'
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the function 'b'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function 'c' in line 40
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function 'c' in line 90
ptxas info    : Used 168 registers, used 1 barriers
"""
_SERIALIZED = "wgmma.mma_async instructions are serialized due to"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def launch(stages: int = 2, target: str = "h100-sxm") -> Launch:
    """As a process of its own would find it."""
    importlib.reload(small_kernel)
    x = torch.empty(T, D, dtype=torch.bfloat16, device="meta")
    w, y = (x.new_empty(*shape, dtype=torch.float32) for shape in ((T,), (D, D)))
    with VirtualDevice(resolve(target)[0]) as device:
        small_kernel.weighted(x, w, x, y, BT=BT, num_warps=4, num_stages=stages)
    (made,) = device.launches
    return made


def test_notes_in_a_log() -> None:
    assert notes.notes_in(LOG) == (
        "C7507 'setmaxnreg' ignored to maintain minimum register requirements.",
        f"C7514 {_SERIALIZED} non wgmma instructions reading accumulator registers of a wgmma between start and end of "
        "the pipeline stage",
        f"C7512 {_SERIALIZED} insufficient register resources",
        f"C7511 {_SERIALIZED} insufficient register resources for the wgmma pipeline",
    )
    assert notes.notes_in("ptxas info    : Used 168 registers") == ()


def test_a_kernel_with_serialized_products_says_so_and_one_without_does_not() -> None:
    """Its left factors are made in registers while products of a pass before may be under way."""
    serialized, plain = launch(stages=2), launch(stages=1)
    assert serialized.serialized and not plain.serialized and plain.notes == ()
    (note,) = serialized.notes
    assert note.startswith(f"C7515 {_SERIALIZED} non wgmma instructions defining accumulator registers")
    assert not launch(target="a100-80g").notes


def test_it_is_known_of_a_kernel_that_was_found_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = launch()
    files = list(cache.rglob(notes.FILE))
    assert len(files) == 1 and first.serialized

    def never(*given: object) -> None:
        raise AssertionError("ptxas ran again")

    with monkeypatch.context() as patch:
        patch.setattr(notes, "_logged", never)
        assert launch().notes == first.notes
    # Compiled by another program, or half written: ptxas runs again, once.
    for broken in (None, "[", "7"):
        files[0].unlink() if broken is None else files[0].write_text(broken)
        assert launch().notes == first.notes
        with monkeypatch.context() as patch:
            patch.setattr(notes, "_logged", never)
            assert launch().notes == first.notes


def test_a_cache_that_cannot_be_written_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.cache import FileCacheManager

    first, put = launch(), FileCacheManager.put

    def full(self: object, data: object, filename: str, binary: bool = True) -> str:
        if filename == notes.FILE:
            raise OSError("no space left on device")
        return put(self, data, filename, binary)

    monkeypatch.setattr(FileCacheManager, "put", full)
    assert launch(stages=3).notes == first.notes


def test_keys_of_kernels_are_those_without_notes(cache: Path) -> None:
    """What was compiled before is found, and a model finds what was compiled ahead of time."""
    launch()
    keys = {path.parent.name for path in cache.rglob("*.cubin")}
    importlib.reload(small_kernel)
    device = VirtualDevice(H100)
    device._noting.enter_context = lambda manager: None  # type: ignore[method-assign]
    x = torch.empty(T, D, dtype=torch.bfloat16, device="meta")
    with device:
        small_kernel.weighted(
            x, x.new_empty(T, dtype=torch.float32), x, x.new_empty(D, D, dtype=torch.float32), BT, 4, 2
        )
    assert device.compiled == [] and {path.parent.name for path in cache.rglob("*.cubin")} == keys


def test_triton_and_its_output_are_as_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    make = CUDABackend.make_cubin
    launch()
    assert CUDABackend.make_cubin is make
    assert not knobs.nvidia.dump_ptxas_log and capsys.readouterr().out == ""
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    launch(stages=3)
    assert "(C7515) Potential Performance Loss" in capsys.readouterr().out


def test_serialized_products_are_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Source(1, 0, (Source(T / BT, 2 * BT * D * D),))
    monkeypatch.setitem(trips.TRIPS, "weighted_kernel", lambda walk: work)
    problem, config = Problem(T=T, H=1, Dk=D, Dv=D, segment_length=64), Config.of({"precision": "ieee"})
    made = launch()
    told = [
        demands((one,), problem, config, H100, Parameters())[0] for one in (made, replace(made, notes=()), launch(1))
    ]
    assert [demand.serialized for demand in told] == [True, False, False]
    slow, fast = (estimate((demand,), H100, Parameters())[0].us for demand in told[:2])
    # 2 x 2 products a pass and warpgroup, in turn: each of 64 x 128 x 16 takes 64 cycles or more, and 60 more.
    assert told[0].mean.groups == pytest.approx(4 * T / BT)
    assert slow - fast > 4 * T / BT * 60 / (H100.clock_ghz * 1e3) * 0.9
    outcome = predict((made,), problem, config, H100)
    assert outcome.notes == (f"weighted_kernel: {made.notes[0]}",)
