"""Cached states in 16 bits: each is the float32 one rounded once, and nothing else of a cache is rounded."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import GATES
from tables import LINEAR, TITANS, Table, checked, decode_table, draw, problem_id
from test_cache import EVERY, B, C, T, case, close, fed
from test_decode import stepped
from test_generation import EVERYTHING, LanguageModel, prompts

from mctune.core.problem import Problem
from mctune.reference import error_ratio
from mctune.runtime.api.step import memory_caching_step
from mctune.runtime.cache.cache import MemoryCache
from mctune.runtime.cache.prefill import prefill, remember
from mctune.runtime.errors import ArgumentError, BackendError
from mctune.runtime.kernels import dispatch
from mctune.runtime.memory import LayerMemory
from mctune.runtime.ops.step import tokens
from mctune.runtime.traits import AGGREGATIONS, STATE_INITS
from mctune.verify.judge import poisoned_memory

DTYPES = (torch.bfloat16, torch.float16)
STEPS = range(9, T + 1)


def memory_in(cache: MemoryCache) -> LayerMemory:
    memory = cache.layer(0)
    assert memory is not None
    return memory


def hold_rounded(found: LayerMemory, exact: LayerMemory, dtype: torch.dtype) -> None:
    """Cached states are ``exact``'s in ``dtype``; all else is the same, bit for bit."""
    assert found.cached.tolist() == exact.cached.tolist() != [0] * len(found.cached)
    for (name, store), (_, other) in zip(found.stores(), exact.stores(), strict=True):
        if not name.startswith("states"):
            assert store.dtype == other.dtype and torch.equal(store, other), name
            continue
        assert store.dtype == dtype
        for row, used in enumerate(exact.cached.tolist()):
            assert torch.equal(store[row, :, :used], other[row, :, :used].to(dtype)), name


def hold_near(y: torch.Tensor, exact: torch.Tensor) -> None:
    """They differ, by no more than the rounding of states to bfloat16."""
    assert 0 < error_ratio(y, exact) < 1e-2


@pytest.mark.parametrize("state_init", STATE_INITS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("recurrence", GATES)
def test_only_reads_of_cached_states_are_rounded(recurrence: str, aggregation: str, state_init: str) -> None:
    call = case(recurrence, state_init, aggregation, dtype=torch.float32)
    for dtype in DTYPES:
        with poisoned_memory():
            # Before a segment has ended there is nothing to round; a prompt is a plain forward.
            first = fed(MemoryCache(state_dtype=dtype), call, 0, 3, 4, C)
            assert torch.equal(first, fed(MemoryCache(), call, 0, 3, 4, C))
            exact, cache = MemoryCache(), MemoryCache(state_dtype=dtype)
            assert torch.equal(fed(cache, call, 0, 8), fed(exact, call, 0, 8))
            wanted = fed(exact, call, 8, *STEPS)
            y = fed(cache, call, 8, *STEPS)
        assert y.dtype == torch.float32
        hold_near(y, wanted)
        hold_rounded(memory_in(cache), memory_in(exact), dtype)


@pytest.mark.parametrize("recurrence", GATES)
def test_a_model_goes_on_with_a_given_cache(recurrence: str) -> None:
    """Logits of a left-padded prompt, and of the tokens after it."""
    model = LanguageModel(recurrence=recurrence, aggregation="grm", **EVERYTHING)
    _, batch, mask = prompts(1, 4, 10)
    following = torch.randint(23, (3, 9))
    found = []
    for cache in (MemoryCache(), MemoryCache(state_dtype=torch.bfloat16)):
        with torch.no_grad():
            parts = [model(batch, mask, cache)]
            for t in range(9):
                mask_so_far = torch.cat([mask, mask.new_ones(3, t + 1)], 1)
                parts.append(model(following[:, t : t + 1], mask_so_far, cache))
        found.append(torch.cat(parts, 1))
    assert torch.equal(found[0][:, :10], found[1][:, :10])
    hold_near(found[1][:, 10:], found[0][:, 10:])


@pytest.mark.parametrize("recurrence", GATES)
def test_prompts_leave_rounded_states(recurrence: str) -> None:
    """For a batch, a packed row past a bound, and before a window of ``rewind``."""
    call = case(recurrence, "checkpoint", "grm", dtype=torch.float32)
    hold_rounded(remember(call, state_dtype=torch.float16), remember(call), torch.float16)
    one = case(recurrence, "checkpoint", "grm", B=1, dtype=torch.float32)
    bounds = torch.tensor([0, 3, T], dtype=torch.int32)
    packed = replace(one, segmentation="packed", cu_seqlens=bounds)
    for settings in ((None, 0), (1, 0), (None, 4), (1, 4)):
        for prompt in (call, packed):
            exact, cache = MemoryCache(*settings), MemoryCache(*settings, torch.bfloat16)
            exact.extend(prompt, 0, "eager")
            cache.extend(prompt, 0, "eager")
            hold_rounded(memory_in(cache), memory_in(exact), torch.bfloat16)


def test_a_prompt_on_a_kernel_leaves_rounded_states(tuned_table: Table) -> None:
    call = checked(*draw(LINEAR))
    _, exact = prefill(call, "tvm")
    _, memory = prefill(call, "tvm", state_dtype=torch.bfloat16)
    hold_rounded(memory, exact, torch.bfloat16)


@pytest.mark.parametrize(("recurrence", "state_init"), EVERY)
@pytest.mark.parametrize("bound", [None, 1])
def test_crop_within_the_window_is_exact(recurrence: str, state_init: str, bound: int | None) -> None:
    """In a float64 call, whose order of summation does not show in 16 bits."""
    call = case(recurrence, state_init)
    wanted = fed(MemoryCache(bound, state_dtype=torch.bfloat16), call, 0, *range(1, T + 1))
    hold_near(wanted, fed(MemoryCache(bound), call, 0, *range(1, T + 1)))
    for back in range(1, 8):
        cache = MemoryCache(bound, rewind=7, state_dtype=torch.bfloat16)
        close(fed(cache, call, 0, 1, T), wanted)
        cache.crop(-back)
        close(fed(cache, call, T - back, T), wanted[:, T - back :])
        assert memory_in(cache).states[0].dtype == torch.bfloat16


@pytest.mark.parametrize("state_init", STATE_INITS)
@pytest.mark.parametrize("recurrence", ["linear", "dla"])
def test_crop_to_the_end_of_a_segment(recurrence: str, state_init: str) -> None:
    """Under checkpoint the state that the next segment starts from is the cached one, with its rounding."""
    call = case(recurrence, state_init)
    cache = MemoryCache(state_dtype=torch.bfloat16)
    wanted = fed(cache, call, 0, *range(1, T + 1))
    cache.crop(2 * C)
    memory = memory_in(cache)
    if state_init == "independent":
        close(fed(cache, call, 2 * C, T), wanted[:, 2 * C :])
        return
    for online, states in zip(memory.online, memory.states, strict=True):
        assert online.dtype == torch.float64 and torch.equal(online, states[:, :, 1].double())
    hold_near(fed(cache, call, 2 * C, T), wanted[:, 2 * C :])


@pytest.mark.parametrize("rewind", [0, 7])
@pytest.mark.parametrize("recurrence", ["swla", "titans"])
def test_rows_are_picked(recurrence: str, rewind: int) -> None:
    call = case(recurrence, dtype=torch.float32)
    exact, cache = MemoryCache(1, rewind), MemoryCache(1, rewind, torch.bfloat16)
    for each in (exact, cache):
        fed(each, call, 0, 9, T - 1)
        each.reorder_cache(torch.tensor([1, 0]))
        each.batch_repeat_interleave(2)
        each.batch_select_indices(torch.tensor([0, 2, 3]))
        each.reserve(100)
        if rewind:
            each.crop(-7)
    assert memory_in(cache).rows == 3
    hold_rounded(memory_in(cache), memory_in(exact), torch.bfloat16)
    cache.to("meta")
    assert memory_in(cache).states[0].dtype == torch.bfloat16


@pytest.mark.parametrize("recurrence", ["linear", "titans"])
def test_save_and_load(recurrence: str, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    call, path = case(recurrence, "checkpoint", dtype=torch.float32), tmp_path / "cache"
    for dtype in DTYPES:
        cache = MemoryCache(state_dtype=dtype)
        cache.save(path)
        assert MemoryCache.load(path).state_dtype == dtype
        fed(cache, call, 0, 8, 11)
        cache.save(path)
        loaded = MemoryCache.load(path)
        assert (loaded.state_dtype, loaded.nbytes) == (dtype, cache.nbytes)
        assert torch.equal(fed(loaded, call, 11, 13, T), fed(cache, call, 11, 13, T))
        hold_rounded(memory_in(loaded), memory_in(cache), dtype)
        loaded.reset()
        fed(loaded, call, 0, T)
        assert memory_in(loaded).states[0].dtype == dtype
    # A file from before there was a choice.
    cache = MemoryCache()
    fed(cache, call, 0, 8, 11)
    cache.save(path)
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    assert ', "state_dtype": null' in metadata["cache"]
    metadata["cache"] = metadata["cache"].replace(', "state_dtype": null', "")
    save_file(load_file(str(path)), str(path), metadata=metadata)
    loaded = MemoryCache.load(path)
    assert loaded.state_dtype is None and memory_in(loaded).states[0].dtype == torch.float32
    assert torch.equal(fed(loaded, call, 11, T), fed(cache, call, 11, T))


@pytest.mark.parametrize("recurrence", ["linear", "dla"])
def test_bytes(recurrence: str) -> None:
    call = case(recurrence, dtype=torch.float32)
    exact, cache = MemoryCache(), MemoryCache(state_dtype=torch.float16)
    for each in (exact, cache):
        fed(each, call, 0, T)
    states = sum(x[:, :, : T // C].nbytes for x in memory_in(exact).states)
    assert exact.nbytes - cache.nbytes == states / 2
    assert exact.reserved_bytes - cache.reserved_bytes == sum(x.nbytes for x in memory_in(exact).states) / 2
    for each in (exact, cache):
        each.reserve(200 * C)
    assert cache.reserved_bytes < 0.65 * exact.reserved_bytes


def test_compiled_steps() -> None:
    call = case("linear", aggregation="grm", dtype=torch.float32)
    compiled, plain = (LayerMemory.empty(call, B, state_dtype=torch.bfloat16) for _ in range(2))
    compiled.reserve(T)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return memory_caching_step(q, k, v, u, memory=compiled, segment_length=C, backend="eager")

    run = torch.compile(step, backend="aot_eager", fullgraph=True)
    wanted = stepped(call, plain, (1,) * T)
    parts = [tokens(call, t, t + 1) for t in range(T)]
    assert torch.equal(torch.cat([run(x.q, x.k, x.v, x.u) for x in parts], 1), wanted)
    assert compiled.states[0].dtype == torch.bfloat16


@pytest.mark.parametrize("problem", (LINEAR, TITANS), ids=problem_id)
def test_kernels_of_the_cpu_refuse(problem: Problem, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TABLE", decode_table(kernel_folder, problem))
    monkeypatch.setattr(dispatch, "_warned", set())
    call = checked(*draw(problem.replace(T=22)))

    def memory() -> LayerMemory:
        return LayerMemory.empty(call, problem.B, state_dtype=torch.bfloat16)

    named = memory()
    before = {name: store.clone() for name, store in named.stores()}
    with pytest.raises(BackendError, match=r'backend="tvm".* torch\.bfloat16.* use MemoryCache\(state_dtype=None\)'):
        stepped(call, named, (1,), "tvm")
    assert all(torch.equal(store, before[name]) for name, store in named.stores())
    with pytest.warns(UserWarning, match=r"the eager path runs: cached states of torch\.bfloat16") as seen:
        y = stepped(call, memory(), (20, 1, 1), "auto")
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = stepped(call, memory(), (20, 1, 1), "auto")
    assert torch.equal(y, again) and torch.equal(y, stepped(call, memory(), (20, 1, 1), "eager"))


@pytest.mark.parametrize("bad", [torch.int8, "bfloat16", torch.float32, torch.float8_e4m3fn], ids=str)
def test_other_dtypes(bad: Any) -> None:
    with pytest.raises(ArgumentError) as refused:
        MemoryCache(state_dtype=bad)
    assert str(refused.value).startswith(
        f"state_dtype={bad!r} is not one of torch.bfloat16, torch.float16; None keeps what states are computed in"
    )
