"""``MemoryCache``: prompts and steps against the oracle, and everything that changes a cache in between."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import GATES, arguments
from tables import DLA, LINEAR, PACKED, SWLA, TITANS, Table, checked, draw
from test_decode import call_of

from mctune.reference import memory_caching as oracle
from mctune.runtime.api.module import MemoryCaching
from mctune.runtime.cache import rewind as rewinding
from mctune.runtime.cache.cache import MemoryCache
from mctune.runtime.cache.prefill import prefill, remember
from mctune.runtime.call import Call
from mctune.runtime.errors import ArgumentError
from mctune.runtime.ops.step import advance, tokens
from mctune.runtime.traits import AGGREGATIONS, STATE_INITS
from mctune.verify.judge import poisoned_memory

T, C, B = 17, 5, 2
EVERY = [(r, s) for r in GATES for s in STATE_INITS]


def case(recurrence: str, state_init: str = "independent", aggregation: str = "soup", **sizes: int) -> Call:
    """A float64 call on 17 tokens of two rows."""
    x = arguments(recurrence, **({"B": B, "T": T, "dtype": torch.float64} | sizes))
    return call_of(x, recurrence=recurrence, aggregation=aggregation, state_init=state_init)


def answer(call: Call, **changes: Any) -> torch.Tensor:
    """The oracle's."""
    names = (
        "q", "k", "v", "u", "g", "beta", "lam", "eta", "mu", "W_up", "W_down", "recurrence", "aggregation",
        "segment_length", "segmentation", "state_init", "top_k", "inner_chunk", "cu_seqlens",
    )  # fmt: skip
    return oracle(**({name: getattr(call, name) for name in names} | changes))


def fed(cache: MemoryCache, call: Call, begin: int, *ends: int) -> torch.Tensor:
    """The outputs of tokens ``begin`` to the last end, a call up to each end."""
    outputs = []
    for end in ends:
        outputs.append(cache.extend(tokens(call, begin, end), 0, "eager"))
        begin = end
    return torch.cat(outputs, 1)


def close(y: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(y.double(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("state_init", STATE_INITS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("recurrence", GATES)
def test_prompt_and_steps_are_the_forward(recurrence: str, aggregation: str, state_init: str) -> None:
    call = case(recurrence, state_init, aggregation)
    wanted = answer(call)
    with poisoned_memory():
        for split in range(1, T):
            cache = MemoryCache()
            close(fed(cache, call, 0, split, T), wanted)
            assert cache.get_seq_length() == T and cache.lengths.tolist() == [T, T]
        close(fed(MemoryCache(rewind=4), call, 0, 8, *range(9, T + 1)), wanted)


@pytest.mark.parametrize(("recurrence", "state_init"), EVERY)
def test_unequal_sequences_of_a_packed_prompt(recurrence: str, state_init: str) -> None:
    lengths, more = (7, 1, 10, 5), 7
    rows = [case(recurrence, state_init, "grm", B=1, T=n + more, seed=i) for i, n in enumerate(lengths)]
    shared = {"W_up": rows[0].W_up, "W_down": rows[0].W_down}
    names = [n for n in ("q", "k", "v", "u", "g", "beta", "lam", "eta", "mu") if getattr(rows[0], n) is not None]
    options = {"recurrence": recurrence, "aggregation": "grm", "state_init": state_init}
    weights = {n: w for n, w in shared.items() if w is not None}
    prompt = {n: torch.cat([getattr(r, n)[:, :e] for r, e in zip(rows, lengths, strict=True)], 1) for n in names}
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = call_of(prompt | weights, segmentation="packed", cu_seqlens=bounds, **options)
    rest = {n: torch.cat([getattr(r, n)[:, e:] for r, e in zip(rows, lengths, strict=True)]) for n in names}
    then = call_of(rest | weights, **options)
    wanted = [answer(row, **shared) for row in rows]
    for cache in (MemoryCache(), MemoryCache(rewind=3)):
        y = cache.extend(packed, 0, "eager")
        close(y, torch.cat([w[:, :n] for w, n in zip(wanted, lengths, strict=True)], 1))
        assert cache.lengths.tolist() == list(lengths) and cache.get_seq_length() == 10
        after = torch.cat([w[:, n:] for w, n in zip(wanted, lengths, strict=True)])
        close(fed(cache, then, 0, 1, 4, more), after)
    cache.crop(-2)
    close(fed(cache, then, more - 2, more), after[:, -2:])
    with pytest.raises(ArgumentError, match="cu_seqlens on a cache that holds 4 sequences"):
        cache.extend(packed, 0, "eager")


@pytest.mark.parametrize("problem", [LINEAR, SWLA, PACKED, DLA, TITANS])
def test_a_prompt_on_a_kernel_keeps_its_states(problem: Any, tuned_table: Table) -> None:
    leaves, options = draw(problem)
    call = checked(leaves, options)
    with torch.no_grad():
        y, memory = prefill(call, "tvm")
    torch.testing.assert_close(y.double(), oracle(**leaves, **options), rtol=1e-3, atol=1e-3)
    for (name, store), (_, wanted) in zip(memory.stores(), remember(call).stores(), strict=True):
        torch.testing.assert_close(store, wanted, rtol=1e-3, atol=1e-3, msg=name)


def test_gradients_of_a_prompt() -> None:
    call = case("linear")
    call.k.requires_grad_()
    (found,) = torch.autograd.grad(MemoryCache().extend(call, 0, "eager").square().sum(), call.k)
    (wanted,) = torch.autograd.grad(answer(call).square().sum(), call.k)
    close(found, wanted)


@pytest.mark.parametrize("rewind", [0, 3])
@pytest.mark.parametrize("recurrence", ["swla", "titans"])
def test_rows_are_picked(recurrence: str, rewind: int) -> None:
    call = case(recurrence)
    wanted = answer(call)
    index = torch.tensor([1, 1, 0])
    cache = MemoryCache(rewind=rewind)
    fed(cache, call, 0, 9, 12)
    cache.set_conv_state(0, (torch.arange(10.0).view(2, 5, 1),), spare=3)
    cache.reorder_cache(index)
    assert cache.conv_state(0)[0][:, 0, 0].tolist() == [5, 5, 0]  # type: ignore[index]
    picked = {n: getattr(call, n) for n in ("q", "k", "v", "u", *GATES[recurrence])}
    other = call_of(
        {n: t[index] for n, t in picked.items()} | ({"W_up": call.W_up, "W_down": call.W_down} if call.deep else {}),
        recurrence=recurrence,
        aggregation="soup",
    )
    close(fed(cache, other, 12, 14, T), wanted[index, 12:])
    if rewind:
        cache.crop(-3)
        close(fed(cache, other, T - 3, T), wanted[index, -3:])
    cache.batch_repeat_interleave(2)
    assert cache.lengths.tolist() == [T] * 6
    cache.batch_select_indices(torch.tensor([0, 2, 4]))
    torch.testing.assert_close(cache.layer(0).online[0], _memory(other).online[0])  # type: ignore[union-attr]


def _memory(call: Call) -> Any:
    cache = MemoryCache()
    cache.extend(call, 0, "eager")
    return cache.layer(0)


@pytest.mark.parametrize(("recurrence", "state_init"), EVERY)
def test_crop_within_the_window_is_exact(recurrence: str, state_init: str) -> None:
    call, window = case(recurrence, state_init), 6
    wanted = answer(call)
    for prompt in (1, 9, T - 1):
        for back in range(1, window + 1):
            cache = MemoryCache(rewind=window)
            fed(cache, call, 0, prompt, T)
            cache.crop(-back)
            assert cache.lengths.tolist() == [T - back] * B
            close(fed(cache, call, T - back, T), wanted[:, T - back :])
            cache.crop(T - 1)
            close(fed(cache, call, T - 1, T), wanted[:, T - 1 :])


def test_crop_within_the_window_of_a_bound() -> None:
    call = case("linear", "checkpoint", "grm")
    for bound in (0, 1, 2):
        wanted = fed(MemoryCache(bound), call, 0, *range(1, T + 1))
        for back in range(1, 8):
            cache = MemoryCache(bound, rewind=7)
            close(fed(cache, call, 0, 12, T), wanted)
            cache.crop(-back)
            close(fed(cache, call, T - back, T), wanted[:, T - back :])


@pytest.mark.parametrize(("recurrence", "state_init"), EVERY)
def test_crop_to_the_end_of_a_segment(recurrence: str, state_init: str) -> None:
    call = case(recurrence, state_init)
    wanted = answer(call)
    for end in (C, 2 * C, 3 * C):
        cache = MemoryCache()
        fed(cache, call, 0, 8, T)
        if state_init == "checkpoint" and recurrence in ("swla", "titans"):
            with pytest.raises(ArgumentError, match=r"carries its .*It can go to 0; .*MemoryCache\(rewind="):
                cache.crop(end)
        else:
            cache.crop(end)
            close(fed(cache, call, end, T), wanted[:, end:])


def test_other_crops() -> None:
    call = case("linear")
    wanted = answer(call)
    MemoryCache().crop(3)
    cache = MemoryCache()
    fed(cache, call, 0, T)
    cache.crop(T + 4)
    with pytest.raises(ArgumentError, match=r"from 17 tokens to 13: .* go to 0, 5 to 15 in steps of 5; .*rewind=4\)"):
        cache.crop(13)
    assert cache.lengths.tolist() == [T, T]
    cache.crop(-T)
    assert len(cache) == 0 and cache.get_seq_length() == 0
    close(fed(cache, call, 0, T), wanted)
    cache = MemoryCache(rewind=2)
    fed(cache, call, 0, T)
    with pytest.raises(ArgumentError, match=r"go to 0, 15 to 17, 5 to 15 in steps of 5; .*rewind=5\)"):
        cache.crop(-5)
    cache = MemoryCache(max_states=1)
    fed(cache, call, 0, T)
    with pytest.raises(ArgumentError, match=r"max_states=1 has dropped 2 states.*go to 0, 15; "):
        cache.crop(10)
    cache.crop(15)
    close(fed(cache, call, 15, T), fed(MemoryCache(1), call, 0, T)[:, 15:])


def test_crop_of_unequal_sequences_to_one_length() -> None:
    x = arguments("swla", B=1, T=15, dtype=torch.float64)
    options = {"recurrence": "swla", "aggregation": "grm", "state_init": "checkpoint"}
    wanted = answer(call_of(x, **options))
    prompt = {n: torch.cat([t[:, :8], t[:, :11]], 1) for n, t in x.items()}
    bounds = torch.tensor([0, 8, 19], dtype=torch.int32)
    cache = MemoryCache(rewind=5)
    cache.extend(call_of(prompt, segmentation="packed", cu_seqlens=bounds, **options), 0, "eager")
    cache.crop(7)
    assert cache.lengths.tolist() == [7, 7]
    both = call_of({n: t.expand(2, *t.shape[1:]) for n, t in x.items()}, **options)
    close(fed(cache, both, 7, 15), wanted[:, 7:].expand(2, -1, -1, -1))


def test_inputs_of_convolutions_are_cropped_or_refused() -> None:
    call = case("linear")
    inputs = torch.arange(2.0 * 6).view(2, 6, 1)
    cache = MemoryCache(rewind=3)
    fed(cache, call, 0, T)
    cache.set_conv_state(0, (inputs,), spare=3)
    cache.crop(-2)
    assert torch.equal(cache.conv_state(0)[0][:, 2:], inputs[:, :4])  # type: ignore[index]
    with pytest.raises(ArgumentError, match=r"crop by 2 tokens with inputs of a convolution kept for 1: .*"):
        cache.crop(-2)
    assert cache.get_seq_length() == T - 2
    cache.crop(0)
    assert cache.conv_state(0) is None
    plain = MemoryCache()
    fed(plain, call, 0, T)
    plain.set_conv_state(0, (inputs,))
    with pytest.raises(ArgumentError, match="kept for 0"):
        plain.crop(15)


def test_a_row_that_went_back_takes_no_reach_from_others() -> None:
    layer = MemoryCaching(8, segment_length=3, use_short_conv=True, layer_idx=0, backend="eager")
    x = torch.randn(15, 8)
    cache = MemoryCache(rewind=6)
    with torch.no_grad():
        layer(x[None], past_key_values=cache, cu_seqlens=torch.tensor([0, 5, 15]))
        cache.crop(5)  # all that the second row can
        with pytest.raises(ArgumentError, match="kept for 1"):
            cache.crop(3)
        cache.batch_select_indices(torch.tensor([0]))
        cache.crop(3)
        y = layer(x[None, 3:5], past_key_values=cache)[0]
        torch.testing.assert_close(y, layer(x[None, :5])[0][:, 3:])


@pytest.mark.parametrize("recurrence", ["linear", "titans"])
@pytest.mark.parametrize("bound", [0, 2])
def test_a_bound_gives_the_same_in_all_blocks(bound: int, recurrence: str) -> None:
    call = case(recurrence, "checkpoint", "grm")
    one = fed(MemoryCache(bound), call, 0, *range(1, T + 1))
    assert not torch.allclose(one, answer(call))
    for ends in ((T,), (3, T), (11, 12, T), (5, 10, 15, T)):
        cache = MemoryCache(bound)
        close(fed(cache, call, 0, *ends), one)
        memory = cache.layer(0)
        assert memory is not None and memory.cached.tolist() == [bound] * B
        assert cache.lengths.tolist() == [T, T]


def test_a_bound_in_a_packed_prompt() -> None:
    x = arguments("linear", B=1, T=T, dtype=torch.float64)
    options = {"recurrence": "linear", "aggregation": "mean"}
    alone = fed(MemoryCache(1), call_of(x, **options), 0, T)
    row = {n: torch.cat([t[:, :13], t, t[:, :2]], 1) for n, t in x.items()}
    bounds = torch.tensor([0, 13, 30, 32], dtype=torch.int32)
    cache = MemoryCache(1)
    y = cache.extend(call_of(row, segmentation="packed", cu_seqlens=bounds, **options), 0, "eager")
    close(y, torch.cat([alone[:, :13], alone, alone[:, :2]], 1))
    assert cache.lengths.tolist() == [13, 17, 2] and cache.layer(0).cached.tolist() == [1, 1, 0]  # type: ignore[union-attr]


def test_a_bound_keeps_room_for_few_states() -> None:
    x = arguments("linear", B=1, T=90)
    options = {"recurrence": "linear", "aggregation": "grm"}
    packed = call_of(x, segmentation="packed", cu_seqlens=torch.tensor([0, 7, 90], dtype=torch.int32), **options)
    for call in (packed, call_of(x, **options)):
        cache = MemoryCache(2)
        cache.extend(call, 0, "eager")
        cache.reserve(1000)
        memory = cache.layer(0)
        assert memory is not None and int(memory.cached.max()) == 2 and memory.capacity <= 4


@pytest.mark.parametrize("bound", [None, 1])
def test_many_tokens_at_once_within_a_short_window(bound: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens past the window are written without a record, in as few steps as without one."""
    call = case("titans", "checkpoint", T=60)
    wanted = fed(MemoryCache(bound), call, 0, *range(1, 61))
    steps: list[int] = []

    def counted(part: Call, *rest: Any) -> torch.Tensor:
        steps.append(part.q.shape[1])
        return advance(part, *rest)

    monkeypatch.setattr(rewinding, "advance", counted)
    for back in (1, 2, 3):
        cache = MemoryCache(bound, rewind=3)
        fed(cache, call, 0, 4)
        steps.clear()
        close(fed(cache, call, 4, 60), wanted[:, 4:])
        assert sum(steps) == 56 and (len(steps) == 2 if bound is None else len(steps) <= 14)
        cache.crop(-back)
        close(fed(cache, call, 60 - back, 60), wanted[:, 60 - back :])


@pytest.mark.parametrize(("recurrence", "rewind"), [("swla", 0), ("titans", 4)])
def test_save_and_load(recurrence: str, rewind: int, tmp_path: Path) -> None:
    call = case(recurrence, "checkpoint")
    wanted = answer(call)
    cache = MemoryCache(max_states=7, rewind=rewind)
    fed(cache, call, 0, 8, 11)
    cache.set_conv_state(0, (torch.ones(2, 3, 4), torch.zeros(2, 3, 1)), spare=1)
    cache.save(tmp_path / "cache.safetensors")
    loaded = MemoryCache.load(tmp_path / "cache.safetensors").to("cpu")
    assert (loaded.max_states, loaded.rewind, loaded.nbytes) == (7, rewind, cache.nbytes)
    assert torch.equal(loaded.conv_state(0)[0], torch.ones(2, 3, 4))  # type: ignore[index]
    close(fed(loaded, call, 11, 13, T), wanted[:, 11:])
    if rewind:
        loaded._convolutions.clear()
        loaded.crop(-4)
        close(fed(loaded, call, T - 4, T), wanted[:, -4:])


def test_other_files_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "other"))
    with pytest.raises(ArgumentError, match=r"other is no file of MemoryCache\.save: its format is None"):
        MemoryCache.load(tmp_path / "other")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ArgumentError, match="pip install safetensors"):
        MemoryCache().save(tmp_path / "cache")


def test_bytes() -> None:
    call = case("linear", dtype=torch.float32)
    cache = MemoryCache()
    assert cache.nbytes == cache.reserved_bytes == 0
    fed(cache, call, 0, T)
    heads, D = B * 2, 4
    online = heads * (D * D + 3 * D) * 4 + 3 * B * 4
    assert cache.nbytes == 3 * heads * (D * D + D) * 4 + online
    assert cache.reserved_bytes == 4 * heads * (D * D + D) * 4 + online
    cache.reserve(5 * C)
    assert cache.reserved_bytes == 8 * heads * (D * D + D) * 4 + online
    kept = MemoryCache(rewind=2)
    fed(kept, call, 0, T)
    assert kept.reserved_bytes > cache.reserved_bytes - 4 * heads * (D * D + D) * 4 and kept.nbytes == cache.nbytes
    cache.reset()
    assert cache.nbytes == 0


def test_layers_and_devices() -> None:
    call = case("dla")
    cache = MemoryCache(rewind=2)
    for index in (3, 0):
        cache.extend(tokens(call, 0, 8), index, "eager")
    assert len(cache) == 2 and cache.layer(1) is None and cache.get_seq_length(3) == 8
    cache.to("cpu")
    for index in (3, 0):
        close(cache.extend(tokens(call, 8, T), index, "eager"), answer(call)[:, 8:])
    cache.to("meta")
    memory = cache.layer(3)
    assert memory is not None and memory.states[0].is_meta and not memory.cached.is_meta
    with pytest.raises(ArgumentError, match="q is on cpu and the memory on meta; move the memory"):
        cache.extend(tokens(call, 0, 1), 3, "eager")


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="max_states=-1"):
        MemoryCache(max_states=-1)
    with pytest.raises(ArgumentError, match="rewind=-2"):
        MemoryCache(rewind=-2)
    x = arguments("linear", T=6)
    call = call_of(x, recurrence="linear", aggregation="grm", segmentation="logarithmic")
    for rewind in (0, 2):
        with pytest.raises(ArgumentError, match="use segmentation='constant'"):
            MemoryCache(rewind=rewind).extend(call, 0, "eager")
