"""Decode kernels at work: blocks of tokens over caches that stand at odd places, and what they must leave behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from mctune.backends.protocol import Kernel
from mctune.core.problem import Problem
from mctune.reference import error_ratio
from mctune.runtime.memory import LayerMemory
from mctune.runtime.traits import gates_of
from mctune.verify.inputs import Inputs
from mctune.verify.judge import tolerance
from mctune.verify.passes import memory_of

Tensor = torch.Tensor
_LAYERED = ("states", "online", "start", "momentum")


@dataclass(frozen=True)
class Case:
    """Sequences with ``starts`` tokens each, extended by blocks of so many tokens."""

    problem: Problem
    starts: tuple[int, ...]
    blocks: tuple[int, ...]

    @property
    def added(self) -> int:
        return sum(self.blocks)


def case(
    problem: Problem, C: int, starts: Sequence[int], blocks: Sequence[int], H: int, top_k: int, b: int | None = None
) -> Case:
    sizes = {"top_k": top_k} if problem.reads.sparse else {}
    sizes |= {"inner_chunk": b} if b is not None else {}
    T = max(starts) + sum(blocks)
    return Case(problem.replace(B=len(starts), T=T, H=H, segment_length=C, **sizes), tuple(starts), tuple(blocks))


def sequence(inputs: Inputs, row: int) -> Inputs:
    """One row alone."""
    gates = {name: gate[row : row + 1] for name, gate in inputs.gates.items()}
    q, k, v, u = (x[row : row + 1] for x in (inputs.q, inputs.k, inputs.v, inputs.u))
    return replace(inputs, q=q, k=k, v=v, u=u, gates=gates)


def remembered(of: Case, inputs: Inputs, more: int, dtype: torch.dtype) -> LayerMemory:
    """What the oracle leaves ``more`` tokens after each start: room for exactly what is to come, NaN in it."""
    rows = [memory_of(of.problem, sequence(inputs, row), n + more, dtype) for row, n in enumerate(of.starts)]
    C = of.problem.segment_length
    assert C is not None
    capacity = max(1, max((n + of.added) // C for n in of.starts))

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(row, name) for row in rows])

    def layers(name: str) -> tuple[Tensor, ...]:
        return tuple(torch.cat(parts) for parts in zip(*(getattr(row, name) for row in rows), strict=True))

    found = {name: layers(name) for name in _LAYERED}
    found["states"] = tuple(x[:, :, :capacity].contiguous() for x in found["states"])
    return replace(
        rows[0],
        descriptors=joined("descriptors")[:, :, :capacity].contiguous(),
        **found,
        **{name: joined(name) for name in ("key_sum", "last_key", "last_value", "cached", "filled")},
        dropped=torch.zeros(len(rows), dtype=torch.int32),
    )


def shifted(of: Case, x: Tensor, begin: int, n: int) -> Tensor:
    """Tokens ``begin`` to ``begin + n`` after each sequence's start."""
    return torch.stack([x[row, start + begin : start + begin + n] for row, start in enumerate(of.starts)])


def extend(kernel: Kernel, of: Case, inputs: Inputs, memory: LayerMemory, begin: int, n: int) -> Tensor:
    """y of the next n tokens of every sequence."""
    problem = of.problem
    q, k, v, u = (shifted(of, x, begin, n) for x in (inputs.q, inputs.k, inputs.v, inputs.u))
    gates = {name: inputs.gates.get(name) for name in gates_of(problem.writes.family)}
    layers: dict[str, object] = {}
    if problem.deep:
        residual = problem.Dk == problem.Dv
        layers = {**inputs.weights, "memory_residual": residual, "inner_chunk": problem.inner_chunk}
    counts = memory.cached.clone(), memory.filled.clone()
    y: Tensor = kernel(
        q, k, v, u,
        **{name: None if gate is None else shifted(of, gate, begin, n) for name, gate in gates.items()}, **layers,
        scale=problem.Dk**-0.5, top_k=problem.top_k or 1, segment_length=problem.segment_length, memory=memory,
    )  # fmt: skip
    assert torch.equal(counts[0], memory.cached) and torch.equal(counts[1], memory.filled)
    assert problem.segment_length is not None
    memory.advance(n, problem.segment_length)
    return y


def hold(of: Case, memory: LayerMemory, wanted: LayerMemory) -> None:
    """What is left behind is right; what no token reached is as it was."""
    limit = tolerance(of.problem)
    assert torch.equal(memory.cached, wanted.cached) and torch.equal(memory.filled, wanted.filled)

    def near(found: Tensor, right: Tensor) -> None:
        if bool((right == 0).all()):
            assert torch.equal(found.double(), right), of
        else:
            assert error_ratio(found, right) <= limit, of

    stored = zip((*memory.states, memory.descriptors), (*wanted.states, wanted.descriptors), strict=True)
    for found, right in stored:
        for row, used in enumerate(wanted.cached.tolist()):
            assert bool(found[row, :, used:].isnan().all()), of
            if used:
                near(found[row, :, :used], right[row, :, :used])
    for row, filled in enumerate(wanted.filled.tolist()):
        near(memory.key_sum[row], wanted.key_sum[row])
        for found, right in zip(memory.online, wanted.online, strict=True):
            near(found[row], right[row])
        if of.problem.writes.momentum:
            for found, right in zip(memory.momentum, wanted.momentum, strict=True):
                near(found[row], right[row])
        # Where an inner chunk has ended, what entered it has no use any more.
        if of.problem.deep and filled % (of.problem.inner_chunk or 1):
            for found, right in zip(memory.start, wanted.start, strict=True):
                near(found[row], right[row])
    if of.problem.writes.convolves:
        assert torch.equal(memory.last_key.double(), wanted.last_key)
        assert torch.equal(memory.last_value.double(), wanted.last_value)


def moved(function: Callable[..., None], offset: int) -> Callable[..., None]:
    """``function`` called on copies of its arrays ``offset`` elements past where an allocation begins."""

    def call(*arguments: object) -> None:
        copies = [
            x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x) if isinstance(x, Tensor) else x
            for x in arguments
        ]
        function(*copies)
        for argument, copy in zip(arguments, copies, strict=True):
            if isinstance(argument, Tensor):
                argument.copy_(copy)

    return call
