"""Memory caching for trained models: nothing changes but how tokens are mixed, and that as the oracle says."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import elu

from mctune.reference import memory_caching as oracle
from mctune.runtime.api.attach import Mixed, attach_memory_caching
from mctune.runtime.api.module import MemoryCaching
from mctune.runtime.cache.cache import MemoryCache
from mctune.runtime.errors import ArgumentError

T, D, H = 13, 12, 3


class Plain(nn.Module):
    """Linear attention as a trained model has it: one memory for the whole sequence."""

    def __init__(self, kv_heads: int = H, norm: bool = True, **traits: Any) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = H, kv_heads
        self.q_proj, self.o_proj = nn.Linear(D, D), nn.Linear(D, D)
        self.k_proj, self.v_proj = nn.Linear(D, D // H * kv_heads), nn.Linear(D, D // H * kv_heads)
        self.feature_map_q = self.feature_map_k = lambda x: elu(x) + 1
        self.norm_q = self.norm_k = False
        if norm:
            self.norm = nn.RMSNorm(D // H)
        for name, value in traits.items():
            setattr(self, name, value)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.feature_map_q(self.q_proj(x).view(*x.shape[:2], H, -1))
        k = self.feature_map_k(self.k_proj(x).view(*x.shape[:2], self.num_kv_heads, -1))
        v = self.v_proj(x).view(*x.shape[:2], self.num_kv_heads, -1)
        k, v = (t.repeat_interleave(H // self.num_kv_heads, 2) for t in (k, v))
        if self.norm_q:
            q = q / (q.sum(-1, keepdim=True) + 1e-4)
        if self.norm_k:
            k = k / (k.sum(-1, keepdim=True) + 1e-4)
        return q, k, v

    def finish(self, y: Tensor) -> Tensor:
        return self.o_proj((self.norm(y) if hasattr(self, "norm") else y).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        return self.finish(torch.einsum("bhts,bshd->bthd", scores.tril(), v))


class Modern(Plain):
    """The same with a layer number and the signature of layers that take a cache."""

    layer_idx = 0

    def forward(self, x: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:  # type: ignore[override]
        return super().forward(x), None, past_key_values


def built(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return nn.Sequential(nn.Identity(), layer).double()


def hidden(B: int = 2) -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("aggregation", ["mean", "residual", "grm", "soup", "ssc"])
@pytest.mark.parametrize("length", [T, 40])
def test_one_segment_changes_nothing(length: int, aggregation: str) -> None:
    model, x = built(Plain()), hidden()
    wanted = model(x)
    attach_memory_caching(model, length, aggregation)
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("state_init", [None, "checkpoint", "independent"])
@pytest.mark.parametrize(
    "layer", [Plain(), Plain(kv_heads=1), Plain(norm=False), Plain(norm_q=True, norm_k=True), Modern(scale=0.3)]
)
def test_segments_are_averaged(layer: Plain, state_init: str | None) -> None:
    model, x = built(copy.deepcopy(layer)), hidden()
    plain = model[1]
    assert isinstance(plain, Plain)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    base = plain(x)
    attached = attach_memory_caching(model, 4, state_init=state_init)
    assert attached.layers == ("1",)
    q, k, v = plain.heads(x)
    init = state_init or "checkpoint"
    y = oracle(q, k, v, aggregation="mean", segment_length=4, state_init=init, scale=getattr(plain, "scale", None))
    out = model(x)
    found = out[0] if isinstance(out, tuple) else out
    assert isinstance(out, tuple) == isinstance(plain, Modern)
    torch.testing.assert_close(found, plain.finish(y), rtol=1e-9, atol=1e-9)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], t) for name, t in before.items())
    attached.detach()
    attached.detach()
    again = model(x)
    for one, other in zip(base, again, strict=True):
        assert one is other or torch.equal(one, other)


def test_layers_of_ours() -> None:
    torch.manual_seed(0)
    layer = MemoryCaching(D, H, recurrence="swla", aggregation="grm", segment_length=6).double()
    x, names = hidden(), ("aggregation", "segment_length", "segmentation", "state_init", "top_k")
    base, traits, weights = layer(x)[0], [getattr(layer, name) for name in names], dict(layer.state_dict())
    same = MemoryCaching(D, H, recurrence="swla", aggregation="mean", segment_length=4).double()
    same.load_state_dict(weights, strict=False)
    attached = attach_memory_caching(layer, 4)
    torch.testing.assert_close(layer(x)[0], same(x)[0])
    assert not torch.allclose(layer(x)[0], base) and list(layer.state_dict()) == list(weights)
    attached.detach()
    assert [getattr(layer, name) for name in names] == traits and torch.equal(layer(x)[0], base)


def test_a_cache_padding_and_packed_rows() -> None:
    model, x = built(Modern()), hidden()
    layer = model[1]
    attach_memory_caching(model, 4, "grm")
    wanted = layer(x)[0]
    cache = MemoryCache()
    parts = [layer(x[:, a:b], past_key_values=cache)[0] for a, b in ((0, 6), (6, 7), (7, T))]
    torch.testing.assert_close(torch.cat(parts, 1), wanted)
    y, _, kept = layer(x, use_cache=True)
    torch.testing.assert_close(y, wanted)
    assert isinstance(kept, MemoryCache) and kept.get_seq_length() == T
    mask = torch.ones(2, T, dtype=torch.int64)
    mask[1, :3] = 0
    shifted = torch.cat([torch.full((1, 3, D), torch.nan), x[1:, :-3]], 1)
    padded = layer(torch.cat([x[:1], shifted]), attention_mask=mask)[0]
    torch.testing.assert_close(padded[0], wanted[0])
    torch.testing.assert_close(padded[1, 3:], wanted[1, :-3])
    assert not padded[1, :3].any()
    packed = layer(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, T, 2 * T], dtype=torch.int32))[0]
    torch.testing.assert_close(packed.view_as(wanted), wanted)
    with pytest.raises(ArgumentError, match="past_key_values is a dict; it must be a MemoryCache"):
        layer(x, past_key_values={})


def test_gradients_and_copies() -> None:
    model, x = built(Plain()), hidden()
    attach_memory_caching(model, 4)
    twin = copy.deepcopy(model)
    twin[1].v_proj.weight.data.zero_()
    twin[1].v_proj.bias.data.zero_()
    assert not torch.allclose(model(x), twin(x))
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_mix_serves_what_is_not_known() -> None:
    class Decayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v, finish, *_ = mix(self, x)
            scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
            ages = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
            return finish(torch.einsum("bhts,bshd->bthd", scores.tril() * torch.exp(-0.1 * ages), v))

    model, x = built(Decayed()), hidden()
    layer = model[1]

    def mix(layer: nn.Module, x: Tensor, decay: float = -0.1) -> Mixed:
        q, k, v = layer.qkv(x).view(*x.shape[:2], 3, H, -1).unbind(2)  # type: ignore[operator]
        g = x.new_full((*x.shape[:2], H), decay)
        return Mixed(q, k, v, lambda y: layer.out(y.flatten(2)), recurrence="swla", g=g)  # type: ignore[operator]

    base = model(x)

    with pytest.raises(ArgumentError, match="has no layer of MemoryCaching and none with q_proj"):
        attach_memory_caching(model)
    with pytest.raises(ArgumentError, match=r"layer '1', a Decayed, has no q_proj: .*layers=\['1'\] and mix="):
        attach_memory_caching(model, layers=["1"])
    with pytest.raises(ArgumentError, match="mix= without layers="):
        attach_memory_caching(model, mix=mix)
    attached = attach_memory_caching(model, 4, layers=["1"], mix=mix)
    q, k, v, finish, *_, g, _, _ = mix(layer, x)
    y = oracle(q, k, v, recurrence="swla", g=g, aggregation="mean", segment_length=4, state_init="checkpoint")
    torch.testing.assert_close(model(x), finish(y), rtol=1e-9, atol=1e-9)
    attached.detach()
    assert torch.equal(model(x), base)
    with pytest.raises(ArgumentError, match=r"would change within one segment.*or a mix= that does what the layer"):
        attach_memory_caching(model, 4, layers=["1"], mix=partial(mix, decay=-0.101))
    assert torch.equal(model(x), base)


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        ({"is_causal": True}, "has is_causal, so it is softmax attention"),
        ({"do_feature_map_norm": True}, "divides by the sum of its keys"),
        ({"gk_proj": nn.Linear(D, H)}, "has parameters gk_proj.weight"),
        ({"feature_map": "relu"}, "has feature_map='relu', which cannot be called"),
    ],
)
def test_layers_that_are_refused(traits: dict[str, Any], message: str) -> None:
    model, x = nn.Sequential(Plain(), Plain(**traits)).double(), hidden()
    before = model(x)
    with pytest.raises(ArgumentError, match=rf"layer '1', a Plain, {message}.*: pass layers= without it, or"):
        attach_memory_caching(model, 4)
    assert torch.equal(model(x), before)
    assert attach_memory_caching(model, 4, layers=["0"]).layers == ("0",)


def test_other_mistakes() -> None:
    model = built(Plain())
    with pytest.raises(ArgumentError, match="layers has 'x'"):
        attach_memory_caching(model, layers=["x"])
    with pytest.raises(ArgumentError, match="aggregation='max' is not one of"):
        attach_memory_caching(model, aggregation="max")
    with pytest.raises(ArgumentError, match="segment_length=0"):
        attach_memory_caching(model, 0)
    attach_memory_caching(model)
    with pytest.raises(ArgumentError, match="layer '1' has memory caching attached already"):
        attach_memory_caching(model)
    with pytest.raises(ArgumentError, match="a cache for a layer without layer_idx"):
        model[1](hidden(), past_key_values=MemoryCache())
