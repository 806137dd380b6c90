"""``memory_caching_step``: the next tokens of every sequence, from what a memory remembers of those before."""

from __future__ import annotations

import torch

from ..arguments import known
from ..call import check_call
from ..copies import own
from ..kernels.dispatch import BACKENDS
from ..memory import LayerMemory
from ..ops.step import extend
from ..options import given

Tensor = torch.Tensor


def memory_caching_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor | None = None,
    *,
    memory: LayerMemory,
    recurrence: str = "linear",
    aggregation: str = "grm",
    segment_length: int = 256,
    state_init: str = "independent",
    top_k: int | None = 2,
    scale: float | None = None,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    lam: Tensor | None = None,
    eta: Tensor | None = None,
    mu: Tensor | None = None,
    W_up: Tensor | None = None,
    W_down: Tensor | None = None,
    memory_residual: bool | None = True,
    inner_chunk: int | None = 16,
    backend: str = "auto",
) -> Tensor:
    """Write n >= 1 new tokens of every sequence to ``memory`` and read them (arXiv:2602.24281, its sections 3 and 4).

    Any way of cutting a sequence into calls gives what :func:`memory_caching` gives for the whole of it. Under
    ``torch.compile`` the memory cannot grow: ``memory.reserve`` room beforehand. There is no backward. Options are as
    in :func:`memory_caching`, and the same for all calls on one memory. A model uses :class:`MemoryCache`, which holds
    one such memory a layer.

    Args:
        q, k: queries and keys of the new tokens, [B, n, H, Dk], float32, bfloat16, float16 or float64.
        v: their values, [B, n, H, Dv], same dtype.
        u: their connectors, [B, n, H, Dk], same dtype; ``None`` is u = q.
        memory: what the sequences were so far; changed in place.
        recurrence, aggregation, segment_length, state_init, top_k, scale: as in :func:`memory_caching`.
        g, beta, lam, eta, mu: gates of the new tokens, [B, n, H], float32.
        W_up, W_down: what a deep memory starts from, [H, Dk, E] and [H, E, Dv].
        memory_residual, inner_chunk, backend: as in :func:`memory_caching`.

    Returns:
        y, [B, n, H, Dv], in the dtype of q.

    Raises:
        ArgumentError: if arguments contradict each other or the memory.
        BackendError: if the backend asked for by name cannot serve the call.

    Examples:
        >>> from mctune import MemoryCache, MemoryCaching
        >>> layer, cache = MemoryCaching(64, num_heads=4, segment_length=32, layer_idx=0), MemoryCache()
        >>> _ = layer(torch.randn(2, 40, 64), past_key_values=cache)  # 40 tokens, then one more:
        >>> q, k, v = torch.randn(3, 2, 1, 4, 16).unbind()
        >>> memory_caching_step(q, k, v, memory=cache.layer(0), segment_length=32).shape
        torch.Size([2, 1, 4, 16])
    """
    known("backend", backend, BACKENDS)
    own("memory", memory, LayerMemory, ", a layer of a MemoryCache: cache.layer(0)")
    options = given(
        recurrence=recurrence,
        aggregation=aggregation,
        segment_length=segment_length,
        state_init=state_init,
        top_k=top_k,
        scale=scale,
        memory_residual=memory_residual,
        inner_chunk=inner_chunk,
    )
    gates = {"g": g, "beta": beta, "lam": lam, "eta": eta, "mu": mu}
    call = check_call(q, k, v, u, options, gates=gates, W_up=W_up, W_down=W_down)
    return extend(call, memory, backend)
