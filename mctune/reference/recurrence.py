"""The write: how token t changes the memory, one function a recurrence (arXiv:2602.24281)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mctune.reference.memory import Memory, gradient, outer, read


@dataclass(frozen=True)
class Token:
    """What one token brings: k [B, H, Dk], v [B, H, Dv], and the gates, [B, H, 1, 1]."""

    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    lam: Tensor
    eta: Tensor
    mu: Tensor


@dataclass(frozen=True)
class State:
    """What is carried from token to token; every tensor of a memory is [B, H, ...]."""

    memory: Memory
    """M_{t-1}."""
    momentum: Memory
    """S_{t-1} of titans."""
    chunk_start: Memory
    """M_{b(t)}: the memory before the first write of t's inner chunk, where dla and titans take their gradients."""
    previous_k: Tensor
    """k_{t-1} of swla; zero where there is no token before."""
    previous_v: Tensor
    """v_{t-1} of swla."""
    residual: bool
    """Whether a deep memory adds its input to its output."""

    @classmethod
    def start(cls, memory: Memory, k: Tensor, v: Tensor, residual: bool) -> State:
        """M_0 = ``memory``, S_0 = 0 and no token before; k and v give the shapes [B, H, Dk] and [B, H, Dv]."""
        zeros = tuple(torch.zeros_like(parameter) for parameter in memory)
        return cls(memory, zeros, memory, torch.zeros_like(k), torch.zeros_like(v), residual)

    def at_chunk_start(self) -> State:
        """The same state where an inner chunk begins."""
        return replace(self, chunk_start=self.memory)


def linear(state: State, token: Token) -> State:
    """M_t = M_{t-1} + k_tᵀ v_t (Eq. 2, unnormalised)."""
    (M,) = state.memory
    return replace(state, memory=(M + outer(token.k, token.v),))


def swla(state: State, token: Token) -> State:
    """M_t = e^{g_t} M_{t-1} + beta_t k_{t-1}ᵀ v_{t-1} + lam_t k_tᵀ v_t (Eq. 26-27, window of two)."""
    (M,) = state.memory
    M = (
        torch.exp(token.g) * M
        + token.beta * outer(state.previous_k, state.previous_v)
        + token.lam * outer(token.k, token.v)
    )
    return replace(state, memory=(M,), previous_k=token.k, previous_v=token.v)


def dla(state: State, token: Token) -> State:
    """M_t = M_{t-1} - eta_t ∇L(M_{b(t)}; k_t, v_t) with L = -⟨M(k), v⟩ (Eq. 30-31)."""
    slopes = gradient(state.chunk_start, token.k, error=-token.v)
    memory = tuple(M - token.eta * slope for M, slope in zip(state.memory, slopes, strict=True))
    return replace(state, memory=memory)


def titans(state: State, token: Token) -> State:
    """S_t = mu_t S_{t-1} + eta_t ∇L(M_{b(t)}; k_t, v_t), M_t = e^{g_t} M_{t-1} - S_t, L = ‖M(k) - v‖² (Eq. 34-36).

    The sign is descent; the paper's two lines, taken as they stand, compose to ascent.
    """
    error = 2 * (read(state.chunk_start, token.k, state.residual) - token.v)
    slopes = gradient(state.chunk_start, token.k, error)
    momentum = tuple(token.mu * S + token.eta * slope for S, slope in zip(state.momentum, slopes, strict=True))
    memory = tuple(torch.exp(token.g) * M - S for M, S in zip(state.memory, momentum, strict=True))
    return replace(state, memory=memory, momentum=momentum)


WRITES: dict[str, Callable[[State, Token], State]] = {"linear": linear, "swla": swla, "dla": dla, "titans": titans}
ABSENT = {"g": 0.0, "beta": 0.0, "lam": 1.0, "eta": 1.0, "mu": 0.0}
"""What a gate is where the caller gives none."""
