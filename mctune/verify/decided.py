"""Inputs whose choice of segments rounding cannot change: where two logits at the edge of ssc's choice are closer than
float32 tells apart, a right kernel may read the other segment."""

from __future__ import annotations

from dataclasses import replace

import torch

from mctune.core.problem import Problem
from mctune.runtime.eager.forward import by_head
from mctune.runtime.segments import Segments
from mctune.verify.inputs import Inputs
from mctune.verify.kept import segments_of

Tensor = torch.Tensor
DRAWS = 50
"""Draws of a token's u, at most."""


def decided(problem: Problem, inputs: Inputs, seed: int, gap: float) -> Inputs:
    """The inputs, u drawn again for every token whose choice is within ``gap`` of another."""
    if not problem.reads.sparse:
        return inputs
    generator = torch.Generator().manual_seed(seed + 1)
    u, segments = inputs.u.clone(), segments_of(problem, inputs)
    means = [means_of(by_head(k[None], torch.float64), segments) for k in inputs.k]
    assert problem.top_k is not None
    for row, head in ((row, head) for row in range(problem.B) for head in range(problem.H)):
        for number, (begin, end, first) in enumerate(segments.spans):
            if number - first <= problem.top_k:
                continue
            own, keys = u[row, begin:end, head], means[row][head, first:number]
            for _ in range(DRAWS):
                tied = gaps(own.double() @ keys.mT, problem.top_k) < gap
                if not bool(tied.any()):
                    break
                fresh = torch.randn(int(tied.sum()), problem.Dk, generator=generator) * problem.Dk**-0.25
                own[tied] = fresh.to(own)
    return replace(inputs, u=u)


def gaps(logits: Tensor, top_k: int) -> Tensor:
    """Between the last logit that is chosen and the first that is not: [..., N] to [...]."""
    best = logits.topk(top_k + 1, dim=-1).values
    return best[..., -2] - best[..., -1]


def means_of(k: Tensor, segments: Segments) -> Tensor:
    """Mean keys of the segments: [heads, T, Dk] to [heads, N, Dk]."""
    return torch.stack([k[:, begin:end].mean(1) for begin, end, _ in segments.spans], 1)


def choice_gap(problem: Problem, inputs: Inputs) -> float:
    """The smallest difference between the last logit that ssc chooses and the first that it leaves."""
    segments, least = segments_of(problem, inputs), float("inf")
    assert problem.top_k is not None
    for u, k in zip(inputs.u, inputs.k, strict=True):
        means = means_of(by_head(k[None], torch.float64), segments)
        for number, (begin, end, first) in enumerate(segments.spans):
            if number - first > problem.top_k:
                logits = by_head(u[None, begin:end], torch.float64) @ means[:, first:number].mT
                least = min(least, float(gaps(logits, problem.top_k).min()))
    return least
