"""Models of deep memories on tuned kernels of all passes, held to the eager path: caches, the transformers model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel import deep_layer
from tables import DLA, TITANS, Table, build_table, decode_table, problem_id
from torch import Tensor, nn

from mctune.core.problem import Problem
from mctune.runtime.api.huggingface import MemoryCachingConfig, MemoryCachingForCausalLM
from mctune.runtime.api.module import MemoryCaching
from mctune.runtime.cache.cache import MemoryCache
from mctune.runtime.kernels import dispatch
from mctune.runtime.memory import LayerMemory
from mctune.runtime.ops import run as ops_run
from mctune.runtime.ops import step as ops_step


@pytest.fixture(params=(DLA, TITANS), ids=problem_id)
def problem(request: pytest.FixtureRequest, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Problem:
    """A problem with kernels for all passes."""
    found: Problem = request.param
    entries = [*build_table(kernel_folder).entries, *decode_table(kernel_folder, found).entries]
    monkeypatch.setattr(dispatch, "TABLE", Table(tuple(entries)))
    monkeypatch.setattr(dispatch, "_warned", set())
    return found


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes for which a kernel is launched."""
    passes: list[str] = []

    def note(module: Any, name: str, pass_: str) -> None:
        real = getattr(module, name)

        def spy(call: Any, *rest: Any) -> Any:
            kernel = real(call, *rest)
            passes.extend([pass_ or rest[0]] if kernel is not None else [])
            return kernel

        monkeypatch.setattr(module, name, spy)

    note(ops_run, "kernel_for", "")
    note(ops_step, "decode_kernel", "decode")
    return passes


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Falling back to the eager path would warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the eager path runs")
        yield


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def pair(problem: Problem) -> tuple[MemoryCaching, MemoryCaching]:
    """The same layer on kernels and on the eager path."""
    torch.manual_seed(0)
    tuned = deep_layer(problem, layer_idx=0)
    eager = copy.deepcopy(tuned)
    eager.backend = "eager"
    return tuned, eager


def memory_in(cache: MemoryCache) -> LayerMemory:
    memory = cache.layer(0)
    assert memory is not None
    return memory


@torch.no_grad()
@pytest.mark.parametrize("settings", ({}, {"rewind": 5}, {"max_states": 2}, {"max_states": 2, "rewind": 5}), ids=str)
def test_a_prompt_and_steps(problem: Problem, settings: dict[str, Any], launched: list[str]) -> None:
    layers, x = pair(problem), torch.randn(2, 31, 24)
    caches = [MemoryCache(**settings) for _ in layers]
    ends = (13, *range(14, 20), 27, 31)
    for begin, end in zip((0, *ends), ends, strict=False):
        parts = [layer(x[:, begin:end], past_key_values=cache)[0] for layer, cache in zip(layers, caches, strict=True)]
        close(*parts)
    if not settings:
        close(parts[0], layers[1](x)[0][:, -4:])
    assert set(launched) == {"forward", "decode"}
    stores = zip(*(memory_in(cache).stores() for cache in caches), strict=True)
    for (name, found), (_, wanted) in stores:
        if not name.startswith("last_"):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=name)
    if "rewind" in settings:
        for cache in caches:
            cache.crop(-3)
        close(*(layer(x[:, 28:], past_key_values=cache)[0] for layer, cache in zip(layers, caches, strict=True)))
    for cache in caches:
        cache.reorder_cache(torch.tensor([1, 0]))
    more = torch.randn(2, 5, 24)
    close(*(layer(more, past_key_values=cache)[0] for layer, cache in zip(layers, caches, strict=True)))


@torch.no_grad()
def test_crop_to_the_end_of_a_segment(problem: Problem) -> None:
    layers, x = pair(problem), torch.randn(2, 20, 24)
    # Momentum that crosses segments is not cached: there a crop needs a window.
    window = 6 if problem.writes.momentum and problem.state_init == "checkpoint" else 0
    caches, at = [MemoryCache(rewind=window) for _ in layers], 2 * (problem.segment_length or 1)
    for layer, cache in zip(layers, caches, strict=True):
        layer(x[:, :14], past_key_values=cache)
        cache.crop(at)
    close(*(layer(x[:, at:], past_key_values=cache)[0] for layer, cache in zip(layers, caches, strict=True)))


@torch.no_grad()
def test_states_of_16_bits_are_read_by_the_eager_path(problem: Problem, launched: list[str]) -> None:
    tuned, eager = pair(problem)
    tuned.backend = "auto"
    x, outputs = torch.randn(2, 20, 24), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the eager path runs")
        for layer in (tuned, eager):
            cache = MemoryCache(state_dtype=torch.bfloat16)
            outputs.append(
                torch.cat([layer(x[:, a:b], past_key_values=cache)[0] for a, b in ((0, 11), (11, 12), (12, 20))], 1)
            )
            assert memory_in(cache).states[1].dtype == torch.bfloat16
    close(*outputs)


# --- the model for transformers


def model(problem: Problem, backend: str = "tvm") -> MemoryCachingForCausalLM:
    torch.manual_seed(0)
    config = MemoryCachingConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_heads=problem.H, head_dim=problem.Dk,
        recurrence=problem.recurrence, aggregation=problem.aggregation, state_init=problem.state_init,
        segment_length=problem.segment_length, inner_chunk=problem.inner_chunk, expansion=problem.expansion,
        backend=backend, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return MemoryCachingForCausalLM(config).eval()


def test_the_model_generates(problem: Problem, launched: list[str]) -> None:
    """A left-padded batch, greedily and by beams, as on the eager path and as without a cache."""
    torch.manual_seed(1)
    lines = [torch.randint(3, 31, (length,)) for length in (3, 9, 6)]
    batch = nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=0, padding_side="left")
    options: dict[str, Any] = dict(attention_mask=(batch != 0).long(), max_new_tokens=9, do_sample=False)
    tuned, eager = model(problem), model(problem, "eager")
    for beams in (1, 3):
        launched.clear()
        found = tuned.generate(batch, num_beams=beams, **options)
        assert set(launched) == {"forward", "decode"}
        assert torch.equal(found, eager.generate(batch, num_beams=beams, **options))
    for line, tokens in zip(lines, tuned.generate(batch, **options)[:, 9:], strict=True):
        alone = tuned.generate(line[None], max_new_tokens=9, do_sample=False, use_cache=False)
        assert torch.equal(tokens, alone[0, len(line) :])


def test_the_model_trains(problem: Problem, launched: list[str]) -> None:
    """Gradients are the eager path's, with checkpointing too; the loss falls on a line learnt by heart."""
    torch.manual_seed(1)
    batch, found = torch.randint(3, 31, (2, 14)), []
    for backend, saving in (("tvm", False), ("tvm", True), ("eager", False)):
        network = model(problem, backend).train()
        if saving:
            network.gradient_checkpointing_enable()
        network(batch, labels=batch).loss.backward()
        found.append([p.grad for p in network.parameters()])
        assert all(grad is not None and bool(grad.isfinite().all()) for grad in found[-1])
    assert set(launched) == {"forward", "backward"}
    torch.testing.assert_close(found[0], found[1])
    for one, other in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    network, losses = model(problem).train(), []
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(6):
        loss = network(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
