"""Sub-modules are called, never read: hooks, adapters, quantised, parametrised and sharded layers take effect."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import parametrizations, parametrize

from mctune.runtime.api.conv import ShortConv
from mctune.runtime.api.huggingface import MemoryCachingConfig, MemoryCachingForCausalLM
from mctune.runtime.api.module import MemoryCaching
from mctune.runtime.cache.cache import MemoryCache

RECURRENCES = ("linear", "swla", "dla", "titans")
AGGREGATIONS = ("residual", "grm", "soup", "ssc", "mean")


class Adapter(nn.Module):
    """A low-rank adapter in a linear layer's place, the first factor of which is not zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def layer(**options: Any) -> MemoryCaching:
    torch.manual_seed(0)
    chosen = {"segment_length": 4, "inner_chunk": 2, "backend": "eager", "layer_idx": 0} | options
    made = MemoryCaching(16, 2, **chosen)
    for gate in made.gates.values():
        nn.init.normal_(gate.weight, std=0.3)
    return made


def linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every linear layer with what holds it, and its name there."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                yield parent, name, child


def called(module: nn.Module) -> set[str]:
    """Fills with the names of the modules whose forward hooks fire."""
    names: set[str] = set()
    for name, part in module.named_modules():
        part.register_forward_hook(lambda *_, name=name: names.add(name))
    return names


def with_parameters(module: nn.Module) -> set[str]:
    return {name for name, part in module.named_modules() if any(True for _ in part.parameters(recurse=False))}


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_every_part_with_parameters_is_called(recurrence: str) -> None:
    """In training, for a prompt and for each token after it, whatever the options."""
    seed = time.time_ns() % 2**31
    print(f"seed {seed}")
    draw = random.Random(seed)
    options: dict[str, tuple[Any, ...]] = {
        "state_init": ("independent", "checkpoint"), "feature_map": (None, "relu", "softmax"), "qk_norm": (True, False),
        "connector": (True, False), "use_short_conv": (True, False), "use_output_gate": (True, False),
    }  # fmt: skip
    for aggregation in draw.sample(AGGREGATIONS, 5 if recurrence == "linear" else 2):
        choice = {name: draw.choice(values) for name, values in options.items()}
        made = layer(recurrence=recurrence, aggregation=aggregation, **choice)
        x, names, expected = torch.randn(1, 9, 16), called(made), with_parameters(made)
        made(x, attention_mask=torch.tensor([[0] * 3 + [1] * 6]))
        assert names >= expected, (aggregation, choice)
        cache = MemoryCache()
        with torch.no_grad():
            for part in (x[:, :6], x[:, 6:7], x[:, 7:]):
                names.clear()
                made(part, past_key_values=cache)
                assert names >= expected, (aggregation, choice)


def test_every_part_of_the_language_model_is_called() -> None:
    config = MemoryCachingConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_heads=2, segment_length=4, recurrence="swla",
        backend="eager",
    )  # fmt: skip
    model = MemoryCachingForCausalLM(config).eval()
    names, expected = called(model), with_parameters(model)
    tokens = torch.randint(31, (1, 6))
    with torch.no_grad():
        cache = model(tokens).past_key_values
        assert names >= expected
        names.clear()
        model(tokens[:, :1], past_key_values=cache)
    assert names >= expected


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_adapters_take_effect(recurrence: str, dtype: torch.dtype) -> None:
    """Each has a gradient in both factors, so each changes the output; also under autocast."""
    made, x = layer(recurrence=recurrence, use_output_gate=True).to(dtype), torch.randn(1, 9, 16, dtype=dtype)
    for parent, name, child in list(linears(made)):
        if isinstance(parent, nn.ModuleDict):
            parent[name] = Adapter(child).to(dtype)
        else:
            setattr(parent, name, Adapter(child).to(dtype))
    y = made(x)[0]
    assert y.dtype == dtype
    y.square().sum().backward()
    for name, p in made.named_parameters():
        assert ".base." in name or (p.grad is not None and bool(p.grad.any())), name
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert bool(made(x)[0].isfinite().all())


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_parametrised_weights_take_effect(recurrence: str) -> None:
    """The output is that of a layer which has the parametrisation's weights as its own."""
    x = torch.randn(1, 9, 16)
    plain, doubled = (layer(recurrence=recurrence, use_short_conv=True, use_output_gate=True) for _ in range(2))
    for made, act in ((plain, False), (doubled, True)):
        for _, _, child in linears(made):
            if act:
                parametrizations.weight_norm(child, "weight")
                child.parametrizations.weight.original0.data *= 2
            else:
                child.weight.data *= 2
        for conv in made.convs:
            if act:
                parametrize.register_parametrization(conv, "weight", Doubled())
            else:
                conv.weight.data *= 2
    torch.testing.assert_close(doubled(x)[0], plain(x)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_quantised_layers(recurrence: str) -> None:
    made = layer(recurrence=recurrence, use_output_gate=True).eval()
    x = torch.randn(1, 9, 16)
    with torch.no_grad():
        expected, quantised = made(x)[0], torch.ao.quantization.quantize_dynamic(made, {nn.Linear})
        assert not isinstance(quantised.q_proj, nn.Linear)
        y, cache = quantised(x)[0], MemoryCache()
        parts = [quantised(part, past_key_values=cache)[0] for part in (x[:, :6], x[:, 6:])]
    assert 0 < float((y - expected).norm() / expected.norm()) < 0.1
    torch.testing.assert_close(torch.cat(parts, 1), y, rtol=0.1, atol=0.1)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recurrence", ("swla", "titans"))
@pytest.mark.parametrize("kinds", ((nn.Linear,), (nn.Linear, nn.RMSNorm, ShortConv)), ids=("linear", "all"))
def test_sharded_per_part(recurrence: str, kinds: tuple[type, ...], alone: None) -> None:
    """FSDP2 with a unit for each part: outputs and gradients are those of the plain layer."""
    x = torch.randn(1, 9, 16)
    plain, sharded = (layer(recurrence=recurrence, use_short_conv=True, use_output_gate=True) for _ in range(2))
    for part in list(sharded.modules()):
        if isinstance(part, kinds):
            fully_shard(part)
    fully_shard(sharded)
    y, expected = sharded(x)[0], plain(x)[0]
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), other in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(other.grad.full_tensor(), p.grad, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_sharded_in_mixed_precision(alone: None) -> None:
    made = layer(recurrence="titans", use_output_gate=True)
    for _, _, child in linears(made):
        fully_shard(child, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(made, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    y = made(torch.randn(1, 9, 16))[0]
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad is not None for p in made.parameters())
