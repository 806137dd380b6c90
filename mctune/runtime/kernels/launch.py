"""A call as the launchers of all passes take it: of one dtype, contiguous, out of autograd's sight."""

from __future__ import annotations

from typing import Any

import torch

from ..call import Call
from ..traits import gates_of

Tensor = torch.Tensor


def rows(call: Call, kernel: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, u in the dtype that ``kernel`` reads; u = q unless given."""
    dtype = kernel.dtype or call.q.dtype
    q = as_read(call.q, dtype)
    return q, as_read(call.k, dtype), as_read(call.v, dtype), q if call.u is None else as_read(call.u, dtype)


def options(call: Call) -> dict[str, Any]:
    """The keyword arguments that the launchers of a family share."""
    names = gates_of(call.writes.family)
    if call.deep:
        names += ("W_up", "W_down")
    given = {name: getattr(call, name) for name in names}
    found: dict[str, Any] = {name: None if x is None else as_read(x, torch.float32) for name, x in given.items()}
    if call.deep:
        found |= {"memory_residual": call.memory_residual, "inner_chunk": call.inner_chunk}
    return {**found, "scale": call.scale, "top_k": call.top_k}


def as_read(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as kernels read it: the memory itself, so a view that only counts as negated is none."""
    return x.detach().to(dtype).contiguous().resolve_neg()
