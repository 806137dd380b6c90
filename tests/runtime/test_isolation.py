"""What is not finite reaches exactly the tokens that see it: outputs and gradients, against the oracle's pattern.

The oracle goes token by token, so it has no mask that a zero could fail to be. A seed of its own in each run, printed
when it fails; ``MCTUNE_SEED`` repeats one.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from calls import arguments, make_call

from mctune import reference
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.api.step import memory_caching_step
from mctune.runtime.memory import LayerMemory

SEED = int(os.environ.get("MCTUNE_SEED", random.SystemRandom().randrange(2**31)))
AGGREGATIONS = ("residual", "grm", "soup", "ssc", "mean")
BAD = (float("nan"), float("inf"), -float("inf"))


def draw(rng: random.Random, recurrence: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    packed, T = rng.random() < 0.5, rng.choice(range(3, 26, 2))  # odd: never a single segment, whose gates are 1
    tensors = arguments(recurrence, B=1 if packed else 2, T=T, H=rng.randint(1, 2), seed=rng.randrange(2**31))
    options: dict[str, Any] = dict(
        recurrence=recurrence,
        aggregation=rng.choice(AGGREGATIONS),
        state_init=rng.choice(("independent", "checkpoint")),
        segment_length=rng.randint(1, min(9, T - 1)),
        inner_chunk=rng.randint(1, 6),
        top_k=rng.randint(1, 3),
    )
    if packed:
        bounds = sorted(rng.randint(0, T) for _ in range(rng.randint(0, 3)))
        options |= dict(segmentation="packed", cu_seqlens=torch.tensor([0, *bounds, T], dtype=torch.int32))
    elif rng.random() < 0.2:
        options["segmentation"] = "logarithmic"
    return tensors, options


def spoil(rng: random.Random, tensors: dict[str, torch.Tensor]) -> str:
    """One entry of one token that is not finite: where."""
    name = rng.choice([name for name in tensors if not name.startswith("W_") and name != "g"])
    x = tensors[name]
    # An infinite key may make a logit of -inf: a gate of 0.
    bad = rng.choice(BAD) if name in ("q", "v", "u") else float("nan")
    place = tuple(rng.randrange(size) for size in x.shape)
    x[place] = bad
    return f"{name}{list(place)} = {bad}"


def pattern(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """bool [B, T, H]: tokens of a head with anything that is not finite."""
    x = torch.zeros_like(like) if x is None else x
    return ~x.isfinite() if x.dim() == 3 else ~x.isfinite().all(-1)


def run(function: Any, tensors: dict[str, torch.Tensor], options: dict[str, Any], dy: torch.Tensor) -> Any:
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y = function(**leaves, **options)
    y.backward(dy.to(y.dtype))
    return y, {name: x.grad for name, x in leaves.items()}


@pytest.mark.parametrize("recurrence", ("linear", "swla", "dla", "titans"))
def test_outputs_and_gradients(recurrence: str) -> None:
    rng = random.Random(f"{SEED} {recurrence}")
    for case in range(5):
        tensors, options = draw(rng, recurrence)
        dy = torch.randn(tensors["v"].shape, generator=torch.Generator().manual_seed(case))
        where = spoil(rng, tensors if rng.random() < 0.8 else {"q": dy})
        said = f"MCTUNE_SEED={SEED}, case {case}: {where} of {options}"
        y, grads = run(lambda **x: memory_caching(**x, backend="eager"), tensors, options, dy)
        expected, expected_grads = run(reference.memory_caching, tensors, options, dy)
        wrong = pattern(y, y) != pattern(expected, expected)
        assert not wrong.any(), f"{said}: y differs at {wrong.nonzero().tolist()[:5]}"
        for name, x in tensors.items():
            if not name.startswith("W_"):
                found, right = pattern(grads[name], x), pattern(expected_grads[name], x)
                # The oracle multiplies what ssc does not choose by a gradient of zero.
                wrong = found & ~right if options["aggregation"] == "ssc" else found != right
                assert not wrong.any(), f"{said}: d{name}: {wrong.nonzero().tolist()[:5]}"


@pytest.mark.parametrize("recurrence", ("swla", "titans"))
def test_a_decay_that_is_nan(recurrence: str) -> None:
    """Seen by whoever sees the strength of the same token's write; the oracle takes no such decay."""
    rng = random.Random(f"{SEED} {recurrence} g")
    for _ in range(3):
        tensors, options = draw(rng, recurrence)
        like = tensors[{"swla": "lam", "titans": "eta"}[recurrence]].clone()
        place = tuple(rng.randrange(size) for size in like.shape)
        like[place] = tensors["g"][place] = float("nan")
        y = memory_caching(**tensors, **options, backend="eager")
        tensors["g"] = tensors["g"].nan_to_num()
        expected = reference.memory_caching(**tensors | {"lam" if recurrence == "swla" else "eta": like}, **options)
        wrong = pattern(y, y) != pattern(expected, expected)
        assert not wrong.any(), f"MCTUNE_SEED={SEED}: g{place} of {options}: {wrong.nonzero().tolist()[:5]}"


@pytest.mark.parametrize("recurrence", ("linear", "swla", "dla", "titans"))
def test_decoding(recurrence: str) -> None:
    """Token by token or in pieces, over a memory, as all tokens at once."""
    rng = random.Random(f"{SEED} {recurrence} decode")
    for case in range(3):
        tensors, options = draw(rng, recurrence)
        for name in ("segmentation", "cu_seqlens"):
            options.pop(name, None)
        where = spoil(rng, tensors)
        expected = reference.memory_caching(**tensors, **options)
        weights = {name: x for name, x in tensors.items() if name.startswith("W_")}
        rows = {name: x for name, x in tensors.items() if name not in weights}
        memory = LayerMemory.empty(make_call(**tensors, **options), len(tensors["q"]))
        outputs, begin, T = [], 0, tensors["q"].shape[1]
        while begin < T:
            end = min(T, begin + rng.choice((1, 1, 2, 7)))
            piece = {name: x[:, begin:end] for name, x in rows.items()}
            outputs.append(memory_caching_step(**piece, **weights, memory=memory, **options, backend="eager"))
            begin = end
        wrong = pattern(y := torch.cat(outputs, 1), y) != pattern(expected, expected)
        said = f"MCTUNE_SEED={SEED}, case {case}: {where} of {options}"
        assert not wrong.any(), f"{said}: y differs at {wrong.nonzero().tolist()[:5]}"
