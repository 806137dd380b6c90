"""Gradients of the oracle against finite differences, and where they must and must not flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mctune.reference import memory_caching, segment_states

CASES = [
    ("linear", "ssc", "constant", "independent"),
    ("linear", "residual", "packed", "checkpoint"),
    ("swla", "grm", "constant", "checkpoint"),
    ("swla", "soup", "logarithmic", "independent"),
    ("dla", "soup", "constant", "checkpoint"),
    ("dla", "mean", "logarithmic", "independent"),
    ("titans", "grm", "constant", "checkpoint"),
    ("titans", "ssc", "packed", "independent"),
]


@pytest.mark.parametrize(("recurrence", "aggregation", "segmentation", "state_init"), CASES)
def test_gradients_against_finite_differences(
    recurrence: str, aggregation: str, segmentation: str, state_init: str, call: Callable[..., dict[str, Any]]
) -> None:
    values = call(
        recurrence, B=1, T=5, H=1, Dk=2, Dv=2, segment_length=2, segmentation=segmentation, state_init=state_init
    )
    names = [name for name, x in values.items() if torch.is_tensor(x) and x.is_floating_point()]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        given = {**values, **dict(zip(names, tensors, strict=True))}
        return memory_caching(**given, aggregation=aggregation, top_k=1)

    assert torch.autograd.gradcheck(run, tuple(values[name].requires_grad_() for name in names))


@pytest.mark.parametrize("recurrence", ["linear", "swla", "dla", "titans"])
def test_gradients_flow_through_cached_states_and_descriptors(
    recurrence: str, call: Callable[..., dict[str, Any]]
) -> None:
    values = call(recurrence, T=6)
    k, v = values["k"].requires_grad_(), values["v"].requires_grad_()
    memory_caching(**values)[:, -1].sum().backward()
    assert bool((k.grad[:, 0] != 0).all()) and bool((v.grad[:, 0] != 0).all())
    k.grad = None
    segment_states(k, v.detach(), segment_length=3).descriptors[:, 0].sum().backward()
    torch.testing.assert_close(k.grad[:, :3], torch.full_like(k[:, :3], 1 / 3))
    assert not bool(k.grad[:, 3:].any())


def test_segments_that_ssc_does_not_choose_get_no_gradient() -> None:
    k = torch.tensor([1.0, 3.0, 2.0, 1.0], dtype=torch.float64).reshape(1, 4, 1, 1).requires_grad_()
    ones = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    y = memory_caching(ones, k, ones, ones, aggregation="ssc", segment_length=1, top_k=1)
    y[:, 3].sum().backward()
    assert [bool(x) for x in k.grad.flatten()] == [False, True, False, True]


def test_without_a_connector_the_gates_differentiate_q() -> None:
    k = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    q = torch.ones(1, 2, 1, 1, dtype=torch.float64).requires_grad_()
    u = torch.ones(1, 2, 1, 1, dtype=torch.float64).requires_grad_()
    memory_caching(q, k, k, segment_length=1).sum().backward()
    whole, q.grad = q.grad, None
    memory_caching(q, k, k, u, segment_length=1).sum().backward()
    assert float(u.grad[0, 1]) != 0
    torch.testing.assert_close(whole, q.grad + u.grad)
