"""TVM's GPU kernels of the forward pass against the oracle: every instruction, aggregation, recurrence and init."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cuda_holding import error_of

from mctune.core.problem import Problem
from mctune.verify.judge import tolerance

PROBLEM = Problem(T=300, H=2, Dk=64, Dv=64, segment_length=64, aggregation="grm", dtype="float16")
SWLA = {"recurrence": "swla", "state_init": "checkpoint"}
CASES: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("t4", {}, {}),
    ("t4", {"formulation": "gated"}, {"Dk": 128, "Dv": 64}),
    ("t4", {"read_stages": 2, "read_prefetch": "none", "piece": 64}, {**SWLA, "segment_length": 128}),
    ("t4", {"gates_rows": 32, "read_rows": 32, "read_BJ": 16}, {"aggregation": "ssc", "top_k": 2}),
    ("t4", {"piece": 64}, {**SWLA, "aggregation": "ssc", "top_k": 3, "Dk": 40, "Dv": 33, "segment_length": 100}),
    ("t4", {}, {"aggregation": "residual", "Dk": 20, "Dv": 48}),
    ("t4", {}, {"dtype": "float32", **SWLA}),
    ("t4", {}, {"dtype": "float32", "aggregation": "mean", "Dk": 19, "Dv": 128}),
    ("v100", {}, {**SWLA}),
    ("v100", {"read_rows": 32, "read_BJ": 16}, {"aggregation": "soup", "Dk": 25, "Dv": 25}),
    ("v100", {}, {"aggregation": "mean", "state_init": "checkpoint", "Dk": 128, "Dv": 128}),
    ("a100", {}, {"dtype": "bfloat16", "aggregation": "ssc", "top_k": 2, "recurrence": "swla"}),
    ("a100", {"formulation": "gated"}, {"segmentation": "logarithmic", "segment_length": None}),
    ("a100", {"read_stages": 2, "read_prefetch": "async"}, {"Dk": 40, "Dv": 72, "segment_length": 40}),
    ("a100", {}, {"segmentation": "packed", "dtype": "bfloat16", "state_init": "checkpoint"}),
)


@pytest.mark.parametrize(("gpu", "changed", "fields"), CASES, ids=[str(number) for number in range(len(CASES))])
def test_it_is_right(gpu: str, changed: dict[str, Any], fields: dict[str, Any], cuda_folder: Path) -> None:
    problem = PROBLEM.replace(**fields)
    error = error_of(problem, gpu, cuda_folder, **changed)
    assert isinstance(error, float) and error <= tolerance(problem), error
