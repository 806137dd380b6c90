"""The eager path against the oracle: outputs and gradients, for every problem."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calls import arguments
from mctune import reference
from mctune.runtime.functional import memory_caching

RECURRENCES = ("linear", "swla", "dla", "titans")
AGGREGATIONS = ("residual", "grm", "soup", "ssc", "mean")


def run(function: Any, tensors: dict[str, torch.Tensor], grad: bool, **options: Any) -> Any:
    leaves = {name: x.detach().requires_grad_(grad) for name, x in tensors.items()}
    y = function(**leaves, **options)
    if not grad:
        return y, {}
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y.double() * weights).sum().backward()
    return y, {name: x.grad for name, x in leaves.items()}


def compare(tensors: dict[str, torch.Tensor], *, bound: float = 2e-5, grad_bound: float = 5e-5, **options: Any) -> None:
    grad = grad_bound > 0
    y, grads = run(lambda **x: memory_caching(**x, backend="eager"), tensors, grad, **options)
    expected, expected_grads = run(reference.memory_caching, tensors, grad, **options)
    assert y.dtype == tensors["q"].dtype
    assert reference.error_ratio(y, expected) <= bound
    for name, x in expected_grads.items():
        x = torch.zeros_like(tensors[name]) if x is None else x
        found = torch.zeros_like(tensors[name]) if grads[name] is None else grads[name]
        if float(x.abs().max()) < 1e-9:
            assert float(found.abs().max()) < 1e-5, name
        else:
            assert reference.error_ratio(found, x) <= grad_bound, name


@pytest.mark.parametrize("segmentation", ("constant", "logarithmic", "packed"))
@pytest.mark.parametrize("state_init", ("independent", "checkpoint"))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_every_problem_with_gradients(recurrence: str, aggregation: str, state_init: str, segmentation: str) -> None:
    packed = segmentation == "packed"
    tensors = arguments(recurrence, B=1 if packed else 2, T=15, H=1 if packed else 2)
    compare(
        tensors,
        recurrence=recurrence,
        aggregation=aggregation,
        state_init=state_init,
        segmentation=segmentation,
        segment_length=4,
        inner_chunk=3,
        cu_seqlens=torch.tensor([0, 0, 5, 6, 6, 15, 15], dtype=torch.int32) if packed else None,
    )
