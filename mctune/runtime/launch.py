"""A call as the launchers of all passes take it: float32, contiguous, out of autograd's sight."""

from __future__ import annotations

from typing import Any

import torch

from .arguments import Call

Tensor = torch.Tensor


def rows(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, u; u = q unless given."""
    q = float32(call.q)
    return q, float32(call.k), float32(call.v), q if call.u is None else float32(call.u)


def options(call: Call) -> dict[str, Any]:
    """The keyword arguments that the launchers share."""
    gates = {name: getattr(call, name) for name in ("g", "beta", "lam")}
    return {
        **{name: None if gate is None else float32(gate) for name, gate in gates.items()},
        "scale": call.scale,
        "top_k": call.top_k,
    }


def float32(x: Tensor) -> Tensor:
    """``x`` as kernels read it."""
    return x.detach().to(torch.float32).contiguous()
