"""A checked call on whichever path serves it; with the states that it leaves, for a cache."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..call import Call
from ..eager.forward import lay_out, run_eager
from ..kernels.dispatch import Route, route
from ..kernels.kept import ENDS, segments_at_most
from .operators import forward

Tensor = torch.Tensor


def serve(call: Call, backend: str) -> Tensor:
    """``memory_caching`` of a checked call."""
    chosen = None if backend == "eager" else route(call, backend)
    if chosen is None and call.segmentation == "packed" and torch.compiler.is_compiling():
        # Where the row is cut depends on the bounds' values, which a graph does not know; the operator does.
        chosen = Route("eager")
    return run_eager(call, lay_out(call)) if chosen is None else forward(call, chosen)[0]


def forward_with_states(call: Call, backend: str = "auto") -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor | None]:
    """The same without a gradient, and what a cache keeps of the segments, if a tuned kernel runs.

    Returns:
        y, [B, T, H, Dv], as ``memory_caching`` gives it; the state at every segment's end, [B, H, N, Dk, Dv], or of a
        deep memory both layers; and its mean key, [B, H, N, Dk], float32. The latter are ``None`` where they are not at
        hand: on the eager path, under logarithmic segmentation, and for a packed row in a traced graph.

    Raises:
        ArgumentError, BackendError: as ``memory_caching`` does.
    """
    segmentation = call.segmentation
    with torch.no_grad():
        chosen = None if backend == "eager" else route(call, backend)
        if chosen is None:
            return run_eager(call, lay_out(call)), None, None
        unsized = segmentation == "packed" and torch.compiler.is_compiling()
        if chosen.backend == "eager" or segmentation == "logarithmic" or unsized:
            return forward(call, chosen)[0], None, None
        y, (*states, means) = forward(call, replace(chosen, keeps=ENDS[call.writes.family]))
    B, T, H, Dk = call.q.shape
    N = (
        call.segments.count
        if segmentation == "packed"
        else segments_at_most(T, segmentation, call.segment_length, None)
    )

    def shaped(x: Tensor, *widths: int) -> Tensor:
        x = x[: B * H * N].view(B, H, N, *x.shape[1:])
        for axis, width in enumerate(widths, 3):
            x = x.narrow(axis, 0, width)
        return x

    layers = zip(states, call.layers, strict=True)
    return y, tuple(shaped(x, *layer) for x, layer in layers), shaped(means, Dk)
