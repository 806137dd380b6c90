"""What is not finite reaches exactly the tokens that see it, in the CPU's kernels of deep memories.

The pattern is that of the eager path, which is held to the oracle (``tests/runtime/test_isolation.py``).

A seed of its own in each run, printed when it fails; ``MCTUNE_SEED`` repeats one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mctune.backends.protocol import Kernel
from mctune.core.problem import Problem
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.call import check_call
from mctune.runtime.memory import LayerMemory
from mctune.runtime.options import NAMES, Options
from mctune.verify.inputs import Inputs, make_inputs
from mctune.verify.kept import segments_of
from mctune.verify.passes import options
from tests import draw_deep as drawn

SEED = int(os.environ.get("MCTUNE_SEED", random.SystemRandom().randrange(2**31)))
DRAWS = int(os.environ.get("MCTUNE_DRAWS", "6"))

Tensor = torch.Tensor
Build = Callable[..., Kernel]


def draw(rng: random.Random, one: drawn.Wanted) -> tuple[Problem, Inputs]:
    """A problem that the kernel serves, of several segments, and finite arguments."""
    C, ssc = rng.choice((5, 13, 24)), {"top_k": 2} if one.problem.reads.sparse else {}
    sizes = dict(T=rng.randint(C + 1, C + 30), H=1, segment_length=C, inner_chunk=rng.choice((1, 3, 8, 40)), **ssc)
    problem = one.problem.replace(**sizes)
    return problem, make_inputs(problem, rng.randrange(2**31))


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """Of tokens."""
    return {"q": inputs.q, "k": inputs.k, "v": inputs.v, "u": inputs.u, **inputs.gates}


def spoil(rng: random.Random, tensors: dict[str, Tensor]) -> str:
    """Make one entry NaN, and say where."""
    name = rng.choice(list(tensors))
    place = tuple(rng.randrange(size) for size in tensors[name].shape)
    tensors[name][place] = float("nan")
    return f"{name}{list(place)}"


def pattern(x: Tensor) -> list[int]:
    """The tokens of one head's array, [1, T, 1, D] or [1, T, 1], with anything that is not finite."""
    bad: list[int] = (~x.isfinite()).flatten(2).any(-1)[0].nonzero()[:, 0].tolist()
    return bad


@pytest.mark.parametrize("one", drawn.ordinary("forward"))
def test_forward(one: drawn.Wanted, build: Build) -> None:
    kernel, rng = build(one.problem, one.config, one.target), random.Random(f"{SEED} {one}")
    for _ in range(DRAWS):
        problem, inputs = draw(rng, one)
        where = spoil(rng, tensors_of(inputs))
        named = options(problem, inputs) | {"segments": segments_of(problem, inputs)}
        found = pattern(kernel(inputs.q, inputs.k, inputs.v, inputs.u, **named).y)
        right = pattern(memory_caching(**inputs.arguments(problem), backend="eager"))
        assert found == right, f"MCTUNE_SEED={SEED}: {where} of {problem}"


@pytest.mark.parametrize("one", drawn.ordinary("decode"))
def test_decode(one: drawn.Wanted, build: Build) -> None:
    kernel, rng = build(one.problem, one.config, one.target), random.Random(f"{SEED} {one} decode")
    for _ in range(DRAWS):
        problem, inputs = draw(rng, one)
        where = spoil(rng, tensors_of(inputs))
        arguments = inputs.arguments(problem)
        chosen = Options(**{name: arguments[name] for name in NAMES if name in arguments})
        gates = dict.fromkeys(("g", "beta", "lam", "eta", "mu")) | inputs.gates
        call = check_call(inputs.q, inputs.k, inputs.v, inputs.u, chosen, gates=gates, **inputs.weights)
        memory, outputs, begin = LayerMemory.empty(call, 1), [], 0
        memory.reserve(problem.T)
        while begin < problem.T:
            end = min(problem.T, begin + rng.choice((1, 3, 9)))
            part = [x[:, begin:end].contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.u)]
            named = options(problem, inputs, slice(begin, end))
            outputs.append(kernel(*part, **named, segment_length=problem.segment_length, memory=memory))
            memory.advance(end - begin, problem.segment_length or 1)
            begin = end
        found = pattern(torch.cat(outputs, 1))
        right = pattern(memory_caching(**arguments, backend="eager"))
        assert found == right, f"MCTUNE_SEED={SEED}: {where} of {problem}"


@pytest.mark.parametrize("one", drawn.ordinary("backward"))
def test_backward(one: drawn.Wanted, build: Build) -> None:
    kernel, rng = build(one.problem, one.config, one.target), random.Random(f"{SEED} {one} backward")
    for _ in range(DRAWS):
        problem, inputs = draw(rng, one)
        where = spoil(rng, tensors_of(inputs) | {"dy": inputs.dy})
        leaves = {name: x.clone().requires_grad_() for name, x in (tensors_of(inputs) | inputs.weights).items()}
        arguments: dict[str, Any] = inputs.arguments(problem) | leaves
        memory_caching(**arguments, backend="eager").backward(inputs.dy)
        named = options(problem, inputs) | {"segments": segments_of(problem, inputs), "kept": {}}
        found = kernel(inputs.dy, inputs.q, inputs.k, inputs.v, inputs.u, **named)
        for name in (*(name for name in "qkv"), *(("u",) if problem.reads.routed else ()), *inputs.gates):
            gradient = leaves[name].grad
            assert gradient is not None
            right, ours = set(pattern(gradient)), set(pattern(getattr(found, name)))
            said = f"MCTUNE_SEED={SEED}: {where} of {problem}: d{name}"
            assert ours <= right, f"{said} of {sorted(ours - right)[:5]} is not finite"
            # Of logits that are all NaN, any are chosen.
            if not (problem.reads.sparse and where.startswith("u")):
                assert right <= ours, f"{said} of {sorted(right - ours)[:5]} is finite"
