"""Rows of a cache: which ones are asked for, whether layers agree on them, and prompts of unequal lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from ..arguments import shown
from ..call import Call
from ..eager.ends import sequence_lengths
from ..errors import ArgumentError
from ..memory import LayerMemory
from ..ops.step import tokens
from .prefill import as_batch
from .rewind import History, extend_recorded

Tensor = torch.Tensor
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def check_rows(name: str, indices: Tensor, rows: int | None) -> None:
    """Refuse what does not name rows by their numbers.

    Args:
        name: of the argument.
        indices: integers [n], each from 0 to ``rows`` - 1. A mask is none.
        rows: how many there are; ``None`` if the cache is empty.

    Raises:
        ArgumentError: naming the argument.
    """
    must = "it must be an integer tensor, [rows]"
    if not isinstance(indices, Tensor) or indices.is_nested or indices.layout != torch.strided:
        raise ArgumentError(f"{name} is {shown(indices)}; {must}")
    if indices.dtype not in _INTEGERS or indices.dim() != 1 or len(indices) == 0:
        raise ArgumentError(f"{name} is {indices.dtype} {list(indices.shape)}; {must}, of at least 1 row")
    if indices.is_meta:
        raise ArgumentError(f"{name} is on meta, which holds no values; pass it on the CPU")
    if rows is None:
        return
    least, most = int(indices.min()), int(indices.max())
    if least < 0 or most >= rows:
        raise ArgumentError(f"{name} names row {least if least < 0 else most}; the cache holds rows 0 to {rows - 1}")


def check_alike(memories: Mapping[int, LayerMemory]) -> None:
    """Refuse layers that do not hold the same tokens, for what is done to all of them at once.

    Raises:
        ArgumentError: naming the first that differs.
    """
    first = next(iter(memories))
    for index, memory in memories.items():
        if not torch.equal(memory.lengths, memories[first].lengths):
            raise ArgumentError(
                f"layer {index} of the cache holds {memory.lengths.tolist()} tokens and layer {first} "
                f"{memories[first].lengths.tolist()}: run every layer on the same tokens first"
            )


def extend_prompt(call: Call, memory: LayerMemory, reach: int, backend: str) -> tuple[Tensor, History]:
    """Write a prompt's newest tokens, at most ``reach`` of each sequence, so that they can be taken back.

    Args:
        call: of a packed row, sequences may differ in length.
        memory: of what stands before them.
        reach: tokens that can be taken back later.
        backend: as in ``memory_caching``.

    Returns:
        y, as the call is laid out, and the history.
    """
    lengths, packed = sequence_lengths(call), call.cu_seqlens is not None
    if len(set(lengths)) == 1:
        history = History(reach)
        history.restart(memory)
        y = extend_recorded(as_batch(call, len(lengths)) if packed else call, memory, history, backend)
        return y.flatten(0, 1)[None] if packed else y, history
    memory.reserve(max(lengths))
    outputs, pasts, begin = [], [], 0
    for row, length in enumerate(lengths):
        alone, past = memory.map(partial(_row, row)), History(reach)
        past.restart(alone)
        if length:
            one = replace(tokens(call, begin, begin + length), cu_seqlens=None, segmentation="constant")
            outputs.append(extend_recorded(one, alone, past, backend))
        pasts.append(past)
        begin += length
    return torch.cat(outputs, 1), History.together(pasts, memory)


def _row(row: int, x: Tensor) -> Tensor:
    return x[row : row + 1]
