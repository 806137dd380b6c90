"""Random arguments of a problem, and the odd-sized problems that a candidate is verified on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mctune.core.problem import Problem

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Inputs:
    """Arguments of ``memory_caching``: arrays as in its docstring; absent ones are ``None``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    u: torch.Tensor
    g: torch.Tensor | None
    beta: torch.Tensor | None
    lam: torch.Tensor | None
    cu_seqlens: torch.Tensor | None


def make_inputs(problem: Problem, seed: int) -> Inputs:
    """Fresh arguments for a problem with a matrix-valued memory (linear, swla), in the problem's dtype.

    q and k have mean 1, so that no q . k is close to 0: at T = 1 the output is (q . k) v, and its relative error against
    an exact result would be unbounded for any implementation. Packed rows are cut at random, empty sequences included.
    """
    generator = torch.Generator().manual_seed(seed)
    B, T, H = problem.B, problem.T, problem.H
    dtype = _DTYPES[problem.dtype]

    def normal(width: int, mean: float) -> torch.Tensor:
        return (torch.randn(B, T, H, width, generator=generator) + mean).to(dtype)

    def uniform() -> torch.Tensor:
        return torch.rand(B, T, H, generator=generator)

    swla = problem.recurrence == "swla"
    cu_seqlens = None
    if problem.segmentation == "packed":
        cuts = torch.randint(0, T + 1, (min(4, T),), generator=generator)
        cu_seqlens = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([T])]).to(torch.int32)
    return Inputs(
        q=normal(problem.Dk, 1.0),
        k=normal(problem.Dk, 1.0),
        v=normal(problem.Dv, 0.0),
        u=normal(problem.Dk, 0.0) * problem.Dk**-0.25,
        g=-0.2 * uniform() if swla else None,
        beta=uniform() if swla else None,
        lam=uniform() + 0.5 if swla else None,
        cu_seqlens=cu_seqlens,
    )


def odd_problems(problem: Problem) -> tuple[Problem, ...]:
    """Small relatives of a problem: one token; less than a segment; more segments than ssc reads, and B * H over 1.

    The last one's segments are at most 64 tokens, so that many of them stay cheap for the oracle.
    """
    segment = problem.segment_length or 32
    short = min(segment, 64)
    batch = 1 if problem.segmentation == "packed" else 2
    many = problem.replace(B=batch, T=((problem.top_k or 2) + 3) * short + short // 2 + 1, H=2)
    return (
        problem.replace(B=1, T=1, H=1),
        problem.replace(B=1, T=max(1, segment - 1), H=1),
        many.replace(segment_length=problem.segment_length and short),
    )
