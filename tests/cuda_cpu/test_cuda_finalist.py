"""What may ship goes through sanitizers: kernels of every pass give no report, and one with a fault does not ship."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cuda_holding import built

from mctune.core.problem import Problem
from mctune.verify.cuda_cpu.finalist import launches_of, reports
from mctune.verify.cuda_cpu.folder import prepare_built

PROBLEM = Problem(
    T=128, H=1, Dk=16, Dv=16, segment_length=32, aggregation="grm", dtype="float16", recurrence="swla",
    state_init="checkpoint",
)  # fmt: skip
BARRIER = "tvm_builtin_cuda_cta_sync();"


@pytest.mark.parametrize(("pass_", "params"), (("backward", {"saved": "nothing"}), ("decode", {})))
def test_right_kernels_give_no_report(pass_: str, params: dict[str, str], cuda_folder: Path) -> None:
    problem = PROBLEM.replace(pass_=pass_)
    config, made = built(problem, "t4", cuda_folder, **params)
    prepare_built(made)
    launched = launches_of(problem, config, made, 3)
    assert all(launched.values())
    assert reports(problem, config, made, cuda_folder / "sanitized", 3) == ""


def test_what_has_a_race_is_told_of(cuda_folder: Path) -> None:
    problem = PROBLEM.replace(recurrence="linear", state_init="independent")
    config, made = built(problem, "t4", cuda_folder)
    prepare_built(made)
    parts = dict(made.parts)
    text = (cuda_folder / parts["read_forward.cu"]).read_text()
    # The last barrier of the kernel: a cached state is read by others than have written it.
    before, _, after = text.rpartition(BARRIER)
    planted = cuda_folder / "planted_read.cu"
    planted.write_text(f"{before};{after}")
    parts["read_forward.cu"] = planted.name
    said = reports(problem, config, replace(made, parts=tuple(parts.items())), cuda_folder / "sanitized", 3)
    assert said == "read_forward: data race (thread sanitizer)"
