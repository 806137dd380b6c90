"""The model for transformers: losses, generation with its cache, saving, and where its weights start."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from mctune.runtime.api.huggingface import MemoryCachingConfig, MemoryCachingForCausalLM
from mctune.runtime.cache.cache import MemoryCache
from mctune.runtime.errors import ArgumentError

RECURRENCES = ("linear", "swla", "dla", "titans")
VARIANTS = (
    {"recurrence": "linear", "aggregation": "ssc", "ssc_top_k": 1},
    {"recurrence": "swla", "state_init": "checkpoint", "tie_word_embeddings": True},
    {"recurrence": "dla", "aggregation": "soup"},
    {"recurrence": "titans", "aggregation": "residual"},
)
PAD = 0


def build(**options: Any) -> MemoryCachingForCausalLM:
    torch.manual_seed(0)
    config = MemoryCachingConfig(**({
        "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "segment_length": 4,
        "inner_chunk": 3, "backend": "eager", "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None,
        "initializer_range": 0.3,
    } | options))  # fmt: skip
    return MemoryCachingForCausalLM(config).eval()


def prompts(*lengths: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Random prompts, and the batch of them padded on the left, with its mask."""
    torch.manual_seed(1)
    lines = [torch.randint(3, 31, (length,)) for length in lengths]
    batch = nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=PAD, padding_side="left")
    return lines, batch, (batch != PAD).long()


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: options["recurrence"])
def test_greedy_generation(options: dict[str, Any]) -> None:
    """A left-padded batch gives what each prompt gives alone without a cache."""
    model = build(**options).double()
    lines, batch, mask = prompts(3, 9, 6)
    found = model.generate(batch, attention_mask=mask, max_new_tokens=9, do_sample=False)
    for line, tokens in zip(lines, found[:, 9:], strict=True):
        expected = model.generate(line[None], max_new_tokens=9, do_sample=False, use_cache=False)
        assert torch.equal(tokens, expected[0, len(line) :])
    assert len(found[:, 9:].unique()) > 3


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: options["recurrence"])
def test_beam_search_and_sampling(options: dict[str, Any]) -> None:
    """With the cache as without it; the beams of this model change places."""
    model = build(**options).double()
    _, batch, mask = prompts(5, 7)
    orders = []
    real = MemoryCache.reorder_cache

    def spy(cache: MemoryCache, order: Tensor) -> None:
        orders.append(order.tolist())
        real(cache, order)

    for way in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 5, "num_return_sequences": 2}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(2)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(MemoryCache, "reorder_cache", spy)
                results.append(model.generate(batch, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **way))
        assert torch.equal(*results)
    assert any(order != sorted(set(order)) for order in orders)


def test_a_given_cache_goes_on() -> None:
    model = build(recurrence="swla").double()
    _, batch, _ = prompts(6, 6)
    cache = MemoryCache()
    first = model.generate(batch, max_new_tokens=4, do_sample=False, past_key_values=cache)
    # The newest token has not been through the model yet.
    assert cache.get_seq_length() == 9 and len(cache) == 2
    second = model.generate(first, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(second, model.generate(batch, max_new_tokens=8, do_sample=False))
    chunks = model.generate(batch, max_new_tokens=8, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(second, chunks)
    bounded = MemoryCache(max_states=1)
    model.generate(batch, max_new_tokens=8, do_sample=False, past_key_values=bounded)
    memory = bounded.layer(0)
    assert memory is not None and memory.cached.tolist() == [1, 1]
    result = model.generate(batch, max_new_tokens=2, return_dict_in_generate=True, do_sample=False)
    assert isinstance(result.past_key_values, MemoryCache)


def test_what_a_generation_cannot_do() -> None:
    model = build()
    _, batch, _ = prompts(6)
    with pytest.raises(ArgumentError, match="past_key_values is a DynamicCache; it must be a MemoryCache"):
        model.generate(batch, max_new_tokens=2, past_key_values=DynamicCache())
    with pytest.raises(ArgumentError, match="cache_implementation='static': this model's cache is a MemoryCache"):
        model.generate(batch, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(batch, max_new_tokens=2, prompt_lookup_num_tokens=2)


def test_loss_and_outputs() -> None:
    model = build(recurrence="swla")
    _, batch, mask = prompts(4, 9)
    labels = batch.masked_fill(mask == 0, -100)
    output = model(batch, attention_mask=mask, labels=labels, output_hidden_states=True)
    assert isinstance(output, CausalLMOutputWithPast) and output.past_key_values is None
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert [x.shape for x in output.hidden_states] == [(2, 9, 16)] * 3
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    with torch.no_grad():
        last = model(batch, attention_mask=mask, logits_to_keep=1)
        assert isinstance(last.past_key_values, MemoryCache)
        torch.testing.assert_close(last.logits, output.logits[:, -1:])
        # Padded on the right there is nothing to go on from.
        assert model(batch.flip(1), attention_mask=mask.flip(1)).past_key_values is None
        embeds = model(inputs_embeds=model.get_input_embeddings()(batch), attention_mask=mask, return_dict=False)
        torch.testing.assert_close(embeds[0], output.logits)
    with pytest.raises(ArgumentError, match="pass exactly one of them"):
        model()


def test_packed_rows() -> None:
    model = build(recurrence="titans")
    lines, _, _ = prompts(3, 8)
    packed = model(torch.cat(lines)[None], cu_seqlens=torch.tensor([0, 3, 11], dtype=torch.int32)).logits
    torch.testing.assert_close(packed, torch.cat([model(line[None]).logits for line in lines], 1))


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_trains(recurrence: str) -> None:
    """Loss falls on a line learnt by heart, every weight has a gradient, with checkpointing the same one."""
    model = build(recurrence=recurrence, tie_word_embeddings=True).train()
    _, batch, _ = prompts(12, 12)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(batch, labels=batch).loss.backward()
        found = [p.grad for p in model.parameters()]
        assert all(grad is not None and bool(grad.isfinite().all()) for grad in found)
        return [grad.clone() for grad in found if grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), plain)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: options["recurrence"])
def test_saved_and_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    model = build(**options)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, MemoryCachingForCausalLM) and not again.training
    assert again.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    assert again.config.recurrence == options["recurrence"]
    state = again.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    _, batch, _ = prompts(9, 9)
    assert torch.equal(model(batch).logits, again(batch).logits)
    tied = again.lm_head.weight is again.get_input_embeddings().weight
    assert tied is bool(options.get("tie_word_embeddings"))


def test_weights_start_as_the_layer_says(tmp_path: Path) -> None:
    """Also those that a checkpoint lacks; those that it has are left alone."""
    model = build(recurrence="swla")
    mixer = model.model.layers[1].mixer
    torch.testing.assert_close(mixer.gates["lam_proj"].bias.sigmoid(), torch.full((2,), 0.9))
    assert not mixer.gates["lam_proj"].weight.any()
    nn.init.normal_(mixer.gates["beta_proj"].bias)
    state = {name: x for name, x in model.state_dict().items() if "lam_proj" not in name and "layers.0" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    again = MemoryCachingForCausalLM.from_pretrained(tmp_path)
    for layer in again.model.layers:
        torch.testing.assert_close(layer.mixer.gates["lam_proj"].bias.sigmoid(), torch.full((2,), 0.9))
        assert not layer.mixer.gates["lam_proj"].weight.any() and bool((layer.mixer.norm.weight == 1).all())
    fresh = again.model.layers[0].mixer.q_proj.weight
    assert 0.15 < float(fresh.detach().std()) < 0.35
    assert torch.equal(again.model.layers[1].mixer.gates["beta_proj"].bias, mixer.gates["beta_proj"].bias)


def test_places_to_import_it_from() -> None:
    """The one that stays, and the one that scripts of earlier versions name."""
    for name in ("mctune.huggingface", "mctune.runtime.huggingface"):
        module = import_module(name)
        assert module.MemoryCachingForCausalLM is MemoryCachingForCausalLM
        assert module.MemoryCachingConfig is MemoryCachingConfig and "MemoryCachingModel" in module.__all__


def test_without_transformers() -> None:
    """Everything else loads; the model says what to install."""
    code = """
import sys
sys.modules["transformers"] = None
import mctune.runtime.api.attach, mctune.runtime.cache.cache, mctune.runtime.api.module
print("loaded", flush=True)
import mctune.runtime.api.huggingface
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "loaded\n" and run.returncode != 0
    assert "`pip install transformers`" in run.stderr.splitlines()[-1]
