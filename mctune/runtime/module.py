"""``MemoryCaching``: a sequence-mixing layer around ``memory_caching``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize, sigmoid, softplus

from .arguments import DEEP, GATES, check_options
from .dispatch import BACKENDS
from .errors import ArgumentError
from .functional import memory_caching

Tensor = torch.Tensor


class MemoryCaching(nn.Module):
    """Hidden states in, hidden states out, through a memory that caches its own past (arXiv:2602.24281).

    q, k, v and the connector u are linear in the hidden states; q and k are scaled to unit length in each head; the
    output of each head passes an RMS norm, then one projection mixes the heads. Gates are linear in the hidden states,
    one value a head, computed in float32: g = -softplus(x) <= 0, beta, lam, eta and mu = sigmoid(x). Their weights
    start at zero, so at first each is the constant that its bias gives: e^g 0.95, lam 0.9, beta 0.1, mu 0.5, and
    eta 1 / (2 inner_chunk), small enough that the writes of one inner chunk, which share their gradient's state, do not
    overshoot together. Projections start normal with variance 1 / fan-in, as do the deep memory's first layers W_up;
    its last layers W_down start at a tenth of that.

    Args:
        hidden_size: width of the hidden states.
        num_heads: H.
        head_dim: Dk; ``None`` is hidden_size / num_heads.
        expand_v: Dv / Dk.
        recurrence, aggregation, segment_length, segmentation, state_init, top_k, inner_chunk, memory_residual, backend:
            as in :func:`memory_caching`.
        expansion: E / Dk of a deep memory.
        connector: whether u has a projection of its own; otherwise u = q, the paper's form without parameters.
        norm_eps: of the output's RMS norm.

    Raises:
        ArgumentError: if arguments contradict each other.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        *,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        recurrence: str = "linear",
        aggregation: str = "grm",
        segment_length: int = 256,
        segmentation: str = "constant",
        state_init: str = "independent",
        top_k: int = 2,
        inner_chunk: int = 16,
        expansion: int = 4,
        memory_residual: bool = True,
        connector: bool = True,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_options(recurrence, aggregation, segmentation, state_init, segment_length, top_k, inner_chunk)
        if backend not in BACKENDS:
            raise ArgumentError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
        for name, size in (("hidden_size", hidden_size), ("num_heads", num_heads), ("expansion", expansion)):
            if size < 1:
                raise ArgumentError(f"{name}={size}: must be at least 1")
        if head_dim is None and hidden_size % num_heads:
            raise ArgumentError(
                f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}; pass head_dim, or change one"
            )
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.value_dim = int(self.head_dim * expand_v)
        if self.head_dim < 1 or self.value_dim != self.head_dim * expand_v or self.value_dim < 1:
            raise ArgumentError(
                f"head_dim={self.head_dim}, expand_v={expand_v}: head_dim and head_dim * expand_v must be "
                "whole numbers of at least 1"
            )
        if recurrence in DEEP and memory_residual and self.value_dim != self.head_dim:
            raise ArgumentError(
                f"memory_residual=True with expand_v={expand_v}: a memory can add its input only if Dk = Dv; pass "
                "memory_residual=False or expand_v=1"
            )
        self.recurrence, self.aggregation, self.segmentation = recurrence, aggregation, segmentation
        self.segment_length, self.state_init, self.top_k = segment_length, state_init, top_k
        self.inner_chunk, self.memory_residual, self.backend = inner_chunk, memory_residual, backend
        keys, values = num_heads * self.head_dim, num_heads * self.value_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        reads_u = aggregation not in ("residual", "mean")
        self.u_proj = nn.Linear(hidden_size, keys, bias=False) if connector and reads_u else None
        self.gates = nn.ModuleDict({f"{name}_proj": nn.Linear(hidden_size, num_heads) for name in GATES[recurrence]})
        self.W_up: nn.Parameter | None = None
        self.W_down: nn.Parameter | None = None
        if recurrence in DEEP:
            width = expansion * self.head_dim
            self.W_up = nn.Parameter(torch.empty(num_heads, self.head_dim, width))
            self.W_down = nn.Parameter(torch.empty(num_heads, width, self.value_dim))
        self.norm = nn.RMSNorm(self.value_dim, eps=norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters again, as the class describes."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.u_proj, self.o_proj):
            if layer is not None:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        starts = {"beta": 0.1, "lam": 0.9, "mu": 0.5, "eta": 0.5 / self.inner_chunk}
        for name in GATES[self.recurrence]:
            layer = self._gate_layer(name)
            nn.init.zeros_(layer.weight)
            if name == "g":
                decay = torch.tensor(0.95)
                bias = (1 / decay - 1).log()  # softplus(bias) = -log(decay)
            else:
                bias = torch.tensor(starts[name]).logit()
            nn.init.constant_(layer.bias, float(bias))
        if self.W_up is not None and self.W_down is not None:
            nn.init.normal_(self.W_up, std=self.W_up.shape[1] ** -0.5)
            nn.init.normal_(self.W_down, std=0.1 * self.W_down.shape[1] ** -0.5)
        self.norm.reset_parameters()

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """[B, T, hidden_size] to [B, T, hidden_size], in the same dtype.

        Args:
            hidden_states: [B, T, hidden_size].
            cu_seqlens: int32 [S + 1], from 0 to T, with ``segmentation="packed"`` (and then B = 1).

        Raises:
            ArgumentError: if the shape is another, or ``cu_seqlens`` and the segmentation contradict each other.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise ArgumentError(
                f"hidden_states is {list(hidden_states.shape)}; it must be [B, T, hidden_size={self.hidden_size}]"
            )
        q, k = (self._heads(layer, hidden_states, True) for layer in (self.q_proj, self.k_proj))
        gates = {name: self._gate(name, hidden_states) for name in GATES[self.recurrence]}
        y = memory_caching(
            q,
            k,
            self._heads(self.v_proj, hidden_states, False),
            None if self.u_proj is None else self._heads(self.u_proj, hidden_states, False),
            recurrence=self.recurrence,
            aggregation=self.aggregation,
            segment_length=self.segment_length,
            segmentation=self.segmentation,
            state_init=self.state_init,
            top_k=self.top_k,
            W_up=self.W_up,
            W_down=self.W_down,
            memory_residual=self.memory_residual,
            inner_chunk=self.inner_chunk,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
            g=gates.get("g"),
            beta=gates.get("beta"),
            lam=gates.get("lam"),
            eta=gates.get("eta"),
            mu=gates.get("mu"),
        )
        out: Tensor = self.o_proj(self.norm(y).flatten(2))
        return out

    def extra_repr(self) -> str:
        """The options, for ``print(module)``."""
        segments = "" if self.segmentation == "logarithmic" else f", segment_length={self.segment_length}"
        return (
            f"recurrence={self.recurrence}, aggregation={self.aggregation}, segmentation={self.segmentation}{segments}"
            f", state_init={self.state_init}"
        )

    def _heads(self, layer: nn.Module, hidden_states: Tensor, unit: bool) -> Tensor:
        heads: Tensor = layer(hidden_states).unflatten(-1, (self.num_heads, -1))
        return normalize(heads, dim=-1) if unit else heads

    def _gate_layer(self, name: str) -> nn.Linear:
        layer = self.gates[f"{name}_proj"]
        assert isinstance(layer, nn.Linear)
        return layer

    def _gate(self, name: str, hidden_states: Tensor) -> Tensor:
        x: Tensor = self._gate_layer(name)(hidden_states).float()
        return -softplus(x) if name == "g" else sigmoid(x)
