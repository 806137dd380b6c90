"""The read: what token t makes of the cached memories and the online one (arXiv:2602.24281)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mctune.core.problem import AGGREGATIONS
from mctune.reference.memory import Memory, read


class Cache(NamedTuple):
    """Memories, and the descriptors that the gates know them by, in the order of their segments.

    ``states`` is ``(M,)``, [B, N, H, Dk, Dv], for linear and swla, and ``(W_up, W_down)``, [B, N, H, Dk, E] and
    [B, N, H, E, Dv], for dla and titans; ``descriptors`` is [B, N, H, Dk]; all float64.
    """

    states: Memory
    descriptors: Tensor

    @classmethod
    def empty(cls, memory: Memory, k: Tensor) -> Cache:
        """No segment yet: N = 0, shapes otherwise from ``memory`` and k [B, H, Dk]."""
        return cls(tuple(parameter.unsqueeze(1)[:, :0] for parameter in memory), k.unsqueeze(1)[:, :0])

    def append(self, memory: Memory, descriptor: Tensor) -> Cache:
        """This cache and one more segment, its end state and its mean key."""
        pairs = zip(self.states, memory, strict=True)
        states = tuple(torch.cat((cached, last.unsqueeze(1)), 1) for cached, last in pairs)
        return Cache(states, torch.cat((self.descriptors, descriptor.unsqueeze(1)), 1))


def weights(aggregation: str, logits: Tensor, top_k: int | None) -> Tensor:
    """gamma_t⁽ⁱ⁾ [B, s, H] from the logits r_t⁽ⁱ⁾ [B, s, H] of the cached segments in order and, last, the online one.

    :data:`GAMMA` has a formula an aggregation.
    """
    return GAMMA[aggregation](logits, top_k)


def _ones(logits: Tensor, top_k: int | None) -> Tensor:
    """1 (Eq. 6-7)."""
    return torch.ones_like(logits)


def _average(logits: Tensor, top_k: int | None) -> Tensor:
    """1/s (section 4.3)."""
    return torch.full_like(logits, 1 / logits.shape[1])


def _softmax(logits: Tensor, top_k: int | None) -> Tensor:
    """softmax over i (Eq. 8-10)."""
    return torch.softmax(logits, dim=1)


def _sparse(logits: Tensor, top_k: int | None) -> Tensor:
    """softmax over the online segment and the ``top_k`` largest cached ones, of ties the earlier (Eq. 16-17)."""
    ranked = logits[:, :-1].sort(dim=1, descending=True, stable=True).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ranked[:, :top_k], True)
    chosen[:, -1] = True
    return torch.softmax(logits.masked_fill(~chosen, -torch.inf), dim=1)


GAMMA: dict[str, Callable[[Tensor, int | None], Tensor]] = {
    "residual": _ones,
    "grm": _softmax,
    "soup": _softmax,
    "ssc": _sparse,
    "mean": _average,
}


def aggregate(
    aggregation: str,
    cache: Cache,
    memory: Memory,
    descriptor: Tensor,
    q: Tensor,
    u: Tensor,
    *,
    scale: float,
    top_k: int | None,
    residual: bool,
) -> Tensor:
    """y_t [B, H, Dv] from the cached segments, the online memory M_t and its running mean key [B, H, Dk].

    Logits are r_t⁽ⁱ⁾ = ⟨u_t, p⁽ⁱ⁾⟩ (Eq. 10) of the unscaled u_t. residual, grm and ssc weigh what the memories answer,
    Σ gamma⁽ⁱ⁾ M⁽ⁱ⁾(x) at x = scale · q_t; soup and mean read one memory, of which every parameter is the
    gamma-weighted sum of theirs (Eq. 14-15).
    """
    x = scale * q
    descriptors = torch.cat((cache.descriptors, descriptor.unsqueeze(1)), 1)
    gamma = weights(aggregation, (u.unsqueeze(1) * descriptors).sum(-1), top_k)
    if AGGREGATIONS[aggregation].mixes_parameters:
        cached, online = gamma[:, :-1], gamma[:, -1, :, None, None]
        pairs = zip(cache.states, memory, strict=True)
        soup = tuple(torch.einsum("bnh,bnhij->bhij", cached, W) + online * last for W, last in pairs)
        return read(soup, x, residual)
    answers = torch.cat((read(cache.states, x.unsqueeze(1), residual), read(memory, x, residual).unsqueeze(1)), 1)
    # Not by its gate of 0: what is not chosen may be inf.
    return torch.where(gamma.unsqueeze(-1) == 0, 0.0, gamma.unsqueeze(-1) * answers).sum(1)
