"""The read by specialised warps: its source, run by an emulation of Gluon, against the oracle. Not its binary."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gluon_emulator import Deadlock, Emulated, Misuse

from mctune.backends.triton.backend import TritonBackend
from mctune.cli import main
from mctune.core.config import Config
from mctune.core.outcome import Crashed, Timed
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.core.winner import Winner
from mctune.emit.package import emit_package
from mctune.runtime.errors import KernelError
from mctune.runtime.kernels.triton.matrix import forward as triton_forward
from mctune.runtime.kernels.triton.matrix.forward import TritonForward
from mctune.verify.judge import error_of, judge, run_kernel, tolerance, verify_case
from mctune.verify.passes import PASSES
from mctune.workers.predicted import _Predictor

TARGET, _ = resolve("h100-sxm")
PROBLEM = Problem(aggregation="grm", T=600, H=1, Dk=128, Dv=128, segment_length=512, dtype="float16")
SHORT = PROBLEM.replace(T=600, segment_length=200)


def config_of(**changes: Any) -> Config:
    space = TritonBackend().measuring().space(PROBLEM)
    config = space.first_valid(lambda config: space.valid(config, PROBLEM, TARGET))
    assert config is not None
    return config.replace(formulation="specialized", **changes)


def emulated(
    config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch, *fault: str, problem: Problem = PROBLEM
) -> TritonForward:
    """The launcher with the kernel emulated; ``fault``: a piece of its source, and what stands there instead."""
    built = TritonBackend().build(problem, config, TARGET, folder)
    if fault:
        text = built.source.read_text(encoding="utf-8")
        assert fault[0] in text
        built.source.write_text(text.replace(*fault), encoding="utf-8")
    monkeypatch.setattr(triton_forward, "refuse_specialized", lambda: None)
    kernel: TritonForward = TritonBackend().load(problem, config, built)
    module = sys.modules[kernel.read_specialized.__module__]
    monkeypatch.setattr(module, "read_specialized_kernel", Emulated(module, "read_specialized_kernel"))
    return kernel


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"T": 1}, {}),
        ({"T": 777, "B": 2, "aggregation": "soup"}, {"read_num_stages": 2}),
        ({"T": 300, "H": 2, "segment_length": 200, "state_init": "checkpoint"}, {"read_num_stages": 4}),
        # Tiles that begin inside a piece; segments of several pieces.
        ({"T": 1100, "segment_length": 500}, {"piece": 512}),
        ({"T": 700, "segment_length": 300}, {}),
        ({"T": 640, "segmentation": "packed"}, {}),
    ],
)  # fmt: skip
def test_the_source_agrees_with_the_oracle(
    changes: dict[str, Any], config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = PROBLEM.replace(**{"segment_length": 256, **changes})
    tuned = problem.replace(segmentation="constant", segment_length=512)
    kernel = emulated(config_of(**config), tmp_path, monkeypatch, problem=tuned)
    assert verify_case(partial(run_kernel, kernel), problem, 1) <= tolerance(problem)


def test_gates_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that differ by hundreds, and rise and fall from segment to segment."""
    case = judge(SHORT, 1)
    case = replace(case, inputs=replace(case.inputs, u=case.inputs.u * 200))
    kernel = emulated(config_of(), tmp_path, monkeypatch)
    error = error_of(run_kernel(kernel, SHORT, case.inputs), PASSES["forward"].expected(SHORT, case.inputs))
    assert error <= tolerance(SHORT)


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("mbarrier.wait(empty.index(stage), phase ^ 1)", "pass"),
        ("mbarrier.wait(full.index(stage), phase)", "pass"),
        ("mbarrier.wait(q_full, 0)", "pass"),
        ("stage, phase = _advance(stage, phase, STAGES)", "stage, phase = _advance(stage, phase, STAGES)[0], 0"),
        ("_read, (logits, lse, y, queries, ring, span, scale, T, H, N, STAGES, 1)",
         "_read, (logits, lse, y, queries, ring, span, scale, T, H, N, STAGES, 0)"),
        ("acc_b *= gl.exp(g_b - next_b)[:, None]", "pass"),
        ("seen = (t - j0)[:, None] - (j & 6)[None, :] >=", "seen = (t - j0)[:, None] - (j & 6)[None, :] >"),
    ],
)  # fmt: skip
def test_faults_are_seen(written: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = emulated(config_of(), tmp_path, monkeypatch, written, instead)
    try:
        error = verify_case(partial(run_kernel, kernel), SHORT, 1)
    except (Deadlock, Misuse):
        return
    assert not error <= tolerance(SHORT)


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("mbarrier.arrive(empty.index(keys), count=1)", "pass"),
        ("STAGES=num_stages", "STAGES=1"),
        ("mbarrier.init(empty.index(i), count=2)", "mbarrier.init(empty.index(i), count=3)"),
    ],
)
def test_deadlocks_are_seen(written: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = emulated(config_of(), tmp_path, monkeypatch, written, instead)
    with pytest.raises(Deadlock):
        verify_case(partial(run_kernel, kernel), SHORT, 1)


def test_the_interpreter_refuses_it(tmp_path: Path) -> None:
    config = config_of()
    built = TritonBackend().build(PROBLEM, config, TARGET, tmp_path)
    with pytest.raises(KernelError, match="formulation=specialized is Gluon, which Triton's interpreter cannot run"):
        TritonBackend().load(PROBLEM, config, built)
    outcome = _Predictor(TritonBackend(), TARGET, tmp_path, 0).verify(PROBLEM, config, lambda stage: None)
    assert isinstance(outcome, Crashed) and "specialized is Gluon" in outcome.message and "\n" not in outcome.message


def test_verifying_a_package_that_has_it_takes_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says so."""
    config = config_of()
    built = TritonBackend().build(PROBLEM, config, TARGET, tmp_path / "candidates")
    winner = Winner(
        problem=PROBLEM, config=config, outcome=Timed(1.0, 1.0, 1.0, 9, 1e-3), backend="triton",
        device="cuda", library=built.library, source=built.source, portable=None, cpu_flags=(), recommended=True,
        verified={"error": 1e-3, "tolerance": 1e-2, "cases": [], "by": "run on h100-sxm"},
        parts=tuple((name, built.library.parent / file) for name, file in built.parts),
    )  # fmt: skip
    package = emit_package(tmp_path / "package_with_specialised_warps", TARGET, [winner])
    assert main(["verify", str(package)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mctune: error: forward_linear_grm_independent_")
    assert "formulation=specialized is Gluon, which Triton's interpreter cannot run" in line
