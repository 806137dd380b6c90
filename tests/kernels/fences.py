"""Kernels called where mistakes show: nothing but NaN around every array; and what a forward must give."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mctune.backends.protocol import Kernel
from mctune.core.problem import Problem
from mctune.verify.inputs import Inputs
from mctune.verify.judge import judge, run_kernel


def y_of(kernel: Kernel, problem: Problem, inputs: Inputs) -> torch.Tensor:
    """What a forward kernel computes."""
    return run_kernel(kernel, problem, inputs)["y"]


def judged(problem: Problem, seed: int) -> tuple[Inputs, torch.Tensor]:
    """Inputs of a forward, and the oracle's y for them."""
    case = judge(problem, seed)
    return case.inputs, case.wanted["y"]


def fence(function: Callable[..., None]) -> Callable[..., None]:
    """``function`` called on copies of its arrays that stand between two fences; both must be untouched after it."""

    def call(*arguments: object) -> None:
        copies = [_fenced(x) if isinstance(x, torch.Tensor) else (x, []) for x in arguments]
        function(*(x for x, _ in copies))
        for argument, (copy, fences) in zip(arguments, copies, strict=True):
            for one in fences:
                assert bool((one.isnan() if one.is_floating_point() else one == FENCE).all()), "an array was overrun"
            if isinstance(argument, torch.Tensor):
                argument.copy_(copy)

    return call


FENCE = -(2**31)
"""What stands around integers; NaN stands around floats."""
_MARGIN = 1024


def _fenced(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    assert x.is_contiguous()
    room = torch.full((x.numel() + 2 * _MARGIN,), float("nan") if x.is_floating_point() else FENCE, dtype=x.dtype)
    assert room.data_ptr() % 64 == 0
    before, inside, after = room.split([_MARGIN, x.numel(), _MARGIN])
    inside.copy_(x.reshape(-1))
    return inside.view(x.shape), [before, after]
