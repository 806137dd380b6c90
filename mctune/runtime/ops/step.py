"""New tokens over a memory, as an operator of torch.library that writes the memory in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..call import Call
from ..eager.decode import decode
from ..errors import ArgumentError
from ..kernels.dispatch import NAMESPACE, decode_kernel, fall_back
from ..kernels.launch import options, rows
from ..kernels.tvm.loader import KernelError
from ..memory import LayerMemory

Tensor = torch.Tensor


def extend(call: Call, memory: LayerMemory, backend: str) -> Tensor:
    """``memory_caching_step`` for checked arguments."""
    memory.check(call)
    if memory.bound is None:
        return advance(call, memory, backend)
    y: Tensor = _bounded(call, memory, backend)
    return y


def tokens(call: Call, begin: int, end: int) -> Call:
    """The call on tokens ``begin`` to ``end`` of each row alone."""
    return call.map(lambda x: x[:, begin:end])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _bounded(call: Call, memory: LayerMemory, backend: str) -> Tensor:
    """One call up to each segment's end: what the bound drops must be gone before the next token reads."""
    outputs, begin, n = [], 0, call.q.shape[1]
    while begin < n:
        end = min(n, begin + call.segment_length - int(memory.filled.max()))
        outputs.append(advance(tokens(call, begin, end), memory, backend))
        memory.evict()
        begin = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def advance(call: Call, memory: LayerMemory, backend: str) -> Tensor:
    """The same without a bound."""
    n = call.q.shape[1]
    if not torch.compiler.is_compiling():
        memory.reserve(n)
    # An operator is opaque to a graph and refuses a backward; elsewhere a plain call saves its overhead.
    run = _operator if torch.compiler.is_compiling() or call.requires_grad else _run
    y: Tensor = run(
        call.q,
        call.k,
        call.v,
        call.u,
        call.g,
        call.beta,
        call.lam,
        call.eta,
        call.mu,
        call.W_up,
        call.W_down,
        memory.states,
        memory.descriptors,
        memory.online,
        memory.key_sum,
        memory.last_key,
        memory.last_value,
        memory.start,
        memory.momentum,
        memory.cached,
        memory.filled,
        call.recurrence,
        call.aggregation,
        call.state_init,
        call.segment_length,
        call.top_k,
        call.scale,
        call.memory_residual,
        call.inner_chunk,
        backend,
    )
    memory.advance(n, call.segment_length)
    return y


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor | None,
    g: Tensor | None,
    beta: Tensor | None,
    lam: Tensor | None,
    eta: Tensor | None,
    mu: Tensor | None,
    W_up: Tensor | None,
    W_down: Tensor | None,
    states: Sequence[Tensor],
    descriptors: Tensor,
    online: Sequence[Tensor],
    key_sum: Tensor,
    last_key: Tensor,
    last_value: Tensor,
    start: Sequence[Tensor],
    momentum: Sequence[Tensor],
    cached: Tensor,
    filled: Tensor,
    recurrence: str,
    aggregation: str,
    state_init: str,
    segment_length: int,
    top_k: int,
    scale: float,
    memory_residual: bool,
    inner_chunk: int,
    backend: str,
) -> Tensor:
    call = Call(
        q=q,
        k=k,
        v=v,
        u=u,
        recurrence=recurrence,
        aggregation=aggregation,
        segmentation="constant",
        segment_length=segment_length,
        state_init=state_init,
        top_k=top_k,
        scale=scale,
        g=g,
        beta=beta,
        lam=lam,
        eta=eta,
        mu=mu,
        W_up=W_up,
        W_down=W_down,
        memory_residual=memory_residual,
        inner_chunk=inner_chunk,
        cu_seqlens=None,
    )
    initial: tuple[Tensor, ...] = ()
    if W_up is not None and W_down is not None:
        initial = tuple(W.detach().to(key_sum.dtype) for W in (W_up, W_down))
    memory = LayerMemory(
        tuple(states),
        descriptors,
        tuple(online),
        key_sum,
        last_key,
        last_value,
        tuple(start),
        tuple(momentum),
        cached,
        filled,
        initial=initial,
    )
    needed = int((cached + (filled + q.shape[1]) // segment_length).max())
    if needed > memory.capacity:
        raise ArgumentError(
            f"{q.shape[1]} more tokens need room for {needed} states and the memory has room for {memory.capacity}; a "
            f"compiled step cannot grow it: call memory.reserve(tokens), or MemoryCache.reserve, beforehand"
        )
    kernel = decode_kernel(call, backend)
    if kernel is not None:
        try:
            return _launch(kernel, call, memory)
        except KernelError as error:
            fall_back(error, backend)
    y = decode(call, memory)
    assert y is not None
    return y


def _launch(kernel: Any, call: Call, memory: LayerMemory) -> Tensor:
    y: Tensor = kernel(*rows(call, kernel), **options(call), segment_length=call.segment_length, memory=memory)
    return y.to(call.q.dtype)


_operator = torch.library.custom_op(
    f"{NAMESPACE}::memory_caching_decode",
    _run,
    mutates_args=("states", "descriptors", "online", "key_sum", "last_key", "last_value", "start", "momentum"),
)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty(v.shape)
