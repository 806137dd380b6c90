"""Memory Caching as the paper tells it: write token t, then read with it; at a segment's end, cache the memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mctune.reference.aggregation import Cache, aggregate
from mctune.reference.arguments import Writes, check_tensor, check_writes
from mctune.reference.memory import Memory
from mctune.reference.recurrence import WRITES, State, Token


def trace(writes: Writes) -> Iterator[tuple[Cache, Memory, Tensor]]:
    """For each token t of one sequence: the cache, M_t, and the mean key of its segment up to and including t.

    A segment starts from M_0 (independent) or from where the one before ended (checkpoint; section 3.4), and caches
    its end state (Eq. 4).
    """
    problem, write = writes.problem, WRITES[writes.problem.recurrence]
    inner_chunk = problem.inner_chunk or problem.T
    fresh = State.start(writes.start, writes.k[:, 0], writes.v[:, 0], writes.residual)
    state, cache = fresh, Cache.empty(writes.start, writes.k[:, 0])
    for begin, end in problem.spans():
        if problem.state_init == "independent":
            state = fresh
        keys = torch.zeros_like(writes.k[:, 0])
        for t in range(begin, end):
            if (t - begin) % inner_chunk == 0:
                state = state.at_chunk_start()
            gates = {name: gate[:, t] for name, gate in writes.gates.items()}
            state = write(state, Token(writes.k[:, t], writes.v[:, t], **gates))
            keys = keys + writes.k[:, t]
            descriptor = keys / (t - begin + 1)
            yield cache, state.memory, descriptor
        cache = cache.append(state.memory, descriptor)


def memory_caching(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor | None = None,
    *,
    recurrence: str = "linear",
    aggregation: str = "grm",
    segment_length: int = 256,
    segmentation: str = "constant",
    state_init: str = "independent",
    top_k: int = 2,
    scale: float | None = None,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    lam: Tensor | None = None,
    eta: Tensor | None = None,
    mu: Tensor | None = None,
    W_up: Tensor | None = None,
    W_down: Tensor | None = None,
    memory_residual: bool = True,
    inner_chunk: int = 16,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Memory Caching, token by token in float64, differentiable in every tensor (arXiv:2602.24281).

    Args:
        q, k: queries and keys [B, T, H, Dk], any floating-point dtype, as all tensors here but cu_seqlens.
        v: values [B, T, H, Dv].
        u: connectors [B, T, H, Dk] (Eq. 10); ``None`` means q.
        recurrence: linear (Eq. 2), swla (Eq. 26-27), dla (Eq. 30-31) or titans (Eq. 34-36).
        aggregation: residual (Eq. 6-7), grm (Eq. 8-10), soup (Eq. 14-15), ssc (Eq. 16-17) or mean (section 4.3).
        segment_length: tokens a segment under constant and packed; the last may be shorter. Not used by logarithmic.
        segmentation: constant; logarithmic, the powers of two of T's binary expansion, longest first (section 4.2);
            or packed, constant segments within each of the sequences that cu_seqlens delimits.
        state_init: independent or checkpoint (section 3.4): where a segment's memory starts.
        top_k: cached segments that ssc reads.
        scale: multiplies q where a memory is read, and nowhere else; ``None`` means Dk ** -0.5.
        g, beta, lam, eta, mu: gates [B, T, H]: g <= 0 (swla, titans), beta and lam (swla), eta (dla, titans), mu
            (titans). Absent ones are 0, 0, 1, 1 and 0.
        W_up, W_down: M_0 of dla and titans, [H, Dk, E] and [H, E, Dv].
        memory_residual: whether a deep memory adds its input to its output, which needs Dk = Dv.
        inner_chunk: tokens, counted from the segment's start, that take their gradients at one state (dla, titans).
        cu_seqlens: int32 [S+1], the packed sequences' bounds, from 0 to T; needs B = 1.

    Returns:
        y [B, T, H, Dv], float64.

    Raises:
        UsageError: naming the argument, the limit and the remedy.
    """
    problem: dict[str, str | int | None] = dict(
        recurrence=recurrence,
        aggregation=aggregation,
        segmentation=segmentation,
        state_init=state_init,
        segment_length=segment_length,
        top_k=top_k,
        inner_chunk=inner_chunk,
    )
    gates = dict(g=g, beta=beta, lam=lam, eta=eta, mu=mu)
    writes = check_writes(problem, k, v, gates, W_up, W_down, memory_residual, cu_seqlens)
    q64 = check_tensor("q", q, "[B, T, H, Dk]", tuple(k.shape), k)
    u64 = q64 if u is None else check_tensor("u", u, "[B, T, H, Dk]", tuple(k.shape), k)
    outputs = [
        aggregate(
            aggregation,
            cache,
            memory,
            descriptor,
            q_t,
            u_t,
            scale=writes.problem.Dk**-0.5 if scale is None else scale,
            top_k=writes.problem.top_k,
            residual=writes.residual,
        )
        for place, sequence in writes.sequences()
        for (cache, memory, descriptor), q_t, u_t in zip(
            trace(sequence), q64[:, place].unbind(1), u64[:, place].unbind(1), strict=True
        )
    ]
    return torch.stack(outputs, 1)


def segment_states(
    k: Tensor,
    v: Tensor,
    *,
    recurrence: str = "linear",
    segment_length: int = 256,
    segmentation: str = "constant",
    state_init: str = "independent",
    g: Tensor | None = None,
    beta: Tensor | None = None,
    lam: Tensor | None = None,
    eta: Tensor | None = None,
    mu: Tensor | None = None,
    W_up: Tensor | None = None,
    W_down: Tensor | None = None,
    memory_residual: bool = True,
    inner_chunk: int = 16,
    cu_seqlens: Tensor | None = None,
) -> Cache:
    """What :func:`memory_caching`, which explains the arguments, has cached once the last segment has ended too.

    ``(M,), p = segment_states(k, v)`` or, of a deep memory, ``(W_up, W_down), p``. Packed sequences' segments stand
    one after another, and an empty sequence has none.

    Raises:
        UsageError: naming the argument, the limit and the remedy.
    """
    problem: dict[str, str | int | None] = dict(
        recurrence=recurrence,
        aggregation="grm",
        segmentation=segmentation,
        state_init=state_init,
        segment_length=segment_length,
        inner_chunk=inner_chunk,
    )
    gates = dict(g=g, beta=beta, lam=lam, eta=eta, mu=mu)
    writes = check_writes(problem, k, v, gates, W_up, W_down, memory_residual, cu_seqlens)
    caches = []
    for _, sequence in writes.sequences():
        for cache, memory, descriptor in trace(sequence):
            last = cache, memory, descriptor
        cache, memory, descriptor = last
        caches.append(cache.append(memory, descriptor))
    states = tuple(torch.cat(parameters, 1) for parameters in zip(*(cache.states for cache in caches), strict=True))
    return Cache(states, torch.cat([cache.descriptors for cache in caches], 1))
