"""New tokens over a memory, as an operator of torch.library that writes the memory in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..call import Call
from ..eager.decode import decode
from ..errors import ArgumentError, KernelError
from ..kernels.dispatch import NAMESPACE, decode_kernel, fall_back
from ..kernels.launch import options, rows
from ..memory import LayerMemory
from ..options import NAMES
from .run import TENSORS

Tensor = torch.Tensor
_SEVERAL = ("states", "online", "start", "momentum")
"""Stores of a memory that are several tensors."""
_WRITTEN = ("states", "descriptors", "online", "key_sum", "last_key", "last_value", "start", "momentum")


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
    if torch.compiler.is_compiling() or call.requires_grad:
        given = [getattr(call, name) for name in (*TENSORS, *_OPTIONS)]
        stores = [getattr(memory, name) for name in _STORES]
        y: Tensor = _operator(*given[: len(TENSORS)], *stores, *given[len(TENSORS) :], backend)
    else:
        y = _step(call, memory, backend)
    memory.advance(n, call.segment_length)
    return y


def _step(call: Call, memory: LayerMemory, backend: str) -> Tensor:
    """y of the new tokens, and the stores of the memory written; its counts are as they were."""
    if call.W_up is not None and call.W_down is not None:
        initial = tuple(W.detach().to(memory.key_sum.dtype) for W in (call.W_up, call.W_down))
        memory = replace(memory, initial=initial)
    kernel = decode_kernel(call, backend)
    if kernel is not None:
        try:
            return _launch(kernel, call, memory)
        except KernelError as error:
            fall_back(error, backend)
    y = decode(call, memory)
    assert y is not None
    return y


def _run(*arguments: Any) -> Tensor:
    """What the operator computes; :data:`_SCHEMA` has its arguments."""
    named = dict(zip((*TENSORS, *_STORES, *_OPTIONS), arguments[:-1], strict=True))
    stores: dict[str, Any] = {name: named.pop(name) for name in _STORES}
    call = Call(**named, segmentation="constant")
    memory = LayerMemory(**stores | {name: tuple(stores[name]) for name in _SEVERAL})
    needed = memory.needed(call.q.shape[1], call.segment_length)
    if needed > memory.capacity:
        raise ArgumentError(
            f"{call.q.shape[1]} more tokens need room for {needed} states and the memory has room for "
            f"{memory.capacity}; a compiled step cannot grow it: call memory.reserve(tokens), or MemoryCache.reserve, "
            "beforehand"
        )
    return _step(call, memory, arguments[-1])


def _launch(kernel: Any, call: Call, memory: LayerMemory) -> Tensor:
    y: Tensor = kernel(*rows(call, kernel), **options(call), segment_length=call.segment_length, memory=memory)
    return y.to(call.q.dtype)


_STORES = (*_WRITTEN, "cached", "filled")
_OPTIONS = tuple(name for name in NAMES if name != "segmentation")
_TYPES = {
    "segment_length": "SymInt", "top_k": "SymInt", "inner_chunk": "SymInt", "scale": "float", "memory_residual": "bool",
}  # fmt: skip
_SCHEMA = ", ".join(
    (
        *(f"Tensor{'' if name in TENSORS[:3] else '?'} {name}" for name in TENSORS),
        *(f"Tensor(a{i}!){'[]' if name in _SEVERAL else ''} {name}" for i, name in enumerate(_WRITTEN)),
        "Tensor cached, Tensor filled",
        *(f"{_TYPES.get(name, 'str')} {name}" for name in _OPTIONS),
        "str backend",
    )
)
_operator = torch.library.custom_op(
    f"{NAMESPACE}::memory_caching_decode", _run, mutates_args=_WRITTEN, schema=f"({_SCHEMA}) -> Tensor"
)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty(v.shape)
