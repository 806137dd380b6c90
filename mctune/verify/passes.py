"""What each pass is given, what a compiled candidate computes from it, and what the oracle expects.

``PASSES`` has one row for each pass. Results are named arrays: y of a forward; dq, dk, ... of a backward; y and the
memory that is left of a decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mctune.backends.protocol import Kernel
from mctune.core.problem import Problem
from mctune.reference import memory_caching
from mctune.runtime.cache.prefill import remember
from mctune.runtime.kernels.kept import Names
from mctune.runtime.memory import LayerMemory
from mctune.runtime.traits import gates_of
from mctune.verify import kept
from mctune.verify.inputs import Inputs, call_of
from mctune.verify.kept import oracle_states, segments_of

Tensor = torch.Tensor
Results = Mapping[str, Tensor]
BLOCK = 7
"""Tokens that a decode candidate is verified on: the first alone, the others as one block."""


@dataclass(frozen=True)
class Pass:
    """One pass.

    Attributes:
        expected: the oracle's results, float64.
        run: a candidate's results.
    """

    expected: Callable[[Problem, Inputs], Results]
    run: Callable[[Kernel, Problem, Inputs], Results]


def options(problem: Problem, inputs: Inputs, tokens: slice = slice(None)) -> dict[str, Any]:
    """Keyword arguments that the launchers of every pass of a family share."""
    gates = {name: inputs.gates.get(name) for name in gates_of(problem.writes.family)}
    found: dict[str, Any] = {
        name: None if gate is None else gate[:, tokens].contiguous() for name, gate in gates.items()
    }
    found |= {"scale": problem.Dk**-0.5, "top_k": problem.top_k or 1}
    if problem.deep:
        found |= {**inputs.weights, "memory_residual": problem.Dk == problem.Dv, "inner_chunk": problem.inner_chunk}
    return found


# --- forward


def _forward_expected(problem: Problem, inputs: Inputs) -> Results:
    with torch.no_grad():
        return {"y": memory_caching(**inputs.arguments(problem)), **kept.expected(problem, inputs)}


def _forward_run(kernel: Kernel, problem: Problem, inputs: Inputs) -> Results:
    inputs, keep = inputs.to(kernel.device), kept.checked_names(kernel, problem)
    keywords = {**options(problem, inputs), "segments": segments_of(problem, inputs), "keep": keep}
    found = kernel(inputs.q, inputs.k, inputs.v, inputs.u, **keywords)
    return {"y": found.y, **kept.comparable(problem, inputs, found.kept)}


# --- backward


def gradients(operation: Callable[..., Tensor], problem: Problem, inputs: Inputs, dtype: torch.dtype) -> Results:
    """The gradients of ``operation`` by autograd, called like ``memory_caching``, on inputs converted to ``dtype``."""
    leaves = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "u": inputs.u, **inputs.gates, **inputs.weights}
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    with torch.enable_grad():
        y = operation(**{**inputs.arguments(problem), **leaves})
        found = torch.autograd.grad(y, list(leaves.values()), inputs.dy.to(dtype), materialize_grads=True)
    return {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def _backward_expected(problem: Problem, inputs: Inputs) -> Results:
    return gradients(memory_caching, problem, inputs, torch.float64)


def _backward_run(kernel: Kernel, problem: Problem, inputs: Inputs) -> Results:
    given = kept.kept_by(problem, inputs, wants(kernel, problem))
    inputs = inputs.to(kernel.device)
    given = {name: x.to(kernel.device) for name, x in given.items()}
    keywords = {**options(problem, inputs), "segments": segments_of(problem, inputs), "kept": given}
    return gradients_of(kernel(inputs.dy, inputs.q, inputs.k, inputs.v, inputs.u, **keywords), inputs)


def gradients_of(found: Any, inputs: Inputs) -> Results:
    """What a backward kernel returned, by name."""
    made = {f"d{name}": getattr(found, name) for name in ("q", "k", "v", "u", *inputs.gates, *inputs.weights)}
    # Where gates do not depend on u, its gradient is zero, and a kernel need not write it.
    return {name: torch.zeros_like(inputs.u) if dx is None else dx for name, dx in made.items()}


def wants(kernel: Kernel, problem: Problem) -> Names:
    """What a backward candidate is given from its forward: everything that it was tuned for, if anything is kept."""
    if problem.segmentation == "logarithmic":
        return ()
    return tuple(name for group in kernel.wants for name in group)


# --- decode: the last tokens of a row, after a memory of those before them


def _decode_expected(problem: Problem, inputs: Inputs) -> Results:
    after = memory_of(problem, inputs, problem.T, torch.float64)
    with torch.no_grad():
        y = memory_caching(**inputs.arguments(problem))
    return {"y": y[:, problem.T - min(problem.T, BLOCK) :], **left(after)}


def _decode_run(kernel: Kernel, problem: Problem, inputs: Inputs) -> Results:
    T, C = problem.T, problem.segment_length or 1
    first = T - min(T, BLOCK)
    memory, inputs = memory_of(problem, inputs, first).to(kernel.device), inputs.to(kernel.device)
    parts = []
    for begin, end in ((first, first + 1), (first + 1, T)):
        if begin < end:
            parts.append(_decode(kernel, problem, inputs, slice(begin, end), memory))
            memory.advance(end - begin, C)
    return {"y": torch.cat(parts, 1), **left(memory)}


def _decode(kernel: Kernel, problem: Problem, inputs: Inputs, tokens: slice, memory: LayerMemory) -> Tensor:
    keywords = {**options(problem, inputs, tokens), "segment_length": problem.segment_length, "memory": memory}
    q, k, v, u = (x[:, tokens].contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.u))
    y: Tensor = kernel(q, k, v, u, **keywords)
    return y


def memory_of(problem: Problem, inputs: Inputs, tokens: int, dtype: torch.dtype = torch.float32) -> LayerMemory:
    """What a layer remembers after the first ``tokens`` tokens, by the oracle; unused states hold NaN."""
    C, T = problem.segment_length or 1, problem.T
    memory = empty_memory(problem, inputs.q.shape[0], T // C + 1, dtype)
    for store in memory.states:
        store.fill_(float("nan"))
    memory.descriptors.fill_(float("nan"))
    layers = tuple(W.to(dtype) for W in inputs.weights.values())
    memory = replace(memory, initial=layers)
    for online, W in zip(memory.online, layers, strict=False):
        online.copy_(W.expand_as(online))
    if tokens == 0:
        return memory
    states, means = oracle_states(problem, inputs, tokens)
    cached, filled = divmod(tokens, C)
    for store, ends in zip(memory.states, states, strict=True):
        store[:, :, :cached] = ends[:, :cached].transpose(1, 2)
    memory.descriptors[:, :, :cached] = means[:, :cached].transpose(1, 2)
    if filled or problem.state_init == "checkpoint":
        for online, ends in zip(memory.online, states, strict=True):
            online.copy_(ends[:, -1])
        _enter(problem, inputs, tokens, memory)
        memory.last_key.copy_(inputs.k[:, tokens - 1])
        memory.last_value.copy_(inputs.v[:, tokens - 1])
    if filled:
        memory.key_sum.copy_(means[:, -1] * filled)
    memory.advance(tokens, C)
    return memory


def _enter(problem: Problem, inputs: Inputs, tokens: int, memory: LayerMemory) -> None:
    """S of a deep memory after its first tokens, and the state that entered the inner chunk under way.

    By the eager path in float64: the oracle shows neither.
    """
    if not problem.deep:
        return
    part = call_of(problem, inputs, slice(0, tokens), torch.float64)
    found = remember(part)
    for store, x in zip((*memory.start, *memory.momentum), (*found.start, *found.momentum), strict=True):
        store.copy_(x)


def empty_memory(problem: Problem, B: int, capacity: int, dtype: torch.dtype = torch.float32) -> LayerMemory:
    """A memory of ``B`` sequences without a token, with room for ``capacity`` states."""
    H, Dk, Dv = problem.H, problem.Dk, problem.Dv
    layers = problem.layers

    def states(*shape: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(B, H, *shape, *layer, dtype=dtype) for layer in layers)

    return LayerMemory(
        states=states(capacity),
        descriptors=torch.zeros(B, H, capacity, Dk, dtype=dtype),
        online=states(),
        key_sum=torch.zeros(B, H, Dk, dtype=dtype),
        last_key=torch.zeros(B, H, Dk, dtype=dtype),
        last_value=torch.zeros(B, H, Dv, dtype=dtype),
        start=states() if problem.deep else (),
        momentum=states() if problem.deep else (),
        cached=torch.zeros(B, dtype=torch.int32),
        filled=torch.zeros(B, dtype=torch.int32),
    )


def left(memory: LayerMemory) -> dict[str, Tensor]:
    """What is left behind, the cached states in use."""
    used = int(memory.cached[0])
    found = {"descriptors": memory.descriptors[:, :, :used], "key_sum": memory.key_sum}
    for number, (store, online) in enumerate(zip(memory.states, memory.online, strict=True)):
        name = f" {number}" if number else ""
        found |= {f"states{name}": store[:, :, :used], f"online{name}": online}
    return found | {f"momentum {number}": x for number, x in enumerate(memory.momentum)}


PASSES = {
    "forward": Pass(_forward_expected, _forward_run),
    "backward": Pass(_backward_expected, _backward_run),
    "decode": Pass(_decode_expected, _decode_run),
}
