"""TVM's GPU kernels of the backward pass and of decode steps against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cuda_holding import error_of

from mctune.core.problem import Problem
from mctune.verify.judge import tolerance

PROBLEM = Problem(T=200, H=1, Dk=32, Dv=32, segment_length=64, aggregation="grm", dtype="float16")
SWLA = {"recurrence": "swla", "state_init": "checkpoint"}
BFLOAT = {"dtype": "bfloat16", "state_init": "checkpoint"}
CASES: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("backward", "t4", {}, {}),
    (
        "backward", "t4", {"piece": 64, "dgates_splits": 2, "saved": "states", "dkv_BK": 32},
        {**SWLA, "segment_length": 100, "Dk": 40},
    ),
    ("backward", "t4", {"dkv_rows": 32, "dq_rows": 32, "dq_BJ": 16}, {"aggregation": "ssc", "top_k": 2, "Dv": 25}),
    ("backward", "t4", {"saved": "states"}, {**SWLA, "aggregation": "mean"}),
    ("backward", "t4", {"dkv_BK": 32}, {"dtype": "float32", "recurrence": "swla", "Dk": 70, "Dv": 33}),
    ("backward", "v100", {}, {**SWLA, "aggregation": "soup"}),
    ("backward", "v100", {"saved": "nothing", "dkv_BK": 32}, {"aggregation": "residual", "Dk": 128, "Dv": 16}),
    ("backward", "t4", {}, {"dtype": "float32", "Dk": 128, "Dv": 128, "T": 70}),
    ("backward", "a100", {"dq_stages": 2, "dq_prefetch": "async"}, {**BFLOAT, "segmentation": "packed", "Dk": 48}),
    ("decode", "t4", {}, {}),
    ("decode", "t4", {"decode_splits": 1, "decode_BV": 16}, {**SWLA, "aggregation": "ssc", "top_k": 2, "Dv": 20}),
    ("decode", "v100", {}, {"aggregation": "mean", "recurrence": "swla", "dtype": "float32"}),
    ("decode", "a100", {}, {"aggregation": "residual", "dtype": "bfloat16", "Dv": 128}),
)  # fmt: skip


@pytest.mark.parametrize(
    ("pass_", "gpu", "changed", "fields"), CASES, ids=[f"{case[0]}-{number}" for number, case in enumerate(CASES)]
)
def test_it_is_right(pass_: str, gpu: str, changed: dict[str, Any], fields: dict[str, Any], cuda_folder: Path) -> None:
    problem = PROBLEM.replace(pass_=pass_, **fields)
    error = error_of(problem, gpu, cuda_folder, **changed)
    assert isinstance(error, float) and error <= tolerance(problem), error
