"""A prompt in one forward, and the memory that it leaves for the tokens after it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from ..call import Call
from ..eager.ends import end_states, sequence_lengths
from ..eager.forward import by_head, lay_out
from ..eager.gates import descriptors
from ..errors import ArgumentError
from ..memory import LayerMemory
from ..modes import without_autocast
from ..ops.serve import forward_with_states, serve
from ..ops.step import extend, tokens

Tensor = torch.Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def prefill(
    call: Call, backend: str = "auto", bound: int | None = None, state_dtype: torch.dtype | None = None
) -> tuple[Tensor, LayerMemory]:
    """What ``memory_caching`` gives for sequences that start here, and their memory.

    Args:
        call: checked arguments; of a packed row, each sequence becomes a row of the memory.
        backend: as in ``memory_caching``.
        bound: most states to keep of a sequence. What a token reads is then what it would read token by token.
        state_dtype: in which cached states are kept, as in :meth:`LayerMemory.empty`.

    Returns:
        y as ``memory_caching`` does, differentiable where there is no bound, and the memory.

    Raises:
        ArgumentError: under logarithmic segmentation, which needs the last token's place in advance.
    """
    if call.segmentation == "logarithmic":
        raise ArgumentError(
            "segmentation='logarithmic' with a cache: its segments depend on how long the sequence will be; use "
            "segmentation='constant'"
        )
    lengths = sequence_lengths(call)
    # A token of segment s reads at most s states: up to there, a bound changes nothing.
    unbounded = max(lengths) if bound is None else (bound + 1) * call.segment_length
    heads = [min(length, unbounded) for length in lengths]
    if heads == lengths:
        y, memory = _whole(call, backend, bound, state_dtype)
        memory.evict()
        return y, memory
    y, memory = _whole(between(call, [0] * len(lengths), heads), backend, bound, state_dtype)
    memory.evict()
    rest = _extend_each(between(call, heads, lengths), memory, backend)
    return joined(call, [y, rest], [heads, lengths]), memory


def _extend_each(call: Call, memory: LayerMemory, backend: str) -> Tensor:
    """:func:`..ops.step.extend` for a packed row too, sequence after sequence."""
    if call.cu_seqlens is None:
        return extend(call, memory, backend)
    lengths = sequence_lengths(call)
    memory.reserve(max(lengths))
    outputs, begin = [], 0
    for row, length in enumerate(lengths):
        if length:
            one = replace(tokens(call, begin, begin + length), cu_seqlens=None, segmentation="constant")
            outputs.append(extend(one, memory.map(partial(_row, row)), backend))
        begin += length
    return torch.cat(outputs, 1)


def _row(row: int, x: Tensor) -> Tensor:
    return x[row : row + 1]


def between(call: Call, begins: list[int], ends: list[int]) -> Call:
    """The call on tokens ``begins[i]`` to ``ends[i]`` of each sequence i alone."""
    if call.cu_seqlens is None:
        return tokens(call, begins[0], ends[0])
    index, bounds = _places(call, begins, ends)
    flat = index.to(call.q.device)
    return replace(call.map(lambda x: x.index_select(1, flat)), cu_seqlens=bounds)


def _places(call: Call, begins: list[int], ends: list[int]) -> tuple[Tensor, Tensor]:
    """Where these tokens stand in the packed row, and the bounds of the row that they make."""
    assert call.cu_seqlens is not None
    starts = call.cu_seqlens.tolist()
    index = torch.cat(
        [torch.arange(at + begin, at + end, device="cpu") for at, begin, end in zip(starts, begins, ends, strict=False)]
    )
    counts = torch.tensor([end - begin for begin, end in zip(begins, ends, strict=True)], device="cpu")
    return index, torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


def joined(call: Call, outputs: list[Tensor], stops: list[list[int]]) -> Tensor:
    """The outputs of consecutive parts of each sequence, in the order of the call's tokens.

    Args:
        call: the whole of it.
        outputs: of each part, [B, n, H, Dv], or [1, n, H, Dv] of a packed row.
        stops: of each part, where it ends in each sequence, in tokens.
    """
    if len(outputs) == 1:
        return outputs[0]
    if call.cu_seqlens is None:
        return torch.cat(outputs, 1)
    index, begins = [], [0] * len(stops[0])
    for ends in stops:
        index.append(_places(call, begins, ends)[0])
        begins = ends
    return torch.cat(outputs, 1).index_select(1, torch.cat(index).argsort().to(call.q.device))


def as_batch(call: Call, rows: int) -> Call:
    """A packed row of ``rows`` sequences of one length, [1, rows n, H, D], as a batch, [rows, n, H, D]."""
    batched = call.map(lambda x: x[0].reshape(rows, -1, *x.shape[2:]))
    return replace(batched, cu_seqlens=None, segmentation="constant")


def _whole(call: Call, backend: str, bound: int | None, state_dtype: torch.dtype | None) -> tuple[Tensor, LayerMemory]:
    if call.requires_grad:
        return serve(call, backend), remember(call, bound, state_dtype)
    y, states, means = forward_with_states(call, backend)
    return y, remember(call, bound, state_dtype, states, means)


@torch.no_grad()
def remember(
    call: Call,
    bound: int | None = None,
    state_dtype: torch.dtype | None = None,
    kept: tuple[Tensor, ...] | None = None,
    means: Tensor | None = None,
) -> LayerMemory:
    """The memory that sequences leave, from their writes alone; ``state_dtype`` as in :meth:`LayerMemory.empty`.

    ``kept`` and ``means`` are the states at the segments' ends, [B, H, N, ...] a layer, and their mean keys,
    [B, H, N, Dk], where a kernel has left them.
    """
    lengths = sequence_lengths(call)
    memory = LayerMemory.empty(call, len(lengths), bound, state_dtype)
    C = call.segment_length
    states: tuple[Tensor, ...] = ()
    momentum: tuple[Tensor, ...] = ()
    start: tuple[Tensor, ...] = ()
    with without_autocast(call.q.device):
        k, v = (by_head(x, call.compute_dtype) for x in (call.k, call.v))
        if kept is not None and means is not None and (not call.deep or _starts_afresh(call)):
            states, means = tuple(x.flatten(0, 1) for x in kept), means.flatten(0, 1)
            momentum, start = _of_last_chunk(call, max(lengths)) if call.deep else ((), ())
        else:
            layout = lay_out(call)
            left = end_states(call, layout, k, v)
            states, momentum, start = left.states, left.momentum, left.start
            means = descriptors(k, k, layout)[0]
    counts = torch.tensor(lengths, dtype=torch.int32, device="cpu")
    memory.cached.copy_(counts // C)
    memory.filled.copy_(counts % C)
    memory.make_room(int(memory.cached.max()))
    # A packed row is one row of heads; otherwise each row of the batch has its own.
    begins = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).tolist()
    packed, first = call.cu_seqlens is not None, 0
    for row, length in enumerate(lengths):
        if not length:
            continue
        full, rest = divmod(length, C)
        first = first if packed else 0
        last = first + -(-length // C) - 1
        G = slice(None) if packed else slice(row * call.q.shape[2], (row + 1) * call.q.shape[2])
        for store, ends in zip(memory.states, states, strict=True):
            store[row, :, :full] = ends[G, first : first + full]
        memory.descriptors[row, :, :full] = means[G, first : first + full]
        if rest or call.carried:
            for online, ends in zip(memory.online, states, strict=True):
                online[row] = ends[G, last]
            for S, ends in zip(memory.momentum, momentum, strict=True):
                S[row] = ends[G, row if packed else 0]
            if call.writes.convolves:
                source = begins[row + 1] - 1 if packed else length - 1
                memory.last_key[row], memory.last_value[row] = k[G, source], v[G, source]
        if rest:
            memory.key_sum[row] = means[G, last] * rest
            for W, ends in zip(memory.start, start, strict=True):
                W[row] = ends[G, row if packed else 0]
        first = last + 1
    return memory


def _starts_afresh(call: Call) -> bool:
    """Whether what a segment under way was written with does not depend on those before it, in all rows alike."""
    return not call.carried and call.cu_seqlens is None


def _of_last_chunk(call: Call, length: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """S, and the state that entered the last inner chunk, of a deep memory: the last segment's writes, once more."""
    rest = length % call.segment_length
    if not rest:
        return (), ()
    last = tokens(call, length - rest, length)
    k, v = (by_head(x, call.compute_dtype) for x in (last.k, last.v))
    left = end_states(last, lay_out(last), k, v)
    return left.momentum, left.start
