"""Faults that are planted into CUDA C: each is found by what runs it on the CPU, and a right kernel gives no report."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cuda_holding import built, launches_of, with_source

from mctune.core.outcome import Wrong
from mctune.core.problem import Problem
from mctune.runtime.errors import KernelError
from mctune.verify.cuda_cpu.sanitize import SANITIZERS, watched

PROBLEM = Problem(
    T=100, H=1, Dk=64, Dv=64, segment_length=64, aggregation="grm", dtype="float16", state_init="checkpoint"
)
BARRIER = "tvm_builtin_cuda_cta_sync();"
WARP_BARRIER = "tvm_builtin_cuda_warp_sync();"
Change = Callable[[str], str]


def without(call: str, which: int) -> Change:
    """The source without one of the calls in the kernel."""

    def change(text: str) -> str:
        places = [match.start() for match in re.finditer(rf"^ +{re.escape(call)}", text, re.MULTILINE)]
        place = text.index(call, places[which])
        return text[:place] + ";" + text[place + len(call) :]

    return change


def where_threads_differ(text: str) -> str:
    """A barrier that half of the block comes to."""
    place = text.index(f"  {BARRIER}", text.index("__global__"))
    return text[:place] + "  if (((int)threadIdx.x) < 64) " + text[place:].lstrip()


def replaced(pattern: str, by: str) -> Change:
    """The first place that a pattern matches in the kernel, changed."""

    def change(text: str) -> str:
        head, begin, body = text.partition("__global__")
        return head + begin + re.sub(pattern, by, body, count=1)

    return change


def planted(gpu: str, change: Change, folder: Path, **params: Any) -> str:
    """What is said of a read with a fault: by the shim, or that it is wrong."""
    config, made = built(PROBLEM, gpu, folder, **params)
    try:
        outcome = with_source(PROBLEM, config, made, "read_forward", changed(made.source.read_text(), change))
    except KernelError as error:
        return str(error)
    return "wrong" if isinstance(outcome, Wrong) else "nothing"


def seen(gpu: str, change: Change, folder: Path, watch: str) -> str:
    """What a sanitizer says of it."""
    config, made = built(PROBLEM, gpu, folder)
    source = changed(made.source.read_text(), change)
    return watched(launches_of(PROBLEM, config, made, "read_forward"), source, watch, folder)


def changed(source: str, change: Change) -> str:
    """A source with a plant that took."""
    found = change(source)
    assert found != source, "the plant did not take"
    return found


@pytest.mark.parametrize("gpu", ("t4", "v100"))
@pytest.mark.parametrize("watch", SANITIZERS)
@pytest.mark.parametrize("operation", ("segment_states", "gates", "read_forward"))
def test_a_right_kernel_gives_no_report(gpu: str, watch: str, operation: str, cuda_folder: Path) -> None:
    problem = PROBLEM.replace(Dk=32, Dv=32)
    config, made = built(problem, gpu, cuda_folder)
    source = (cuda_folder / dict(made.parts)[f"{operation}.cu"]).read_text()
    launches = launches_of(problem, config, made, operation)
    assert len(launches) >= 3 and watched(launches, source, watch, cuda_folder) == ""


@pytest.mark.parametrize("which", (1, 2))
def test_a_missing_barrier_is_a_race(which: int, cuda_folder: Path) -> None:
    assert seen("t4", without(BARRIER, which), cuda_folder, "threads") == "data race"


def test_a_missing_barrier_of_a_warp_is_a_race(cuda_folder: Path) -> None:
    assert seen("v100", without(WARP_BARRIER, 0), cuda_folder, "threads") == "data race"


def test_a_store_beside_an_array(cuda_folder: Path) -> None:
    change = replaced(r"\(\(uint\*\)y_ptr\)\[", "((uint*)y_ptr)[100000 + ")
    assert seen("t4", change, cuda_folder, "addresses").startswith(("heap-buffer-overflow", "SEGV", "unknown"))


def test_a_load_beside_an_array(cuda_folder: Path) -> None:
    change = replaced(r"\(\(uint\*\)q_ptr\) \+ ", "((uint*)q_ptr) + 4096 + ")
    assert seen("t4", change, cuda_folder, "addresses").startswith("heap-buffer-overflow")


def test_a_store_beside_the_shared_memory(cuda_folder: Path) -> None:
    change = replaced(r"\(\(uint\*\)pool_ptr\) \+ ", "((uint*)pool_ptr) + 4608 + ")
    assert seen("t4", change, cuda_folder, "addresses").startswith("heap-buffer-overflow")


def test_a_row_of_ldmatrix_beside_the_shared_memory(cuda_folder: Path) -> None:
    change = replaced(r"&\(\(\(ushort\*\)pool_ptr\)\[", "&(((ushort*)pool_ptr)[8192 + ")
    assert "shared memory" in planted("t4", change, cuda_folder)


def test_an_address_of_ldmatrix_that_is_not_aligned(cuda_folder: Path) -> None:
    change = replaced(r"&\(\(\(ushort\*\)pool_ptr\)\[", "&(((ushort*)pool_ptr)[2 + ")
    assert "is not aligned" in planted("t4", change, cuda_folder)


def test_a_vector_that_is_not_aligned(cuda_folder: Path) -> None:
    change = replaced(r"\(\(uint\*\)q_ptr\) \+ ", "((uint*)q_ptr) + 1 + ")
    assert "a vector is not aligned to its size" in planted("t4", change, cuda_folder)


def test_a_barrier_that_some_do_not_come_to(cuda_folder: Path) -> None:
    said = planted("t4", where_threads_differ, cuda_folder)
    assert "__syncthreads" in said and ("never come" in said or "others of its block" in said)


def test_registers_of_a_fragment_that_are_swapped(cuda_folder: Path) -> None:
    change = replaced(r"(mma_sync\w+\(.*?), (left_\w+\[0\]), (left_\w+\[1\]), ", r"\1, \3, \2, ")
    assert planted("t4", change, cuda_folder) == "wrong"


def test_rows_that_ldmatrix_does_not_transpose(cuda_folder: Path) -> None:
    """The keys' tile is read by rows; by columns it is wrong."""
    change = replaced(r"ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16\(", "ldmatrix_sync_aligned_m8n8_x4_shared_b16(")
    assert planted("t4", change, cuda_folder) == "wrong"


def test_copies_that_nothing_waits_for(cuda_folder: Path) -> None:
    change = replaced(r"tvm_\w*cp_async_wait_all\w*\(\);", ";")
    said = planted("a100", change, cuda_folder, read_stages=2, read_prefetch="async")
    assert "before its copies were waited for" in said
