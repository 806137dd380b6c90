"""Odd sizes of deep memories: what one kernel serves, whatever segment length and inner chunk it was tuned at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mctune.core.problem import Problem
from mctune.verify.decided import choice_gap
from mctune.verify.inputs import Inputs, make_inputs
from mctune.verify.judge import judge
from mctune.verify.passes import PASSES, Results


@dataclass(frozen=True)
class Case:
    """A problem, the bounds of its packed sequences, and the gates that are left out."""

    problem: Problem
    bounds: tuple[int, ...] | None = None
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.problem} {self.bounds or ''} without {', '.join(self.absent) or 'nothing'}"


def cases(problem: Problem) -> Iterator[Case]:
    """A token; less than an inner chunk or a segment; inner chunks that do not divide segments; gates absent."""

    def sized(B: int, T: int, H: int, C: int | None, b: int, top_k: int = 1, **changes: object) -> Problem:
        ssc = {"top_k": top_k} if problem.reads.sparse else {}
        return problem.replace(B=B, T=T, H=H, segment_length=C, inner_chunk=b, **ssc, **changes)

    gates = problem.writes.gates
    yield Case(sized(1, 1, 1, 24, 8))
    yield Case(sized(1, 3, 1, 24, 8))
    yield Case(sized(2, 59, 2, 24, 16), absent=gates[-1:])
    yield Case(sized(1, 60, 2, 13, 5, 3), absent=gates[:1])
    # More segments than ssc reads or than a tile of logits holds; the exact rule, token by token.
    yield Case(sized(1, 20, 1, 1, 1, 100))
    yield Case(sized(1, 45, 1, 20, 1, 2), absent=gates)
    # An inner chunk longer than a segment.
    yield Case(sized(1, 90, 1, 40, 64, 1))
    yield Case(sized(1, 1, 1, None, 4, segmentation="logarithmic"))
    yield Case(sized(2, 37, 1, None, 6, 2, segmentation="logarithmic"))
    yield Case(sized(1, 53, 1, 24, 7, segmentation="packed"), (0, 0, 5, 5, 52, 53, 53))
    yield Case(sized(1, 50, 3, 7, 3, 4, segmentation="packed"), (0, 1, 1, 32, 38, 50))


def judged(case: Case, seed: int) -> tuple[Inputs, Results]:
    """Inputs, and the oracle's results for them."""
    problem = case.problem
    while True:
        if case.bounds is None and not case.absent:
            whole = judge(problem, seed)
            return whole.inputs, whole.wanted
        inputs = make_inputs(problem, seed)
        inputs = replace(inputs, gates={name: x for name, x in inputs.gates.items() if name not in case.absent})
        if "eta" in case.absent:
            # Steps of 1 diverge unless keys and values are small.
            inputs = replace(inputs, k=0.2 * inputs.k, v=0.2 * inputs.v)
        if case.bounds is not None:
            inputs = replace(inputs, cu_seqlens=torch.tensor(case.bounds, dtype=torch.int32))
        if not problem.reads.sparse or choice_gap(problem, inputs) > 1e-5:
            return inputs, PASSES[problem.pass_].expected(problem, inputs)
        seed += 1
