"""What the cost model counts in compiled kernels is what the kernels were told to do."""

from __future__ import annotations

import os

import pytest
import torch

from mctune.backends.triton.cost import trips
from mctune.backends.triton.cost.parameters import Parameters
from mctune.backends.triton.cost.predict import demands
from mctune.backends.triton.cost.walk import Source
from mctune.backends.triton.device import VirtualDevice
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.target import resolve

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets Triton kernels", allow_module_level=True)

import small_kernel

T, D, BT = 4096, 64, 64
PROBLEM = Problem(T=T, H=1, Dk=D, Dv=D, segment_length=64, dtype="bfloat16")
CONFIG = Config.of({"precision": "ieee"})


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("name", ["h100-sxm", "a100-80g", "b200", "rtx4090", "mi300x"])
def test_products_and_bytes_of_a_loop(name: str, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """T / BT passes of a [BT, D] x [D, BT] product, each of which loads BT rows, whatever the pipeline looks like."""
    work = Source(1, 0, (Source(T / BT, 2 * BT * BT * D),))
    monkeypatch.setitem(trips.TRIPS, "gram_kernel", lambda walk: work)
    x = torch.empty(T, D, dtype=torch.bfloat16, device="meta")
    target = resolve(name)[0]
    with VirtualDevice(target) as device:
        small_kernel.gram(x, x.new_empty(T, BT, dtype=torch.float32), BT=BT, num_stages=stages, num_warps=4)
    (asked,) = demands(tuple(device.launches), PROBLEM, CONFIG, target, Parameters())
    assert asked.mean.matrix == pytest.approx(work.total)
    assert asked.mean.loaded == pytest.approx((T + BT) * D * 2, rel=0.05)
    assert asked.mean.stored == BT * BT * 4
    assert asked.blocks == T // BT and asked.uniform
