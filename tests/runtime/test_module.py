"""The layer: shapes, training, saving, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mctune.runtime.api.conv import ShortConv
from mctune.runtime.api.module import MemoryCaching
from mctune.runtime.cache.cache import MemoryCache
from mctune.runtime.errors import ArgumentError

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
        loss = (layer(x)[0] - target).square().mean()
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
    assert not torch.equal(first(x)[0], second(x)[0])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x)[0], second(x)[0])


def test_gates_start_where_the_class_says() -> None:
    x = torch.randn(1, 3, 16)
    titans = MemoryCaching(16, 2, recurrence="titans", inner_chunk=8)
    swla = MemoryCaching(16, 2, recurrence="swla")
    expected = {"lam": 0.9, "beta": 0.1}
    for name, value in expected.items():
        torch.testing.assert_close(swla._gate(name, x), torch.full((1, 3, 2), value))
    torch.testing.assert_close(titans._gate("g", x).exp(), torch.full((1, 3, 2), 0.95))
    torch.testing.assert_close(titans._gate("mu", x), torch.full((1, 3, 2), 0.5))
    torch.testing.assert_close(titans._gate("eta", x), torch.full((1, 3, 2), 0.05))


def test_causal() -> None:
    """A later token changes no earlier output."""
    for recurrence in RECURRENCES:
        layer = MemoryCaching(16, 2, recurrence=recurrence, segment_length=4, inner_chunk=2, backend="eager")
        x = torch.randn(1, 11, 16)
        later = x.clone()
        later[:, 7:] += 1
        torch.testing.assert_close(layer(x)[0][:, :7], layer(later)[0][:, :7])
        assert not torch.allclose(layer(x)[0][:, 7:], layer(later)[0][:, 7:])


def test_packed_sequences_do_not_see_each_other() -> None:
    options: dict[str, Any] = {"recurrence": "swla", "segment_length": 4, "use_short_conv": True, "backend": "eager"}
    layer = MemoryCaching(16, 2, **options)
    x = torch.randn(1, 13, 16)
    bounds = torch.tensor([0, 6, 6, 7, 13], dtype=torch.int32)
    y = layer(x, cu_seqlens=bounds)[0]
    for begin, end in ((0, 6), (6, 7), (7, 13)):
        torch.testing.assert_close(y[:, begin:end], layer(x[:, begin:end])[0])
    always = MemoryCaching(16, 2, segmentation="packed", **options)
    always.load_state_dict(layer.state_dict())
    torch.testing.assert_close(always(x, cu_seqlens=bounds)[0], y)
    with pytest.raises(ArgumentError, match="needs cu_seqlens"):
        always(x)


def test_widths_and_dtypes() -> None:
    layer = MemoryCaching(16, 2, head_dim=6, expand_v=2, connector=False, backend="eager").bfloat16()
    assert layer.u_proj is None
    y = layer(torch.randn(2, 5, 16, dtype=torch.bfloat16))[0]
    assert y.shape == (2, 5, 16) and y.dtype == torch.bfloat16
    assert "segment_length=256" in repr(layer)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"hidden_size": 15}, "hidden_size=15 is not a multiple of num_heads=2; pass head_dim"),
        ({"num_heads": 0}, "num_heads=0: must be an integer of at least 1"),
        ({"expand_v": 0.3}, "expand_v=0.3: head_dim and head_dim \\* expand_v must be whole"),
        ({"recurrence": "dla", "expand_v": 2}, "expand_v=2: .*pass memory_residual=False or expand_v=1"),
        ({"recurrence": "gru"}, "recurrence='gru' is not one of"),
        ({"conv_size": 0}, "conv_size=0: must be an integer of at least 1"),
        ({"feature_map": "gelu"}, "feature_map='gelu' is not None or one of relu, elu, silu, softmax"),
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


@pytest.mark.parametrize("size", (1, 2, 4))
def test_short_convolution(size: int) -> None:
    """Against the sum written out, in rows and in a packed row; what is kept continues either."""
    conv = ShortConv(6, size).double()
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for t in range(9):
        for back in range(min(size, t + 1)):
            expected[:, t] += conv.weight[:, size - 1 - back].detach() * x[:, t - back]
    expected = torch.nn.functional.silu(expected)
    y, kept = conv(x)
    torch.testing.assert_close(y, expected)
    assert kept.shape == (3, size - 1, 6) and not kept.requires_grad
    torch.testing.assert_close(kept, x[:, 9 - size + 1 :])
    assert kept.untyped_storage().nbytes() == kept.nbytes

    first, past = conv(x[:, :2], keep=size + 2)
    assert past.shape == (3, size + 2, 6)
    second, longer = conv(x[:, 2:], past[:, 3:], keep=20)
    assert longer.shape == (3, size + 6, 6)
    torch.testing.assert_close(torch.cat([first, second], 1), expected)
    lengths = (9, 0, 1, 4)
    packed = torch.cat([x[i % 3, :length] for i, length in enumerate(lengths)])[None]
    y, past = conv(packed, None, torch.tensor([0, *lengths]).cumsum(0).int())
    for row, found in enumerate(y[0].split(lengths)):
        torch.testing.assert_close(found, expected[row % 3, : lengths[row]])
    torch.testing.assert_close(past[0], x[0, 9 - size + 1 :])
    assert not past[1].any()


@pytest.mark.parametrize("feature_map", ("relu", "elu", "silu", "softmax"))
def test_feature_maps(feature_map: str) -> None:
    """q and k pass the map; without qk_norm they keep its scale."""
    functions = {"relu": torch.relu, "silu": torch.nn.functional.silu, "softmax": lambda x: x.softmax(-1)}
    functions["elu"] = lambda x: torch.where(x > 0, x + 1, x.exp())
    layer = MemoryCaching(128, 2, feature_map=feature_map, qk_norm=False, backend="eager")
    x = torch.randn(1, 5, 2, 64)
    torch.testing.assert_close(layer._features(x), functions[feature_map](x))
    layer.qk_norm = True
    torch.testing.assert_close(layer._features(x).norm(dim=-1), torch.ones(1, 5, 2), atol=2e-3, rtol=0)


def test_output_gate_and_short_convolution_train() -> None:
    layer = MemoryCaching(
        16, 2, recurrence="swla", use_short_conv=True, conv_size=3, use_output_gate=True, feature_map="silu",
        segment_length=4, backend="eager",
    )  # fmt: skip
    x = torch.randn(2, 9, 16)
    layer(x)[0].square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for name, p in layer.named_parameters() if name != "norm")
    assert layer.output_gate_proj is not None
    torch.nn.init.zeros_(layer.output_gate_proj.weight)
    assert not layer(x)[0].any()


def test_gates_are_float32_under_autocast() -> None:
    layer = MemoryCaching(16, 2, recurrence="titans", segment_length=4, backend="eager")
    for name in ("g", "mu", "eta"):
        torch.nn.init.normal_(layer._gate_layer(name).weight)
    x = torch.randn(1, 5, 16)
    expected = {name: layer._gate(name, x) for name in ("g", "mu", "eta")}
    with torch.autocast("cpu", torch.bfloat16):
        for name, gate in expected.items():
            assert torch.equal(layer._gate(name, x), gate) and gate.dtype == torch.float32
        assert layer(x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_padding_changes_nothing(recurrence: str, side: str) -> None:
    """Every row gives what it gives alone; padding gives 0 and no gradient."""
    torch.manual_seed(0)
    layer = MemoryCaching(16, 2, recurrence=recurrence, segment_length=4, inner_chunk=2, use_short_conv=True)
    layer.backend = "eager"
    x = torch.randn(4, 11, 16, requires_grad=True)
    lengths = (11, 3, 0, 8)
    mask = torch.stack([torch.arange(11) < length for length in lengths]).long()
    mask = mask.flip(1) if side == "left" else mask
    y = layer(x, attention_mask=mask)[0]
    assert not y[mask == 0].any()
    for row, tokens in enumerate(mask.bool()):
        if tokens.any():
            torch.testing.assert_close(y[row, tokens], layer(x[row, tokens][None])[0][0])
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert not gradient[mask == 0].any() and gradient[mask == 1].any()
    torch.testing.assert_close(layer(x, attention_mask=torch.ones(4, 11))[0], layer(x)[0], rtol=0, atol=0)


def test_returns_what_token_mixers_return() -> None:
    layer = MemoryCaching(16, 2, layer_idx=0, backend="eager")
    x = torch.randn(1, 5, 16)
    y, weights, cache = layer(hidden_states=x, output_attentions=False)
    assert y.shape == x.shape and weights is None and cache is None
    cache = layer(x, use_cache=True)[2]
    assert isinstance(cache, MemoryCache) and cache.get_seq_length() == 5
    assert layer(x, past_key_values=cache)[2] is cache and cache.get_seq_length() == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask is \[2, 4\]; it must be \[B, T\] = \[2, 5\]"),
        ({"attention_mask": torch.full((2, 5), -1.0)}, "attention_mask has values besides 0 and 1"),
        ({"attention_mask": torch.zeros(2, 5)}, "attention_mask is 0 everywhere"),
        ({"attention_mask": torch.tensor([[1] * 5, [1, 0, 1, 1, 0]])}, "padding between the tokens of row 1"),
        ({"attention_mask": torch.ones(2, 5), "cu_seqlens": torch.tensor([0, 5])}, "attention_mask with cu_seqlens"),
        ({"attention_mask": torch.ones(2, 5).tril(4).triu(1), "segmentation": "logarithmic"}, "use segmentation='c"),
        ({"use_cache": True, "layer_idx": None}, "layer_idx=None with a cache: give every MemoryCaching its own"),
        ({"use_cache": True, "segmentation": "logarithmic"}, "with a cache: .*use segmentation='constant'"),
        ({"past_key_values": [1]}, "past_key_values is a list; it must be a MemoryCache"),
        ({"use_cache": True, "attention_mask": torch.ones(2, 5).tril(3)}, "padding on the right with a cache"),
    ),
)  # fmt: skip
def test_refused_calls(arguments: dict[str, Any], message: str) -> None:
    """The options of the layer stand among the arguments of the call."""
    arguments = dict(arguments)
    options = {"layer_idx": 0}
    options |= {name: arguments.pop(name) for name in ("segmentation", "layer_idx") if name in arguments}
    with pytest.raises(ArgumentError, match=message):
        MemoryCaching(16, 2, **options)(torch.zeros(2, 5, 16), **arguments)


def test_padding_after_the_first_call_is_refused() -> None:
    layer = MemoryCaching(16, 2, layer_idx=0, backend="eager")
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[1] * 5, [0] + [1] * 4])
    with torch.no_grad():
        cache = layer(x, attention_mask=mask, use_cache=True)[2]
        whole = torch.cat([mask, torch.ones(2, 1)], 1)
        layer(x[:, :1], attention_mask=whole, past_key_values=cache)
        with pytest.raises(ArgumentError, match="padding after the first call with this cache"):
            layer(x, attention_mask=mask, past_key_values=cache)
