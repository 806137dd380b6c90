"""What is not finite reaches exactly the tokens that see it, on the CPU's kernels too: the pattern is the oracle's.

A seed of its own in each run, printed when it fails; ``MCTUNE_SEED`` repeats one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path
from typing import Any

import pytest
import torch

from mctune import reference
from mctune.backends.tvm import TvmBackend
from mctune.core.problem import Problem
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.call import check_call
from mctune.runtime.kernels.tvm.matrix.forward import TvmForward
from mctune.runtime.memory import LayerMemory
from mctune.runtime.options import Options
from mctune.runtime.segments import make_segments
from tests.draw import wanted, wanted_for

SEED = int(os.environ.get("MCTUNE_SEED", random.SystemRandom().randrange(2**31)))
PROBLEMS = (("linear", "grm", "independent"), ("swla", "ssc", "checkpoint"), ("swla", "grm", "independent"))
BACKWARDS = (
    ("linear", "grm", "checkpoint", "per_segment"),
    ("swla", "grm", "checkpoint", "per_segment"),
    ("linear", "ssc", "independent", "per_segment"),
    ("swla", "ssc", "independent", "gather"),
)
GATES = ("g", "beta", "lam")


def draw(rng: random.Random, problem: Problem, T: int, *, spoiled: bool = True) -> tuple[dict[str, torch.Tensor], str]:
    """Arguments, with one entry of one token that is not finite, and where."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    widths = {"q": problem.Dk, "k": problem.Dk, "v": problem.Dv, "u": problem.Dk}
    tensors = {name: torch.randn(1, T, 1, width, generator=generator) for name, width in widths.items()}
    if problem.recurrence == "swla":
        gates = torch.rand(3, 1, T, 1, generator=generator)
        tensors |= {"g": -0.1 * gates[0], "beta": gates[1], "lam": gates[2]}
    return tensors, spoil(rng, tensors) if spoiled else ""


def spoil(rng: random.Random, tensors: dict[str, torch.Tensor]) -> str:
    """Make one entry NaN, and say where."""
    name = rng.choice(list(tensors))
    x = tensors[name]
    place = tuple(rng.randrange(size) for size in x.shape)
    x[place] = float("nan")
    return f"{name}{list(place)}"


def oracle(tensors: dict[str, torch.Tensor], problem: Problem, C: int) -> torch.Tensor:
    """y of the oracle, which takes no decay that is NaN: whoever sees that sees the strength of the token's write."""
    p = problem
    if p.recurrence == "swla":
        lam = tensors["lam"].masked_fill(tensors["g"].isnan(), float("nan"))
        tensors = tensors | {"g": tensors["g"].nan_to_num(), "lam": lam}
    options: dict[str, Any] = dict(recurrence=p.recurrence, aggregation=p.aggregation, state_init=p.state_init)
    return reference.memory_caching(**tensors, **options, segment_length=C, top_k=2)


def pattern(x: torch.Tensor) -> list[int]:
    """The tokens of one head's array, [1, T, 1, D] or [1, T, 1], with anything that is not finite."""
    bad: list[int] = (~x.isfinite()).flatten(2).any(-1)[0].nonzero()[:, 0].tolist()
    return bad


@pytest.mark.parametrize(("recurrence", "aggregation", "state_init"), PROBLEMS)
def test_forward(recurrence: str, aggregation: str, state_init: str, build: Callable[..., TvmForward]) -> None:
    one = wanted_for("forward", recurrence, aggregation, state_init)
    kernel = build(one.problem, one.config, one.target)
    rng = random.Random(f"{SEED} {recurrence} {aggregation}")
    for _ in range(8):
        T, C = rng.randint(2, 90), rng.choice((5, 24, 64))
        tensors, where = draw(rng, one.problem, T)
        arguments = {name: tensors.get(name) for name in ("q", "k", "v", "u", *GATES)}
        segments = make_segments(T, "constant", C)
        y = kernel(**arguments, scale=one.problem.Dk**-0.5, top_k=2, segments=segments).y
        found, right = pattern(y), pattern(oracle(tensors, one.problem, C))
        assert found == right, f"MCTUNE_SEED={SEED}: {where} of T={T}, C={C}"


@pytest.mark.parametrize(("recurrence", "aggregation", "state_init"), PROBLEMS)
def test_decode(recurrence: str, aggregation: str, state_init: str, kernel_folder: Path, scratch: CDLL) -> None:
    one = wanted_for("decode", recurrence, aggregation, state_init)
    backend, p = TvmBackend(), one.problem
    kernel = backend.load(p, one.config, backend.build(p, one.config, one.target, kernel_folder))
    rng = random.Random(f"{SEED} {recurrence} {aggregation} decode")
    for _ in range(8):
        T, C = rng.randint(2, 40), rng.choice((5, 16))
        options = Options(
            recurrence=recurrence, aggregation=aggregation, state_init=state_init, segment_length=C, top_k=2
        )  # fmt: skip
        tensors, where = draw(rng, p, T)
        gates = {name: tensors.get(name) for name in GATES}
        q, k, v, u = (tensors[name] for name in ("q", "k", "v", "u"))
        call = check_call(q, k, v, u, options, gates=gates | {"eta": None, "mu": None})
        memory, outputs, begin = LayerMemory.empty(call, 1), [], 0
        memory.reserve(T)
        while begin < T:
            end = min(T, begin + rng.choice((1, 3, 9)))
            part = {name: x[:, begin:end].contiguous() for name, x in tensors.items()}
            part = {name: part.get(name) for name in ("q", "k", "v", "u", *GATES)}
            outputs.append(kernel(**part, scale=call.scale, top_k=2, segment_length=C, memory=memory))
            memory.advance(end - begin, C)
            begin = end
        found, right = pattern(torch.cat(outputs, 1)), pattern(oracle(tensors, one.problem, C))
        assert found == right, f"MCTUNE_SEED={SEED}: {where} of T={T}, C={C}"


@pytest.mark.parametrize(("recurrence", "aggregation", "state_init", "formulation"), BACKWARDS)
def test_backward(
    recurrence: str, aggregation: str, state_init: str, formulation: str, kernel_folder: Path, scratch: CDLL
) -> None:
    """Gradients: those that the eager path has, which is held to the oracle and takes a decay that is NaN."""
    one = next(
        one for one in wanted("backward")
        if one.combination == (recurrence, aggregation, state_init) and one.formulation == formulation
    )  # fmt: skip
    backend, p = TvmBackend(), one.problem
    kernel = backend.load(p, one.config, backend.build(p, one.config, one.target, kernel_folder))
    rng = random.Random(f"{SEED} {recurrence} {aggregation} backward")
    for _ in range(8):
        C = rng.choice((5, 24, 40))
        T = rng.randint(C + 1, C + 50)  # a single segment's gate is 1 on the eager path
        generator = torch.Generator().manual_seed(T)
        tensors, where = draw(rng, p, T, spoiled=False)
        dy = torch.randn(tensors["v"].shape, generator=generator)
        where = spoil(rng, tensors | {"dy": dy})
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        options: dict[str, Any] = dict(recurrence=recurrence, aggregation=aggregation, state_init=state_init)
        memory_caching(**leaves, **options, segment_length=C, top_k=2, backend="eager").backward(dy)
        arguments = {name: tensors.get(name) for name in ("q", "k", "v", "u", *GATES)}
        segments = make_segments(T, "constant", C)
        found = kernel(dy, **arguments, scale=p.Dk**-0.5, top_k=2, segments=segments, kept={})
        for name in ("q", "k", "v", *(("u",) if p.reads.routed else ()), *(GATES if recurrence == "swla" else ())):
            right, ours = set(pattern(leaves[name].grad)), set(pattern(getattr(found, name)))
            said = f"MCTUNE_SEED={SEED}: {where} of T={T}, C={C}: d{name}"
            # A segment's first decay and beta may have nothing to weigh. Of logits that are all NaN, any are chosen.
            first = set(range(0, T, C)) if name in ("g", "beta") else set()
            assert ours - first <= right, f"{said} of {sorted(ours - right - first)[:5]} is not finite"
            if not (p.reads.sparse and where.startswith("u")):
                assert right - first <= ours, f"{said} of {sorted(right - ours - first)[:5]} is finite"
