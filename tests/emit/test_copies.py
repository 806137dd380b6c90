"""Two copies of the runtime in one process, mctune's and a package's: they work together, or name each other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from packages import forget
from transformers import AutoConfig

import mctune
from mctune.core.target import Target
from mctune.core.winner import Winner
from mctune.emit import emit_package
from mctune.verify.package import load_package


@pytest.fixture
def package(out: Path, target: Target, winners: Sequence[Winner]) -> Iterator[Any]:
    yield load_package(emit_package(out, target, winners))
    forget(out.name)


def copies(package: Any) -> tuple[tuple[Any, Any], ...]:
    return (mctune, package), (package, mctune)


def layer(source: Any, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    made = {"recurrence": "swla", "aggregation": "residual", "segment_length": 64, "layer_idx": 0, "backend": "eager"}
    return source.MemoryCaching(16, 2, **(made | options))


def test_a_cache_of_the_other_copy_is_named(package: Any) -> None:
    x = torch.randn(1, 5, 16)
    for one, other in copies(package):
        theirs = other.MemoryCache()
        message = f"past_key_values is a MemoryCache of {other.__name__}, and this is {one.__name__}: take both"
        attached = torch.nn.Sequential(layer(one))
        one.attach_memory_caching(attached, 4)
        for made in (layer(one), attached[0]):
            with pytest.raises(ValueError, match=message):
                made(x, past_key_values=theirs)
            own = type("Mine", (one.MemoryCache,), {})()
            assert made(x, past_key_values=own)[2] is own


@pytest.mark.parametrize("qk_norm", (True, False))
def test_attach_to_layers_of_the_other_copy(qk_norm: bool, package: Any) -> None:
    """With all their options, as to one's own."""
    x = torch.randn(1, 40, 16)
    for one, other in copies(package):
        theirs, mine = (torch.nn.Sequential(layer(source, qk_norm=qk_norm)) for source in (other, one))
        base = theirs[0](x)[0]
        attached = one.attach_memory_caching(theirs, segment_length=64)
        torch.testing.assert_close(theirs[0](x)[0], base, rtol=0, atol=0)
        with pytest.raises(ValueError, match="has memory caching attached already"):
            other.attach_memory_caching(theirs, segment_length=8)
        attached.detach()
        one.attach_memory_caching(theirs, segment_length=8)
        one.attach_memory_caching(mine, segment_length=8)
        torch.testing.assert_close(theirs[0](x)[0], mine[0](x)[0], rtol=0, atol=0)
        assert not torch.allclose(theirs[0](x)[0], base)
        torch.testing.assert_close(copy.deepcopy(theirs)[0](x)[0], theirs[0](x)[0])


def test_weights_and_saved_caches_go_from_one_copy_to_the_other(package: Any, tmp_path: Path) -> None:
    x = torch.randn(1, 9, 16)
    with torch.no_grad():
        for number, (one, other) in enumerate(copies(package)):
            first, second = layer(one), layer(other)
            for gate in first.gates.values():
                torch.nn.init.normal_(gate.weight)
            second.load_state_dict(first.state_dict())
            _, _, cache = first(x[:, :8], use_cache=True)
            cache.save(tmp_path / str(number))
            loaded = other.MemoryCache.load(tmp_path / str(number))
            assert isinstance(loaded, other.MemoryCache)
            y = second(x[:, 8:], past_key_values=loaded)[0]
            torch.testing.assert_close(y, first(x)[0][:, 8:])


@pytest.fixture
def registered() -> Iterator[None]:
    """Transformers knows one class of a name, that of the copy imported last; other tests expect mctune's own."""
    yield
    config = import_module("mctune.huggingface").MemoryCachingConfig
    AutoConfig.register(config.model_type, config, exist_ok=True)


@pytest.mark.usefixtures("registered")
def test_language_models_of_both_copies(package: Any, tmp_path: Path) -> None:
    """Each is a model of its own copy's layers; a checkpoint of one loads in the other."""
    one, other = (import_module(f"{source.__name__}.huggingface") for source in (mctune, package))
    options: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2}
    tokens = torch.tensor([[3, 4, 5]])
    model = one.MemoryCachingForCausalLM(one.MemoryCachingConfig(**options)).eval()
    model.save_pretrained(tmp_path)
    again = other.MemoryCachingForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again.model.layers[0].mixer, package.MemoryCaching)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    with pytest.raises(ValueError, match=f"is a MemoryCache of mctune, and this is {package.__name__}"):
        again.generate(tokens, max_new_tokens=2, past_key_values=mctune.MemoryCache())
