"""Random arguments of a problem, and the odd-sized problems that a candidate is verified on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from mctune.core.problem import Problem
from mctune.runtime.call import GATES, Call, check_call
from mctune.runtime.options import NAMES, Options

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LONGEST = 1023


@dataclass(frozen=True)
class Inputs:
    """Arguments of ``memory_caching``: arrays as in its docstring; ``gates`` are those that the recurrence takes.

    ``dy``, [B, T, H, Dv], is the gradient of y that a backward pass starts from.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    u: torch.Tensor
    gates: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    cu_seqlens: torch.Tensor | None
    dy: torch.Tensor

    def to(self, device: str) -> Inputs:
        """The same on a device; ``cu_seqlens`` stays on the CPU."""

        def moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: x.to(device) for name, x in tensors.items()}

        own = {name: getattr(self, name).to(device) for name in ("q", "k", "v", "u", "dy")}
        return replace(self, **own, gates=moved(self.gates), weights=moved(self.weights))

    def to_dict(self) -> dict[str, Any]:
        """Its fields, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def arguments(self, problem: Problem) -> dict[str, Any]:
        """Every keyword argument of ``memory_caching``, the oracle's or the runtime's, for this problem."""
        options = {
            "recurrence": problem.recurrence,
            "aggregation": problem.aggregation,
            "segmentation": problem.segmentation,
            "state_init": problem.state_init,
            "cu_seqlens": self.cu_seqlens,
            "memory_residual": problem.Dk == problem.Dv,
        }
        for name in ("segment_length", "top_k", "inner_chunk"):
            if getattr(problem, name) is not None:
                options[name] = getattr(problem, name)
        return {"q": self.q, "k": self.k, "v": self.v, "u": self.u, **options, **self.gates, **self.weights}


def make_inputs(problem: Problem, seed: int) -> Inputs:
    """Fresh arguments for a problem, arrays in its dtype, gates and deep memories' weights in float32.

    q and k have mean 1, so that no q . k is close to 0: at T = 1 the output is (q . k) v, whose relative error against
    an exact result would be unbounded for any implementation. Deep memories take steps that do not diverge: small keys
    and small eta. Packed rows are cut at random, empty sequences included.
    """
    generator = torch.Generator().manual_seed(seed)
    B, T, H = problem.B, problem.T, problem.H
    dtype = _DTYPES[problem.dtype]
    size = problem.Dk**-0.5 if problem.deep else 1.0

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform() -> torch.Tensor:
        return torch.rand(B, T, H, generator=generator)

    gates = {
        # Of -0.2 both layers of a deep memory are gone in 100 tokens, and float16 has no digits for what is left.
        "g": (-0.02 if problem.deep else -0.2) * uniform(),
        "beta": uniform(),
        "lam": uniform() + 0.5,
        # Of 0.1 heads of 128 make too much: dla's y grows to 1e5 in 512 tokens. titans' squared loss overshoots to NaN
        # of 0.05, unless memories decay faster than that.
        "eta": (0.0125 if problem.writes.momentum else 0.03) * uniform(),
        "mu": 0.5 * uniform(),
    }
    weights = {}
    if problem.deep:
        weights = {
            "W_up": normal(H, problem.Dk, problem.E) * problem.Dk**-0.5,
            "W_down": normal(H, problem.E, problem.Dv) * problem.E**-0.5,
        }
    cu_seqlens = None
    if problem.segmentation == "packed":
        cuts = torch.randint(0, T + 1, (min(4, T),), generator=generator)
        cu_seqlens = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([T])]).to(torch.int32)
    return Inputs(
        q=((normal(B, T, H, problem.Dk) + 1) * size).to(dtype),
        k=((normal(B, T, H, problem.Dk) + 1) * size).to(dtype),
        v=normal(B, T, H, problem.Dv).to(dtype),
        u=(normal(B, T, H, problem.Dk) * problem.Dk**-0.25).to(dtype),
        gates={name: gates[name] for name in problem.writes.gates},
        weights=weights,
        cu_seqlens=cu_seqlens,
        dy=(normal(B, T, H, problem.Dv) + 1).to(dtype),
    )


def judged(problem: Problem) -> Problem:
    """The problem in a dtype that Triton's interpreter computes: its products of bfloat16 are wrong (triton #11584)."""
    return problem.replace(dtype="float16") if problem.dtype == "bfloat16" else problem


def odd_problems(problem: Problem) -> tuple[Problem, ...]:
    """Small relatives of a problem: one token; less than a segment; more segments than ssc reads, and B * H over 4.

    They stay cheap for the oracle, which goes token by token, and for Triton's interpreter: the last one's segments are
    at most 64 tokens, of a deep memory two inner chunks, and what is less than a segment is at most ``_LONGEST``.
    """
    segment = problem.segment_length or 32
    short = min(segment, 64, 2 * (problem.inner_chunk or 64))
    B, H = (1, 5) if problem.segmentation == "packed" else (2, 3)
    many = problem.replace(B=B, T=((problem.top_k or 2) + 3) * short + short // 2 + 1, H=H)
    return (
        problem.replace(B=1, T=1, H=1),
        problem.replace(B=1, T=min(max(1, segment - 1), _LONGEST), H=1),
        many.replace(segment_length=problem.segment_length and short),
    )


def sized_problems(problem: Problem) -> tuple[Problem, ...]:
    """Those that a candidate is held to at size: the problem itself; and several of its segments, if it has fewer."""
    C = problem.segment_length
    if C is None or problem.T > 2 * C:
        return (problem,)
    return problem, problem.replace(B=1, T=2 * C + 1, H=1)


def call_of(
    problem: Problem, inputs: Inputs, tokens: slice, dtype: torch.dtype, cu_seqlens: torch.Tensor | None = None
) -> Call:
    """The call of ``memory_caching`` on some tokens of each row, in ``dtype``."""
    arguments = inputs.arguments(problem)
    chosen = Options(**{name: arguments[name] for name in NAMES if name in arguments})
    gates: dict[str, torch.Tensor | None] = dict.fromkeys(GATES)
    gates |= {name: x[:, tokens] for name, x in inputs.gates.items()}
    q, k, v, u = (x[:, tokens].to(dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.u))
    return check_call(q, k, v, u, chosen, gates=gates, cu_seqlens=cu_seqlens, **inputs.weights)
