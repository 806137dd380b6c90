"""Random arguments for one call, the same for the eager path and the oracle."""

from __future__ import annotations

from typing import Any

import torch

from mctune.runtime.call import GATES as GATE_NAMES
from mctune.runtime.call import Call, check_call
from mctune.runtime.ops.serve import forward_with_states
from mctune.runtime.options import NAMES, Options

GATES = {"linear": (), "swla": ("g", "beta", "lam"), "dla": ("eta",), "titans": ("g", "eta", "mu")}


def arguments(
    recurrence: str,
    *,
    B: int = 1,
    T: int = 11,
    H: int = 2,
    Dk: int = 4,
    Dv: int = 4,
    E: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """q, k, v, u, every gate the recurrence takes and its initial states, as a mapping of leaves."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    tensors = {name: normal(B, T, H, Dk) for name in ("q", "k", "u")} | {"v": normal(B, T, H, Dv)}
    if recurrence in ("dla", "titans"):
        # Steps small enough that gradient descent on the memory does not diverge and swamp the comparison.
        tensors["k"] = torch.nn.functional.normalize(tensors["k"], dim=-1)
    gates = {name: torch.sigmoid(normal(B, T, H)) for name in GATES[recurrence]}
    if "g" in gates:
        # Mild decays: under strong ones all states come out alike, and gradients of the gates cancel to rounding.
        gates["g"] = 0.2 * gates["g"].log()
    if "eta" in gates:
        gates["eta"] = 0.2 * gates["eta"]
    tensors = {name: x.to(dtype) for name, x in tensors.items()} | gates
    if recurrence in ("dla", "titans"):
        tensors["W_up"] = normal(H, Dk, E) / Dk**0.5
        tensors["W_down"] = normal(H, E, Dv) / E**0.5
    return tensors


def make_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, u: torch.Tensor | None = None, **arguments: Any
) -> Call:
    """The checked call on the arguments of ``memory_caching``."""
    options = Options(**{name: arguments.pop(name) for name in NAMES if name in arguments})
    gates = {name: arguments.pop(name, None) for name in GATE_NAMES}
    return check_call(q, k, v, u, options, gates=gates, **arguments)


def with_states(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, u: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """``forward_with_states`` of the arguments of ``memory_caching`` for a matrix memory, which has one layer."""
    backend = options.pop("backend", "auto")
    y, states, means = forward_with_states(make_call(q, k, v, u, **options), backend)
    return y, None if states is None else states[0], means
