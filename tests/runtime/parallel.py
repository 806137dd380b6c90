"""One process of a data-parallel run, and the same step on the joint batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tables import TITANS, build_table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mctune.core.problem import Problem
from mctune.runtime.api.module import MemoryCaching
from mctune.runtime.kernels import dispatch

WORLD = 2


class Mixer(nn.Module):
    """The layer's output alone."""

    def __init__(self, layer: MemoryCaching) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


def model(recurrence: str) -> nn.Module:
    """A small model, the same in every process; its widths are those of the tuned kernels."""
    torch.manual_seed(0)
    if recurrence == "titans":
        layer = deep_layer(TITANS)
    else:
        layer = MemoryCaching(
            24, 2, head_dim=12, expand_v=1 if recurrence == "dla" else 20 / 12, recurrence=recurrence,
            segment_length=16, inner_chunk=4, backend="tvm" if recurrence == "linear" else "auto",
        )  # fmt: skip
    return nn.Sequential(nn.Linear(8, 24), Mixer(layer), nn.Linear(24, 8))


def deep_layer(problem: Problem, backend: str = "tvm", **options: Any) -> MemoryCaching:
    """A layer that the tuned kernels of a deep memory serve."""
    return MemoryCaching(
        24, problem.H, head_dim=problem.Dk, expansion=problem.expansion or 1, recurrence=problem.recurrence,
        aggregation=problem.aggregation, state_init=problem.state_init, segment_length=problem.segment_length,
        inner_chunk=problem.inner_chunk, backend=backend, **options,
    )  # fmt: skip


def gradients(network: nn.Module, rows: slice) -> list[Tensor]:
    """The gradients of the mean square of the outputs on these rows of the joint batch."""
    x = torch.randn(2 * WORLD, 37, 8, generator=torch.Generator().manual_seed(1))[rows]
    network(x).square().mean().backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


def train(rank: int, recurrence: str, folder: Path, kernels: Path) -> None:
    """Rank ``rank`` of a gloo group that meets in ``folder``; it leaves its gradients there."""
    torch.set_num_threads(1)
    dispatch.TABLE = build_table(kernels)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD
    )
    network = DistributedDataParallel(model(recurrence))
    torch.save(gradients(network, slice(2 * rank, 2 * rank + 2)), folder / f"{rank}.pt")
    torch.distributed.barrier()
    # Not by returning: torch 2.13's reducer joins gloo's threads with the interpreter's lock, which they may wait for.
    os._exit(0)
