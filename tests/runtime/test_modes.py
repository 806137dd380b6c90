"""No call is spoilt by the mode of an earlier one, and every input has a gradient.

A seed of its own in each run, printed when it fails; ``MCTUNE_SEED`` repeats one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from calls import arguments
from torch._subclasses.fake_tensor import FakeTensorMode

from mctune.runtime.api.functional import memory_caching
from mctune.runtime.api.module import MemoryCaching, first_eta
from mctune.runtime.cache.cache import MemoryCache

SEED = int(os.environ.get("MCTUNE_SEED", random.SystemRandom().randrange(2**31)))
RECURRENCES = ("linear", "swla", "dla", "titans")
AGGREGATIONS = ("residual", "grm", "soup", "ssc", "mean")


def validate(layer: MemoryCaching, T: int) -> None:
    with torch.inference_mode():
        layer(torch.randn(1, T, 8))


def evaluate(layer: MemoryCaching, T: int) -> None:
    with torch.no_grad():
        layer(torch.randn(1, T, 8))


def fake(layer: MemoryCaching, T: int) -> None:
    options = dict(recurrence=layer.recurrence, aggregation=layer.aggregation, segment_length=layer.segment_length)
    with FakeTensorMode():
        assert MemoryCaching(8, 2, **options)(torch.randn(1, T, 8))[0].shape == (1, T, 8)


def train(layer: MemoryCaching, T: int) -> None:
    layer.zero_grad()
    layer(torch.randn(1, T, 8))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def transform(layer: MemoryCaching, T: int) -> None:
    q, k = torch.randn(2, 3, 1, T, 2, 4)

    def total(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return memory_caching(q, k, k, segment_length=layer.segment_length, backend="eager").sum()

    torch.func.vmap(torch.func.grad(total))(q, k)


def decode(layer: MemoryCaching, T: int) -> None:
    """A prompt in one mode, its tokens in others."""
    cache, modes = MemoryCache(rewind=random.Random(SEED).choice((0, 3))), [torch.inference_mode, torch.no_grad]
    for number in range(8):
        with modes[number % 2]():
            layer(torch.randn(2, T if number == 0 else 1, 8), past_key_values=cache)
            if number == 4:
                cache.reorder_cache(torch.tensor([1, 0]))
    layer(torch.randn(2, 1, 8), past_key_values=cache)


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_any_order_of_modes_at_one_length(recurrence: str) -> None:
    rng = random.Random(f"{SEED} {recurrence}")
    uses: list[Callable[[MemoryCaching, int], None]] = [validate, evaluate, fake, train, transform, decode]
    for _ in range(1):
        C, T = rng.randint(2, 9), rng.randint(100, 2**12) % 97 + 3
        layer = MemoryCaching(
            8, 2, recurrence=recurrence, aggregation=rng.choice(AGGREGATIONS), segment_length=C, layer_idx=0
        )  # fmt: skip
        order = [*rng.sample(uses, len(uses)), train]
        for use in order:
            try:
                use(layer, T)
            except Exception as error:
                names = ", ".join(one.__name__ for one in order)
                raise AssertionError(f"MCTUNE_SEED={SEED}: {use.__name__} of {names}; T={T}, {layer}") from error


@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_input_has_a_gradient(recurrence: str, aggregation: str) -> None:
    """In one segment, in several, in a packed row; and y asks for one where any input does."""
    for T, segmentation in ((3, "constant"), (9, "constant"), (9, "packed"), (8, "logarithmic"), (1, "constant")):
        tensors = arguments(recurrence, T=T)
        bounds = torch.tensor([0, 4, T], dtype=torch.int32) if segmentation == "packed" else None
        options = dict(recurrence=recurrence, aggregation=aggregation, segment_length=4, segmentation=segmentation)

        run = partial(memory_caching, **options, cu_seqlens=bounds, backend="eager")
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        run(**leaves).sum().backward()
        missing = [name for name, x in leaves.items() if x.grad is None]
        assert not missing, f"{missing} of T={T}, {options}"
        for name, x in tensors.items():
            assert run(**tensors | {name: x.clone().requires_grad_()}).requires_grad, f"{name} of T={T}, {options}"


@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("backend", ("auto", "eager"))
def test_shapes_on_meta(recurrence: str, backend: str) -> None:
    """Where there is no autocast to turn off; also inside the autocast of another device."""
    with torch.device("meta"):
        layer = MemoryCaching(8, 2, recurrence=recurrence, segment_length=4, backend=backend, layer_idx=0)
        x = torch.randn(2, 9, 8)
    for narrow in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            assert layer(x)[0].shape == x.shape
            cache = MemoryCache()
            assert all(layer(x, past_key_values=cache)[0].shape == x.shape for _ in range(2))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_a_token_of_zeros(dtype: torch.dtype) -> None:
    layer, x = MemoryCaching(32, 4, segment_length=8), torch.randn(1, 20, 32)
    x[0, 3] = 0
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = layer(x.requires_grad_())[0]
    y.float().sum().backward()
    assert x.grad is not None and y.isfinite().all()
    size = x.grad.abs().amax(-1)[0]
    assert size[3] < 1e6 * size.median()


@pytest.mark.parametrize("qk_norm", (True, False))
@pytest.mark.parametrize("recurrence", ("dla", "titans"))
def test_a_fresh_deep_layer_is_finite(recurrence: str, qk_norm: bool) -> None:
    rng = random.Random(f"{SEED} {recurrence}")
    for D in (4, 16, 64):
        b, state_init = rng.choice((1, 2, 3, 5, 16)), rng.choice(("independent", "checkpoint"))
        torch.manual_seed(SEED)
        layer = MemoryCaching(
            D, 1, recurrence=recurrence, inner_chunk=b, qk_norm=qk_norm, state_init=state_init, segment_length=256
        )  # fmt: skip
        with torch.no_grad():
            y = layer(torch.randn(1, 400 if D < 64 else 100, D))[0]
        assert y.isfinite().all(), f"MCTUNE_SEED={SEED}: inner_chunk={b}, D={D}, {state_init}"


def test_the_first_eta_follows_chunk_width_and_norm() -> None:
    assert first_eta("titans", 1, 64, 256, True) > first_eta("titans", 64, 64, 256, True)
    assert first_eta("titans", 1, 64, 256, True) > first_eta("titans", 1, 64, 1024, True)
    assert first_eta("titans", 1, 16, 64, False) > first_eta("titans", 1, 64, 256, False)
