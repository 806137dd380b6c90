"""A launcher called on tensors without memory, in the shapes and dtypes of a problem: so that its kernels compile."""

from __future__ import annotations

from typing import Any

import torch

from mctune.backends.protocol import Kernel
from mctune.core.problem import Problem
from mctune.runtime.kernels.kept import ENDS, Sizes, shape
from mctune.runtime.kernels.results import padded
from mctune.runtime.memory import LayerMemory
from mctune.runtime.segments import Segments, make_segments
from mctune.runtime.traits import gates_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def call_on_meta(
    problem: Problem, kernel: Kernel, even: bool = True, state_dtype: str = "float32", alone: bool | None = None
) -> None:
    """Call the launcher of the problem's pass once, as a search times it and as a model calls it.

    A decode step's sequences are all at the same place, or, where not ``even``, the first is one token behind; its
    cached states are in ``state_dtype``. A pass that is ``alone`` keeps nothing, or is given nothing: by default a
    forward is, and a backward is not. A forward that is not keeps what a cache of states takes.
    """
    match problem.pass_:
        case "forward":
            keep = ENDS[problem.writes.family] if alone is False else ()
            rows = _rows(problem, problem.T)
            kernel(*rows, segments=_segments(problem), keep=keep, **_options(problem, problem.T))
        case "backward":
            _backward(problem, kernel, bool(alone))
        case "decode":
            _decode(problem, kernel, even, _DTYPES[state_dtype])
        case _:
            raise ValueError(f"no launcher is called for pass {problem.pass_!r}")


def _backward(problem: Problem, kernel: Kernel, alone: bool) -> None:
    segments = _segments(problem)
    q, k, v, u = _rows(problem, problem.T)
    # Under logarithmic segmentation the segments depend on the row's length, and a forward keeps nothing.
    nothing = alone or problem.segmentation == "logarithmic"
    names = [] if nothing else [name for group in kernel.wants for name in group]
    count = segments.count
    sizes = Sizes(problem.B * problem.H, problem.T, padded(problem.Dk), padded(problem.Dv), count,
                  min(problem.top_k or 1, count), q.dtype, padded(problem.E))  # fmt: skip
    shapes = {name: shape(name, sizes) for name in names}
    kept = {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in shapes.items()}
    kernel(torch.empty_like(v), q, k, v, u, segments=segments, kept=kept, **_options(problem, problem.T))


def _decode(problem: Problem, kernel: Kernel, even: bool, state_dtype: torch.dtype) -> None:
    """One token, the last of T, after a memory of the others."""
    B, H, Dk, Dv = problem.B, problem.H, problem.Dk, problem.Dv
    C = problem.segment_length or 1
    capacity = -(-problem.T // C)

    def states() -> tuple[torch.Tensor, ...]:
        return tuple(_empty(B, H, *layer) for layer in problem.layers)

    memory = LayerMemory(
        states=tuple(_empty(B, H, capacity, *layer, dtype=state_dtype) for layer in problem.layers),
        descriptors=_empty(B, H, capacity, Dk),
        online=states(),
        key_sum=_empty(B, H, Dk),
        last_key=_empty(B, H, Dk),
        last_value=_empty(B, H, Dv),
        start=states() if problem.deep else (),
        momentum=states() if problem.deep else (),
        cached=torch.zeros(B, dtype=torch.int32),
        filled=torch.zeros(B, dtype=torch.int32),
    )
    memory.advance(problem.T - 1, C)
    if not even:
        memory.filled[0] -= 1
    kernel(*_rows(problem, 1), segment_length=C, memory=memory, **_options(problem, 1))


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rows(problem: Problem, tokens: int) -> tuple[torch.Tensor, ...]:
    """q, k, v, u."""
    widths = (problem.Dk, problem.Dk, problem.Dv, problem.Dk)
    return tuple(_empty(problem.B, tokens, problem.H, width, dtype=_DTYPES[problem.dtype]) for width in widths)


def _options(problem: Problem, tokens: int) -> dict[str, Any]:
    shape, names = (problem.B, tokens, problem.H), gates_of(problem.writes.family)
    found: dict[str, Any] = {name: _empty(*shape) if name in problem.writes.gates else None for name in names}
    found |= {"scale": problem.Dk**-0.5, "top_k": problem.top_k or 1}
    if problem.deep:
        layers = zip(("W_up", "W_down"), problem.layers, strict=True)
        found |= {name: _empty(problem.H, *layer) for name, layer in layers}
        found |= {"memory_residual": problem.Dk == problem.Dv, "inner_chunk": problem.inner_chunk}
    return found


def _segments(problem: Problem) -> Segments:
    """Real tables; a packed row is one sequence."""
    packed = torch.tensor([0, problem.T], dtype=torch.int32) if problem.segmentation == "packed" else None
    return make_segments(problem.T, problem.segmentation, problem.segment_length or 1, packed)
