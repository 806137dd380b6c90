"""What a layer, a cache and the operation hold their arguments to; instances of what the fuzzers of tests/fuzz draw."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from calls import arguments

from mctune.runtime.api.functional import memory_caching
from mctune.runtime.api.module import MemoryCaching
from mctune.runtime.api.step import memory_caching_step
from mctune.runtime.cache.cache import MemoryCache
from mctune.runtime.errors import ArgumentError
from mctune.runtime.traits import RECURRENCES

X = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))


def layer(**options: Any) -> MemoryCaching:
    torch.manual_seed(0)
    return MemoryCaching(
        8, 2, **({"segment_length": 3, "inner_chunk": 2, "layer_idx": 0, "backend": "eager"} | options)
    )


def refused(message: str) -> Any:
    return pytest.raises(ArgumentError, match=message)


def test_a_learned_scale_is_refused_with_what_learns_one() -> None:
    x, scale = arguments("linear"), torch.tensor(0.7, requires_grad=True)
    for backend in ("eager", "auto"):
        with refused("scale is a tensor.*To learn one, pass q \\* scale as q, q as u"):
            memory_caching(**x, scale=scale, backend=backend)  # type: ignore[arg-type]
    y = memory_caching(x["q"] * scale, x["k"], x["v"], x["q"], scale=1.0, segment_length=4, backend="eager")
    wanted = memory_caching(x["q"], x["k"], x["v"], scale=0.7, segment_length=4, backend="eager")
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("name", ["top_k", "inner_chunk", "memory_residual"])
def test_what_is_not_used_may_be_none(name: str) -> None:
    x = arguments("linear")
    none: dict[str, Any] = {name: None}
    for backend in ("eager", "auto"):
        y = memory_caching(**x, **none, segment_length=4, backend=backend)
        torch.testing.assert_close(y, memory_caching(**x, segment_length=4, backend="eager"))
    traced: Any = torch.compile(lambda q: memory_caching(q, q, q, **none), fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(x["q"]), memory_caching(x["q"], x["q"], x["q"], backend="eager"))
    assert MemoryCaching(8, **none).top_k == 2
    with refused(f"{name}=None: must be"):
        MemoryCaching(8, recurrence="dla", aggregation="ssc", **none)


def test_bounds_without_values_are_refused() -> None:
    x, bounds = arguments("linear"), torch.tensor([0, 11], dtype=torch.int32, device="meta")
    for backend in ("eager", "auto"):
        with refused("cu_seqlens is on meta"):
            memory_caching(**x, segmentation="packed", cu_seqlens=bounds, backend=backend)
    with refused("cu_seqlens is on meta"):
        layer(use_short_conv=True)(X[:1], cu_seqlens=bounds)


@pytest.mark.parametrize("options", [{}, {"rewind": 2}, {"max_states": 1}, {"max_states": 0, "rewind": 3}], ids=str)
@pytest.mark.parametrize("bounds", [[0, 4], [2, 9], [0, 12], [0, 8, 2, 9], [0, 3, 3]], ids=str)
@pytest.mark.parametrize("conv", [False, True])
def test_bounds_that_do_not_cut_up_the_row(options: dict[str, Any], bounds: list[int], conv: bool) -> None:
    cache = MemoryCache(**options)
    with torch.no_grad(), refused("cu_seqlens (runs|falls) from"):
        layer(use_short_conv=conv)(X[:1], past_key_values=cache, cu_seqlens=torch.tensor(bounds))
    assert len(cache) == 0


def test_two_layers_of_one_index() -> None:
    one, other, cache = layer(), layer(), MemoryCache()
    with torch.no_grad():
        one(X, past_key_values=cache)
        with refused("layer_idx=0 of the cache belongs to another layer"):
            other(X, past_key_values=cache)
        for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            other(X, past_key_values=copied)
        del one
        other(X, past_key_values=cache)
        with refused("layer_idx=0 of the cache belongs to another layer"):
            copy.deepcopy(other)(X, past_key_values=cache)


def test_rows_are_numbers_of_rows() -> None:
    cache = MemoryCache()
    with torch.no_grad():
        layer()(X, past_key_values=cache)
    none, beyond, mask = torch.zeros(0, dtype=torch.int64), torch.tensor([0, 2]), torch.tensor([True, False])
    for bad in ([1, 0], None, mask, none, beyond, -beyond, none[None], mask.float(), mask.int().to("meta")):
        with refused("beam_idx"):
            cache.reorder_cache(bad)  # type: ignore[arg-type]
        with refused("indices"):
            cache.batch_select_indices(bad)  # type: ignore[arg-type]
    assert cache.lengths.tolist() == [9, 9]


def test_other_hidden_states() -> None:
    for convs in (False, True):
        cache, model = MemoryCache(), layer(use_short_conv=convs)
        with torch.no_grad():
            model(X, past_key_values=cache)
            with refused("hidden_states has B=3 rows and the cache holds 2 sequences"):
                model(torch.zeros(3, 1, 8), past_key_values=cache)
        with refused("cu_seqlens with B=2: the sequences stand in one row"):
            model(X, cu_seqlens=torch.tensor([0, 9]))
        for x in (X[:0], X[:, :0]):
            with refused(r"hidden_states is \[.*at least 1 sequence"):
                model(x)


@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("rewind", [0, 4])
def test_a_row_of_padding_has_no_token_yet(recurrence: str, rewind: int) -> None:
    model, cache, more = layer(recurrence=recurrence, use_short_conv=True), MemoryCache(rewind=rewind), X[:, :2]
    with torch.no_grad():
        y = model(X, attention_mask=torch.tensor([[0] * 9, [1] * 9]), past_key_values=cache)[0]
        assert not y[0].any() and cache.lengths.tolist() == [0, 9]
        torch.testing.assert_close(y[1:], model(X[1:])[0])
        y = model(more, past_key_values=cache)[0]
        torch.testing.assert_close(y[:1], model(more[:1])[0])
        torch.testing.assert_close(y[1:], model(torch.cat([X, more], 1)[1:])[0][:, -2:])


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_a_short_row_leaves_the_others_their_window(recurrence: str) -> None:
    """Each row goes back as far as ``rewind`` says, or to its first token."""
    model, cache = layer(recurrence=recurrence, state_init="checkpoint").double(), MemoryCache(rewind=5)
    x = X.double()
    with torch.no_grad():
        model(x, attention_mask=torch.tensor([[0] * 8 + [1], [1] * 9]), past_key_values=cache)
        cache.crop(-5)
        assert cache.lengths.tolist() == [0, 4]
        y = model(x[:, 4:6], past_key_values=cache)[0]
        torch.testing.assert_close(y[1:], model(x[1:, :6])[0][:, 4:])
        torch.testing.assert_close(y[:1], model(x[:1, 4:6])[0])


def test_the_remedy_is_not_what_was_passed() -> None:
    model, cache = layer(), MemoryCache(rewind=4)
    with torch.no_grad():
        model(X[:, :8], past_key_values=cache)
    cache.crop(-4)
    with refused(r"rewind=4 .*an earlier crop has used it up.*pass MemoryCache\(rewind=7\)"):
        cache.crop(-3)


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_a_prompt_in_inference_mode_goes_on_outside(recurrence: str) -> None:
    model = layer(recurrence=recurrence, use_short_conv=True)
    wanted = model(X)[0].detach()
    for how in (lambda cache: cache, copy.deepcopy):
        cache = MemoryCache(rewind=3)
        with torch.inference_mode():
            model(X[:, :5], past_key_values=cache)
            cache = how(cache)
        with torch.no_grad():
            torch.testing.assert_close(model(X[:, 5:7], past_key_values=cache)[0], wanted[:, 5:7])
        cache.crop(-1)
        with torch.inference_mode():
            torch.testing.assert_close(model(X[:, 6:8], past_key_values=cache)[0], wanted[:, 6:8])


def test_counts_out_of_bounds_reach_no_kernel() -> None:
    q = torch.randn(1, 1, 2, 4)
    for name, value in (("cached", 2**30), ("cached", -1), ("filled", 4), ("filled", -1)):
        cache = MemoryCache()
        with torch.no_grad():
            layer(segment_length=4)(X[:1], past_key_values=cache)
        memory = cache.layer(0)
        assert memory is not None
        getattr(memory, name).fill_(value)
        with refused(f"{name}={value}"):
            memory_caching_step(q, q, q, memory=memory, segment_length=4)
        with refused("memory is a dict; it must be a LayerMemory"):
            memory_caching_step(q, q, q, memory={}, segment_length=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"inner_chunk": 0}, {"expand_v": float("nan")}, {"expand_v": float("inf")}, {"expand_v": 1e300},
        {"expand_v": "1"}, {"layer_idx": -1}, {"layer_idx": 1.0}, {"num_heads": 2.0}, {"norm_eps": None},
        {"qk_norm": None}, {"head_dim": 0}, {"recurrence": ["linear"]}, {"backend": None}, {"feature_map": 1},
        {"top_k": 2**40}, {"segment_length": 10**400},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_a_layer_names_what_it_refuses(options: dict[str, Any]) -> None:
    with refused(rf"\b{next(iter(options))}="):
        MemoryCaching(8, **options)


@pytest.mark.parametrize(
    "options", [{"max_states": 1.5}, {"max_states": True}, {"rewind": None}, {"state_dtype": "half"}]
)
def test_a_cache_names_what_it_refuses(options: dict[str, Any]) -> None:
    with refused(rf"{next(iter(options))}="):
        MemoryCache(**options)
