"""The launcher: memory layouts, dtypes, threads, limits, and machines that cannot run a kernel."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fences import judged, y_of

from mctune.backends.tvm import TvmBackend
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.reference import error_ratio
from mctune.reference import memory_caching as oracle
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.errors import KernelError
from mctune.runtime.kernels import dispatch
from mctune.runtime.kernels.table import Entry, Table
from mctune.runtime.kernels.tvm import loader as tvm_loader
from mctune.runtime.kernels.tvm.matrix.forward import TvmForward
from mctune.runtime.segments import make_segments
from mctune.verify.inputs import Inputs, make_inputs
from mctune.verify.judge import TOLERANCE, poisoned_memory
from tests.draw import host, plain

ROOT = Path(__file__).resolve().parents[2]
GRM = Problem(T=150, H=3, B=2, Dk=20, Dv=7, segment_length=32)
SSC = GRM.replace(recurrence="swla", aggregation="ssc", state_init="checkpoint", top_k=2)

Build = Callable[..., TvmForward]


@pytest.fixture(scope="module")
def grm(build: Build) -> TvmForward:
    return build(GRM)


@pytest.fixture(scope="module")
def ssc(build: Build) -> TvmForward:
    return build(SSC, gather())


def gather() -> Config:
    return plain(SSC, formulation="gather")


@pytest.fixture
def served(
    grm: TvmForward, ssc: TvmForward, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[dict[str, TvmForward]]:
    """``memory_caching(backend="tvm")`` launches the two kernels."""
    kernels = {"grm": grm, "ssc": ssc}
    entries = [Entry(p.to_dict(), "tvm", tmp_path, {}) for p in (GRM, SSC)]
    monkeypatch.setattr(dispatch, "TABLE", Table(tuple(entries)))
    monkeypatch.setattr(dispatch, "launcher", lambda entry: kernels[entry.problem["aggregation"]])
    yield kernels


@pytest.mark.parametrize("problem", (GRM, SSC), ids=("grm", "ssc"))
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_half_precision_is_converted_at_the_boundary(
    problem: Problem, dtype: str, served: dict[str, TvmForward]
) -> None:
    problem = problem.replace(dtype=dtype)
    inputs, reference = judged(problem, 1)
    with poisoned_memory():
        y = memory_caching(**inputs.arguments(problem), backend="tvm")
    assert y.dtype == getattr(torch, dtype)
    assert error_ratio(y, reference) <= TOLERANCE[dtype]
    # Inside, all is float32: the result is the float32 one, rounded once.
    wide = {name: x.float() if name in "qkvu" else x for name, x in inputs.arguments(problem).items()}
    assert torch.equal(y, memory_caching(**wide, backend="tvm").to(y.dtype))


def test_scale_and_connector_and_gates_by_default(served: dict[str, TvmForward]) -> None:
    inputs, _ = judged(SSC, 2)
    options = inputs.arguments(SSC)
    absent = {name: x for name, x in options.items() if name not in ("u", "g", "beta", "lam")}
    for changed in (
        options | {"scale": -3.0},
        absent,
        options | {"beta": None},
        options | {"g": None, "lam": None},
        {**inputs.arguments(GRM), "g": None, "beta": None, "lam": None, "u": None},
    ):
        y = memory_caching(**changed, backend="tvm")
        assert error_ratio(y, oracle(**changed)) <= 2e-5


def awkward(x: torch.Tensor) -> list[torch.Tensor]:
    """The same values: one float off an aligned address, and as views of larger arrays."""
    flat = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    assert flat.data_ptr() % 16 != 0
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))[..., 3:].copy_(x)
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    return [flat, wide, turned]


@pytest.mark.parametrize("problem", (GRM, SSC), ids=("grm", "ssc"))
@pytest.mark.parametrize("layout", range(3), ids=("unaligned", "strided", "transposed"))
@pytest.mark.parametrize("width", ("padded", "whole"))
def test_any_layout_gives_the_same(
    problem: Problem, layout: int, width: str, build: Build, served: dict[str, TvmForward]
) -> None:
    if width == "whole":
        problem = problem.replace(Dk=16, Dv=16)
        kernel = build(problem, None if problem.aggregation == "grm" else gather(), fenced=False)
    else:
        kernel = build(problem, None if problem.aggregation == "grm" else gather(), fenced=False)
    inputs = make_inputs(problem, 3)
    moved = replace(
        inputs,
        **{name: awkward(getattr(inputs, name))[layout] for name in "qkvu"},
        gates={name: awkward(gate)[layout] for name, gate in inputs.gates.items()},
    )
    before = {name: getattr(moved, name).clone() for name in "qkvu"}
    y = y_of(kernel, problem, moved)
    assert torch.equal(y, y_of(kernel, problem, inputs))
    assert all(torch.equal(x, getattr(moved, name)) for name, x in before.items()), "an input was written to"


@pytest.mark.parametrize("problem", (GRM, SSC), ids=("grm", "ssc"))
def test_the_number_of_threads_changes_nothing(problem: Problem, build: Build) -> None:
    kernel = build(problem, None if problem.aggregation == "grm" else gather(), fenced=False)
    inputs = make_inputs(problem.replace(T=1000), 4)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [y_of(kernel, problem.replace(T=1000), inputs) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results)


def test_kernels_run_on_the_threads_of_torch(build: Build, scratch: ctypes.CDLL) -> None:
    """As many as torch is set to, and no other pool is started."""
    problem = GRM.replace(T=20_000)
    kernel, inputs = build(GRM, fenced=False), make_inputs(problem, 5)
    before = torch.get_num_threads()

    def used(threads: int) -> int:
        torch.set_num_threads(threads)
        torch.ones(1 << 20).add_(1)
        pool = set(os.listdir("/proc/self/task"))
        scratch.mctune_test_callers()
        y_of(kernel, problem, inputs)
        # One of another test may end meanwhile.
        assert set(os.listdir("/proc/self/task")) <= pool
        return int(scratch.mctune_test_callers())

    try:
        assert used(1) == 1
        # The second thread may come late on a busy machine.
        assert 2 in [used(2) for _ in range(5)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("g", (-50.0, -200.0, float("-inf")))
@pytest.mark.parametrize("aggregation", ("grm", "ssc"))
def test_a_memory_that_forgets_everything_has_no_nan(g: float, aggregation: str, build: Build) -> None:
    problem = SSC if aggregation == "ssc" else SSC.replace(aggregation="grm", top_k=None)
    kernel = build(problem, gather() if aggregation == "ssc" else None)
    inputs, _ = judged(problem, 6)
    gate = torch.where(torch.rand(2, 150, 3, generator=torch.Generator().manual_seed(0)) < 0.5, g, 0.0)
    for forget in (gate, torch.full_like(gate, g)):
        inputs.gates["g"] = forget
        with poisoned_memory():
            y = y_of(kernel, problem, inputs)
        assert error_ratio(y, oracle(**inputs.arguments(problem))) <= 2e-5


def test_ties_go_to_the_earlier_segment(ssc: TvmForward, build: Build) -> None:
    """Every segment has the same keys, hence the same descriptor; their values differ."""
    for kernel in (ssc, *(build(SSC, gather().replace(formulation=f)) for f in ("per_segment", "gated"))):
        inputs = make_inputs(SSC, 7)
        once = inputs.k[:, :32]
        inputs = replace(inputs, k=torch.cat([once] * 5, 1)[:, :150].contiguous())
        assert error_ratio(y_of(kernel, SSC, inputs), oracle(**inputs.arguments(SSC))) <= 2e-5


def test_logits_far_apart_do_not_overflow(grm: TvmForward) -> None:
    inputs = make_inputs(GRM, 8)
    for factor in (1e3, -1e3, 1e30):
        y = y_of(grm, GRM, replace(inputs, u=inputs.u * factor))
        assert bool(y.isfinite().all())


def test_a_top_k_beyond_every_segment_reads_them_all(ssc: TvmForward) -> None:
    inputs = make_inputs(SSC, 9)
    few = y_of(ssc, SSC.replace(top_k=5), inputs)
    for top_k in (10_000_000, 2**31 - 1, 2**40):
        assert torch.equal(y_of(ssc, SSC.replace(top_k=top_k), inputs), few)


@pytest.mark.parametrize(("T", "C", "B", "H"), ((2**26, 2**26, 1, 1), (2**13, 1, 2, 2**8)), ids=("tokens", "states"))
def test_indices_beyond_32_bits_are_refused(T: int, C: int, B: int, H: int, grm: TvmForward) -> None:
    nothing = torch.zeros(1, 1, 1, 1)
    keys, values = nothing.expand(B, T, H, 20), nothing.expand(B, T, H, 7)
    with pytest.raises(KernelError, match=r"2147483648 elements exceeds 2\^31 - 1; split the batch"):
        grm(
            keys, keys, values, keys, g=None, beta=None, lam=None, scale=1.0, top_k=1,
            segments=make_segments(T, "constant", C),
        )  # fmt: skip


def test_a_cpu_that_lacks_what_a_kernel_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.so"
    v3 = {"avx2", "fma", "bmi2", "f16c"}
    record: dict[str, Any] = {"cpu_flags": ["avx2", "avx512f", "avx512vl"], "portable": "kernels/portable.so"}
    for flags, library in ((v3 | {"avx512f", "avx512vl", "sse4_2"}, "tuned.so"), (v3, "portable.so")):
        monkeypatch.setattr(tvm_loader, "host_flags", lambda flags=flags: frozenset(flags))
        assert tvm_loader.runnable(tuned, record) == tmp_path / library
    with pytest.raises(KernelError, match=r"tuned\.so needs avx512f, avx512vl, which this CPU lacks; .*mctune search"):
        tvm_loader.runnable(tuned, record | {"portable": None})
    monkeypatch.setattr(tvm_loader, "host_flags", lambda: frozenset({"sse4_2"}))
    with pytest.raises(KernelError, match="needs avx2, avx512f, avx512vl, which this CPU lacks"):
        TvmForward(tuned, record | {"problem": GRM.to_dict()})


def test_a_build_for_other_cpus_is_right_too(kernel_folder: Path, scratch: ctypes.CDLL) -> None:
    backend, folder = TvmBackend(), kernel_folder
    inputs, reference = judged(SSC, 10)
    other = "x86-64-v2" if host().arch == "x86-64-v3" else "x86-64-v3"
    built = backend.build(SSC, gather(), replace(host(), arch=other), folder)
    assert built != backend.build(SSC, gather(), host(), folder)
    assert error_ratio(y_of(backend.load(SSC, plain(SSC), built), SSC, inputs), reference) <= 2e-5


def test_a_missing_or_broken_library(tmp_path: Path) -> None:
    record = {"problem": GRM.to_dict()}
    with pytest.raises(KernelError, match=r"absent\.so is missing; .*mctune emit"):
        TvmForward(tmp_path / "absent.so", record)
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with pytest.raises(KernelError, match=r"broken\.so does not load"):
        TvmForward(tmp_path / "broken.so", record)


AFTER_TVM = """
import os, sys
from pathlib import Path

import torch

from mctune.core.problem import Problem
from mctune.runtime.kernels.tvm.matrix.forward import TvmForward
from mctune.verify.inputs import make_inputs
from mctune.verify.judge import run_kernel

problem = Problem.from_json(sys.argv[1])
first, second = (TvmForward(Path(path), {"problem": problem.to_dict()}) for path in sys.argv[2:4])
inputs = make_inputs(problem, 0)
torch.set_num_threads(2)
run_kernel(first, problem, inputs)
import tvm

pool = set(os.listdir("/proc/self/task"))
third = TvmForward(Path(sys.argv[4]), {"problem": problem.to_dict()})
assert torch.equal(run_kernel(third, problem, inputs)["y"], run_kernel(second, problem, inputs)["y"])
assert set(os.listdir("/proc/self/task")) == pool, "a second pool of threads was started"
"""


def test_importing_the_compiler_between_two_kernels_changes_no_threads(
    build: Build, kernel_folder: Path, tmp_path: Path
) -> None:
    """The compiler brings a pool of its own, which would take the cores from torch's."""
    problem = GRM.replace(Dk=16, Dv=16)
    built = TvmBackend().build(problem, plain(problem), host(), kernel_folder)
    copies = [tmp_path / f"{name}.so" for name in "abc"]
    for copy in copies:
        copy.write_bytes(built.library.read_bytes())
    command = [sys.executable, "-c", AFTER_TVM, problem.to_json(), *map(str, copies)]
    environment = os.environ | {"TVM_NUM_THREADS": "4"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


RAW = """
import sys
from pathlib import Path

import torch

from mctune.runtime.kernels.tvm.loader import load_library

module = load_library(Path(sys.argv[1]))
N, T, H, D = 2, 8, 1, 16
i32 = lambda *values: torch.tensor(values, dtype=torch.int32)
good = dict(
    q=torch.ones(T * H, D), u=torch.ones(T * H, D), k=torch.ones(T * H, D), v=torch.ones(T * H, D),
    g=torch.zeros(1), beta=torch.zeros(1), lam=torch.zeros(1),
    states=torch.zeros(H * N * D, D), means=torch.zeros(H * N, D), begin=i32(0, 4), end=i32(4, 8), first=i32(0, 0),
    T=T, H=H, longest=4, top_k=1, scale=1.0, y=torch.zeros(T * H, D),
)
names = dict(
    segment_states="k v g beta lam begin end first T H states means".split(),
    read_forward="q u k v g beta lam states means begin end first T H longest top_k scale y".split(),
)


def call(function, **changes):
    values = good | changes
    module[function](*(values[name] for name in names[function]))


for function in names:
    call(function)
bad = [
    ("read_forward", dict(q=good["q"].double())),
    ("read_forward", dict(q=good["q"].half())),
    ("read_forward", dict(q=good["q"].int())),
    ("read_forward", dict(q=torch.ones(T * H, D + 1))),
    ("read_forward", dict(q=torch.ones(T * H - 1, D))),
    ("read_forward", dict(v=torch.ones(T * H, 2 * D))),
    ("read_forward", dict(k=torch.ones(T, H, D))),
    ("read_forward", dict(k=torch.ones(D, T * H).t())),
    ("read_forward", dict(y=torch.zeros(T * H - 1, D))),
    ("read_forward", dict(begin=good["begin"].long())),
    ("read_forward", dict(end=i32(4))),
    ("read_forward", dict(scale="x")),
    ("read_forward", dict(T=1.5)),
    ("read_forward", dict(q=None)),
    ("read_forward", dict(q="x")),
    ("segment_states", dict(k=good["k"].double())),
    ("segment_states", dict(states=torch.zeros(H * N * D, D + 1))),
    ("segment_states", dict(means=torch.zeros(H * N + 1, D))),
]
for function, changes in bad:
    try:
        call(function, **changes)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        print(type(error).__name__, function, *changes, "|", " ".join(str(error).split()))
    else:
        raise SystemExit(f"{function} took {changes}")
try:
    module["read_forward"](good["q"])
except (ValueError, TypeError, RuntimeError) as error:
    print(type(error).__name__, "read_forward count |", " ".join(str(error).split()))
call("read_forward")
assert "tvm" not in sys.modules
print("done", len(bad))
"""


def test_a_raw_kernel_refuses_what_it_was_not_compiled_for(kernel_folder: Path) -> None:
    """Without the compiler, an argument check that fails must be an exception and never a crash."""
    problem = GRM.replace(Dk=16, Dv=16)
    built = TvmBackend().build(problem, plain(problem), host(), kernel_folder)
    done = subprocess.run(
        [sys.executable, "-c", RAW, str(built.library)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *refusals, last = done.stdout.splitlines()
    assert last == "done 18" and len(refusals) == 19
    for line in refusals:
        what, message = line.split(" | ")
        function, name = what.split()[1:]
        assert function in message
        assert name in message or name == "count", line


def test_a_random_call_is_not_served_by_a_kernel_of_other_widths(
    served: dict[str, TvmForward], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())  # another test may have had the one warning
    problem = GRM.replace(Dk=16)
    inputs: Inputs = make_inputs(problem, 11)
    with pytest.warns(UserWarning, match="the eager path runs: none of the 2 tuned kernels fits"):
        y = memory_caching(**inputs.arguments(problem))
    assert error_ratio(y, oracle(**inputs.arguments(problem))) <= 2e-5
