"""Launch the backward kernels of one exported library: states, gradients of the read, of the states, of the writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...segments import Segments
from ...traits import AGGREGATIONS, RECURRENCES
from ..kept import wanted
from .forward import flat_gates, flat_rows, padded
from .loader import KernelError, load_library, runnable

_INT32 = 2**31 - 1


class Gradients(NamedTuple):
    """Gradients of q, k, v, u and the gates, float32, in the shapes of the inputs.

    q's is that of the read alone: u's, which stands by itself, is added to it where u is q. Gates that the recurrence
    does not have are ``None``, and so may be u's where gates are not learned: it is zero.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    u: torch.Tensor | None
    g: torch.Tensor | None
    beta: torch.Tensor | None
    lam: torch.Tensor | None


class TvmBackward:
    """The gradients of y = memory_caching(q, k, v, u) on the CPU, by the kernels of one library.

    Args:
        library: the exported ``.so``.
        record: its entry in the tuned table; ``record["problem"]`` names the recurrence, the aggregation, the state
            init and the widths, ``record["config"]`` the configuration, ``cpu_flags`` what the library needs of the
            CPU.

    Attributes:
        wants: names of what the forward should keep (:func:`kept.wanted`).

    Raises:
        KernelError: if the library cannot be run on this machine.
    """

    device, dtype = "cpu", torch.float32
    """Of the tensors that it reads."""

    def __init__(self, library: Path, record: Mapping[str, Any]) -> None:
        module = load_library(runnable(library, record))
        self.segment_states = module["segment_states"]
        self.read_backward = module["read_backward"]
        self.state_backward = module["state_backward"]
        self.write_backward = module["write_backward"]
        problem = record["problem"]
        self.wants = wanted("tvm", problem, record["config"])
        self.gated = RECURRENCES[problem["recurrence"]].gated
        self.routed = AGGREGATIONS[problem["aggregation"]].routed
        self.chunk = record["config"]["chunk"]
        self.checkpoint = problem["state_init"] == "checkpoint"
        self.Dk, self.Dv = padded(problem["Dk"]), padded(problem["Dv"])

    def __call__(
        self,
        dy: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        u: torch.Tensor,
        *,
        g: torch.Tensor | None,
        beta: torch.Tensor | None,
        lam: torch.Tensor | None,
        scale: float,
        top_k: int,
        segments: Segments,
        kept: Mapping[str, torch.Tensor] | None = None,
    ) -> Gradients:
        """Gradients from float32 dy, v ``[B, T, H, Dv]``, q, k, u ``[B, T, H, Dk]`` and gates ``[B, T, H]``.

        ``kept``: ``states`` and ``means`` of the forward of the same arguments (:mod:`kept`); without them they are
        computed again.

        Raises:
            KernelError: if an array has more elements than the kernels' 32-bit indices reach.
        """
        B, T, H, Dv = v.shape
        Dk, N = q.shape[-1], segments.count
        rows, count = B * T * H, B * H * segments.count
        parts = count * ((not self.routed) + self.checkpoint)
        largest = max(rows * max(self.Dk, self.Dv), max(parts, count) * self.Dk * self.Dv)
        largest = max(largest, rows * N if self.routed else 3 * rows)
        # The memory that enters each chunk, for the gradient of g.
        entering_rows = B * H * (T // self.chunk + N) * self.Dk if self.gated else 1
        largest = max(largest, entering_rows * self.Dv)
        if largest > _INT32:
            raise KernelError(
                f"an array of {largest} elements exceeds 2^31 - 1; split the batch, or use backend='eager'"
            )
        q, k, u = (flat_rows(x, self.Dk) for x in (q, k, u))
        dy, v = (flat_rows(x, self.Dv) for x in (dy, v))
        gates = flat_gates(q, rows, g, beta, lam) if self.gated else (q.new_zeros(1),) * 3
        spans, sizes = (segments.begin, segments.end, segments.first), (T, H)
        # It sizes scratch memory and is a 32-bit argument; more than all segments cannot be chosen.
        top_k = min(max(top_k, 1), N)
        scale = float(scale)
        if kept:
            states, means = kept["states"], kept["means"]
        else:
            states, means = q.new_empty(count * self.Dk, self.Dv), q.new_empty(count, self.Dk)
            self.segment_states(k, v, *gates, *spans, *sizes, states, means)
        states = states.view(count * self.Dk, self.Dv)

        gamma, dr = (q.new_empty(rows * N if self.routed else 1) for _ in range(2))
        own, entering = q.new_empty(B * H * 3, T), q.new_empty(entering_rows, self.Dv)
        dq, du = torch.empty_like(q), torch.empty_like(q) if self.routed else torch.zeros_like(q)
        self.read_backward(
            dy, q, u, k, v, *gates, states, means, *spans, *sizes, segments.longest, top_k, scale, gamma, dr, own,
            entering, dq, du,
        )  # fmt: skip
        dstates, dmeans = torch.empty_like(states), q.new_empty(count, self.Dk)
        scratch = q.new_empty(max(parts, 1) * self.Dk, self.Dv)
        self.state_backward(
            dy, q, u, gates[0], gamma, dr, own, *spans, *sizes, scale, scratch, dstates, dmeans
        )  # fmt: skip
        del gamma, dr, scratch
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        lead_key, lead_value = q.new_empty(count, self.Dk), q.new_empty(count, self.Dv)
        dgates = tuple(torch.empty_like(gate) for gate in gates)
        self.write_backward(
            dy, q, u, k, v, *gates, own, entering, states, dstates, dmeans, *spans, *sizes, scale, lead_key,
            lead_value, dk, dv, *dgates,
        )  # fmt: skip
        dq, dk, du = (x.view(B, T, H, self.Dk)[..., :Dk].contiguous() for x in (dq, dk, du))
        dv = dv.view(B, T, H, self.Dv)[..., :Dv].contiguous()
        if not self.gated:
            return Gradients(dq, dk, dv, du, None, None, None)
        return Gradients(dq, dk, dv, du, *(x.view(B, T, H) for x in dgates))
