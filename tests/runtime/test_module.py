"""The layer: shapes, training, saving, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mctune.runtime.errors import ArgumentError
from mctune.runtime.module import MemoryCaching

RECURRENCES = ("linear", "swla", "dla", "titans")


@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("aggregation", ("residual", "grm", "soup", "ssc", "mean"))
def test_trains(recurrence: str, aggregation: str) -> None:
    """Loss falls on recalling the token before; every parameter has a gradient."""
    torch.manual_seed(0)
    layer = MemoryCaching(16, 2, recurrence=recurrence, aggregation=aggregation, segment_length=5, inner_chunk=2)
    x = torch.randn(2, 17, 16)
    target = x.roll(1, 1)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_state_dict_round_trip(recurrence: str) -> None:
    x = torch.randn(1, 9, 16)
    first, second = (MemoryCaching(16, 2, recurrence=recurrence, segment_length=4, backend="eager") for _ in range(2))
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_gates_start_where_the_class_says() -> None:
    x = torch.randn(1, 3, 16)
    titans = MemoryCaching(16, 2, recurrence="titans", inner_chunk=8)
    swla = MemoryCaching(16, 2, recurrence="swla")
    expected = {"lam": 0.9, "beta": 0.1}
    for name, value in expected.items():
        torch.testing.assert_close(swla._gate(name, x), torch.full((1, 3, 2), value))
    torch.testing.assert_close(titans._gate("g", x).exp(), torch.full((1, 3, 2), 0.95))
    torch.testing.assert_close(titans._gate("mu", x), torch.full((1, 3, 2), 0.5))
    torch.testing.assert_close(titans._gate("eta", x), torch.full((1, 3, 2), 1 / 16))


def test_causal() -> None:
    """A later token changes no earlier output."""
    for recurrence in RECURRENCES:
        layer = MemoryCaching(16, 2, recurrence=recurrence, segment_length=4, inner_chunk=2, backend="eager")
        x = torch.randn(1, 11, 16)
        later = x.clone()
        later[:, 7:] += 1
        torch.testing.assert_close(layer(x)[:, :7], layer(later)[:, :7])
        assert not torch.allclose(layer(x)[:, 7:], layer(later)[:, 7:])


def test_packed_sequences_do_not_see_each_other() -> None:
    layer = MemoryCaching(16, 2, recurrence="swla", segmentation="packed", segment_length=4, backend="eager")
    x = torch.randn(1, 13, 16)
    bounds = torch.tensor([0, 6, 13], dtype=torch.int32)
    y = layer(x, bounds)
    torch.testing.assert_close(y[:, 6:], layer(x[:, 6:], torch.tensor([0, 7], dtype=torch.int32)))


def test_widths_and_dtypes() -> None:
    layer = MemoryCaching(16, 2, head_dim=6, expand_v=2, connector=False, backend="eager").bfloat16()
    assert layer.u_proj is None
    y = layer(torch.randn(2, 5, 16, dtype=torch.bfloat16))
    assert y.shape == (2, 5, 16) and y.dtype == torch.bfloat16
    assert "segment_length=256" in repr(layer)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"hidden_size": 15}, "hidden_size=15 is not a multiple of num_heads=2; pass head_dim"),
        ({"num_heads": 0}, "num_heads=0: must be at least 1"),
        ({"expand_v": 0.3}, "expand_v=0.3: head_dim and head_dim \\* expand_v must be whole"),
        ({"recurrence": "dla", "expand_v": 2}, "expand_v=2: .*pass memory_residual=False or expand_v=1"),
        ({"recurrence": "gru"}, "recurrence='gru' is not one of"),
        ({"backend": "gpu"}, "backend='gpu' is not one of"),
    ),
    ids=str,
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MemoryCaching(**({"hidden_size": 16, "num_heads": 2} | options))


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"hidden_states is \[1, 3, 15\]; it must be \[B, T, hidden_size=16\]"):
        MemoryCaching(16, 2)(torch.zeros(1, 3, 15))
