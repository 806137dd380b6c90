"""Going on from a cache gives what running everything again gives: tokens of a small model, and the layer's values."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mctune.runtime.api.module import MemoryCaching
from mctune.runtime.cache.cache import MemoryCache
from mctune.runtime.errors import ArgumentError

RECURRENCES = ("linear", "swla", "dla", "titans")
AGGREGATIONS = ("residual", "grm", "soup", "ssc", "mean")
EVERYTHING = {"use_short_conv": True, "conv_size": 3, "use_output_gate": True, "feature_map": "elu"}


class LanguageModel(nn.Module):
    """Two layers over a vocabulary of 23 tokens, of random weights, gates that depend on the tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(23, 16)
        options = {"segment_length": 4, "inner_chunk": 3, "backend": "eager"} | options
        self.layers = nn.ModuleList(MemoryCaching(16, 2, layer_idx=i, **options) for i in range(2))
        self.norm, self.head = nn.RMSNorm(16), nn.Linear(16, 23)
        for layer in self.layers:
            for gate in layer.gates.values():
                nn.init.normal_(gate.weight, std=0.3)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: MemoryCache | None = None) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x, attention_mask=mask, past_key_values=cache)[0]
        logits: Tensor = self.head(self.norm(x))
        return logits


@torch.no_grad()
def again(model: nn.Module, prompt: Tensor, tokens: Tensor) -> Tensor:
    """The greedy token after the prompt [t] and after each of ``tokens`` [n] but the last, without a cache.

    If they are ``tokens``, those are what generating from the whole prefix gives: each follows from the ones before.
    """
    logits = model(torch.cat([prompt, tokens[:-1]])[None])
    return logits[0, len(prompt) - 1 :].argmax(-1)


@torch.no_grad()
def cached(model: nn.Module, tokens: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    """The same of a batch [B, t] with a cache; the mask grows with the tokens, as generation loops have it."""
    cache, new = MemoryCache(), []
    logits = model(tokens, mask, cache)
    while True:
        new.append(logits[:, -1:].argmax(-1))
        if len(new) == count:
            return torch.cat(new, 1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(new[-1], mask, cache)


def prompts(*lengths: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Random prompts, and the batch of them padded on the left, with its mask."""
    lines = [torch.randint(23, (length,)) for length in lengths]
    batch = nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_side="left")
    mask = torch.stack([torch.arange(batch.shape[1]) >= batch.shape[1] - length for length in lengths])
    return lines, batch, mask.long()


@pytest.mark.parametrize("state_init", ("independent", "checkpoint"))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_greedy_tokens_are_those_of_the_whole_prefix(recurrence: str, aggregation: str, state_init: str) -> None:
    model = LanguageModel(recurrence=recurrence, aggregation=aggregation, state_init=state_init, **EVERYTHING).double()
    lines, batch, mask = prompts(1, 4, 10)
    found = cached(model, batch, 11, mask)
    for line, tokens in zip(lines, found, strict=True):
        assert torch.equal(tokens, again(model, line, tokens))
    assert len(found.unique()) > 4


def test_greedy_tokens_depend_on_the_cache() -> None:
    """What the test above compares is not a property of the newest token alone."""
    model = LanguageModel(recurrence="swla", aggregation="grm").double()
    _, batch, _ = prompts(9, 9)
    batch[1, -1] = batch[0, -1]
    found = cached(model, batch, 11)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("plain", ({}, {"connector": False, "qk_norm": True, "use_output_gate": True}), ids=str)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_a_batch_without_padding(recurrence: str, plain: dict[str, Any]) -> None:
    model = LanguageModel(recurrence=recurrence, aggregation="ssc", top_k=1, **plain).double()
    _, batch, mask = prompts(7, 7)
    found = cached(model, batch, 10)
    assert torch.equal(found, cached(model, batch, 10, mask))
    assert torch.equal(found, torch.stack([again(model, *each) for each in zip(batch, found, strict=True)]))


@pytest.mark.parametrize("aggregation", ("grm", "soup", "ssc", "residual"))
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_a_prompt_in_parts_is_the_prompt(recurrence: str, aggregation: str) -> None:
    """Cut anywhere, into two parts or many, the outputs are those of the long forward, to float32 accuracy."""
    torch.manual_seed(0)
    T = 19
    layer = MemoryCaching(
        16, 2, recurrence=recurrence, aggregation=aggregation, segment_length=5, inner_chunk=3, layer_idx=0,
        state_init="checkpoint" if aggregation == "soup" else "independent", backend="eager", **EVERYTHING,
    )  # fmt: skip
    x = torch.randn(2, T, 16)
    with torch.no_grad():
        expected = layer(x)[0]
        for cuts in (*([0, cut, T] for cut in range(1, T)), [0, 5, 6, 7, 15, T], range(T + 1)):
            cache = MemoryCache()
            y = torch.cat([layer(x[:, a:b], past_key_values=cache)[0] for a, b in pairwise(cuts)], 1)
            torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5)
            assert cache.get_seq_length() == T


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_a_padded_prompt_goes_on_as_each_sequence_would(recurrence: str) -> None:
    """Outputs of a left-padded prompt, of several tokens after it and of one, against each sequence by itself."""
    torch.manual_seed(0)
    layer = MemoryCaching(16, 2, recurrence=recurrence, segment_length=4, inner_chunk=2, layer_idx=3, **EVERYTHING)
    layer.backend = "eager"
    lengths, T = (9, 1, 4), 9
    x, more = torch.randn(3, T, 16), torch.randn(3, 7, 16)
    mask = torch.stack([torch.arange(T) >= T - length for length in lengths])
    with torch.no_grad():
        y, _, cache = layer(x, attention_mask=mask, use_cache=True)
        after = [layer(part, past_key_values=cache)[0] for part in more.split((6, 1), 1)]
        found = torch.cat([y, *after], 1)
        assert cache.lengths.tolist() == [length + 7 for length in lengths]
        for row, length in enumerate(lengths):
            alone = layer(torch.cat([x[row, T - length :], more[row]])[None])[0]
            torch.testing.assert_close(found[row : row + 1, T - length :], alone, rtol=2e-5, atol=2e-5)
            assert not found[row, : T - length].any()


@pytest.mark.parametrize("recurrence", ("swla", "titans"))
def test_steps_of_a_layer_compile_whole(recurrence: str) -> None:
    """One graph serves steps on both sides of a segment's end."""
    torch.manual_seed(0)
    layer = MemoryCaching(16, 2, recurrence=recurrence, segment_length=4, inner_chunk=3, layer_idx=0, **EVERYTHING)
    layer.backend = "eager"
    x = torch.randn(2, 15, 16)
    torch.compiler.reset()
    with torch.no_grad():
        expected = layer(x)[0]
        cache = MemoryCache()
        y = [layer(x[:, :6], past_key_values=cache)[0]]
        cache.reserve(9)
        graphs = CompileCounter()
        step = torch.compile(lambda x: layer(x, past_key_values=cache)[0], backend=graphs, fullgraph=True)
        y += [step(part) for part in x[:, 6:].split(1, 1)]
    torch.testing.assert_close(torch.cat(y, 1), expected, rtol=2e-5, atol=2e-5)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("segmentation", ("constant", "packed"))
def test_packed_sequences_become_rows(segmentation: str) -> None:
    torch.manual_seed(0)
    layer = MemoryCaching(
        16,
        2,
        recurrence="swla",
        segment_length=4,
        layer_idx=0,
        segmentation=segmentation,
        backend="eager",
        **EVERYTHING,
    )
    x, more = torch.randn(1, 14, 16), torch.randn(3, 5, 16)
    bounds = torch.tensor([0, 4, 5, 14], dtype=torch.int32)
    with torch.no_grad():
        y, _, cache = layer(x, cu_seqlens=bounds, use_cache=True)
        with pytest.raises(ArgumentError, match="cu_seqlens after the first call with this cache"):
            layer(more[:1], cu_seqlens=torch.tensor([0, 2, 5]), past_key_values=cache)
        after = layer(more, past_key_values=cache)[0]
        layer.segmentation = "constant"
        for row, (begin, end) in enumerate(pairwise(bounds.tolist())):
            alone = layer(torch.cat([x[0, begin:end], more[row]])[None])[0]
            torch.testing.assert_close(torch.cat([y[:, begin:end], after[row : row + 1]], 1), alone)


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_tokens_taken_back(recurrence: str) -> None:
    """crop() takes the convolutions' inputs back with the memory, twice in a row and over a segment's end."""
    torch.manual_seed(0)
    layer = MemoryCaching(16, 2, recurrence=recurrence, segment_length=4, inner_chunk=2, layer_idx=0, **EVERYTHING)
    layer.backend = "eager"
    x, wrong = torch.randn(2, 14, 16), torch.randn(2, 6, 16)
    with torch.no_grad():
        expected = layer(x)[0]
        cache = MemoryCache(rewind=4)
        y = [layer(x[:, :7], past_key_values=cache)[0]]
        layer(wrong[:, :3], past_key_values=cache)
        cache.crop(7)
        y.append(layer(x[:, 7:8], past_key_values=cache)[0])
        layer(wrong[:, 3:5], past_key_values=cache)
        cache.crop(-2)
        y.append(layer(x[:, 8:11], past_key_values=cache)[0])
        layer(wrong[:, 5:], past_key_values=cache)
        cache.crop(-2)
        y[-1] = y[-1][:, :2]
        y.append(layer(x[:, 10:], past_key_values=cache)[0])
    torch.testing.assert_close(torch.cat(y, 1), expected, rtol=2e-5, atol=2e-5)


def test_no_further_back_than_inputs_are_kept() -> None:
    """A crop that the memory could do and the convolutions could not is refused, and nothing has changed then."""
    layer = MemoryCaching(16, 2, segment_length=2, layer_idx=0, backend="eager", **EVERYTHING)
    x = torch.randn(1, 9, 16)
    with torch.no_grad():
        cache = MemoryCache(rewind=2)
        layer(x[:, :7], past_key_values=cache)
        cache.crop(5)
        layer(x[:, 5:6], past_key_values=cache)
        with pytest.raises(ArgumentError, match="crop by 2 tokens with inputs of a convolution kept for 1"):
            cache.crop(4)
        y = layer(x[:, 6:], past_key_values=cache)[0]
        torch.testing.assert_close(y, layer(x)[0][:, 6:])


def test_beams_reordered() -> None:
    """Rows of the cache follow their sequences, inputs of the convolutions too."""
    model = LanguageModel(recurrence="titans", **EVERYTHING).double()
    lines, batch, mask = prompts(3, 8, 6)
    order = torch.tensor([2, 2, 0])
    new = torch.randint(23, (3, 4))
    with torch.no_grad():
        cache = MemoryCache()
        model(batch, mask, cache)
        cache.reorder_cache(order)
        found = model(new, None, cache)
        for row, source in enumerate(order.tolist()):
            expected = model(torch.cat([lines[source], new[row]])[None])[:, -4:]
            torch.testing.assert_close(found[row : row + 1], expected)
