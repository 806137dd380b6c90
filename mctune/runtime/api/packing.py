"""What models hand to a token mixer under the names of their libraries: read here, or refused by name."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import shown
from ..errors import ArgumentError
from ..segments import make_segments

Tensor = torch.Tensor
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k")
"""``cu_seqlens`` as Transformers and flash-attention call it, for queries and for keys."""
_LONGEST = ("max_length_q", "max_length_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k")
"""Tokens of the longest sequence, which follow from the bounds."""
_POSITIONS = ("position_ids", "cache_position")
PACKING = (*_BOUNDS, *_LONGEST, *_POSITIONS, "seq_idx")
"""The names, besides ``cu_seqlens``, that say where the sequences of a packed row are."""
TAKES = "attention_mask, past_key_values, use_cache, cu_seqlens and what else names the sequences of a packed row"
"""What a token mixer takes besides hidden states, for people."""
_REMEDIES = {
    "output_attentions": "a memory has no attention weights; leave it out",
    "initial_state": "a memory goes on from past_key_values",
    "output_final_state": "pass use_cache=True, the memory is then in the cache that comes back",
    "head_first": "hidden states are [B, T, hidden_size]",
    "past_key_value": "it is called past_key_values",
    "position_embeddings": "a memory knows no positions",
    "is_causal": "a memory reads only earlier tokens",
}


def take_bounds(
    given: dict[str, Any], shape: tuple[int, ...], cu_seqlens: Tensor | None = None, mask: Tensor | None = None
) -> Tensor | None:
    """Where the sequences of a packed row begin and end, in whichever way the caller says it.

    Args:
        given: the call's other arguments; those of :data:`PACKING` are taken out.
        shape: (B, T) of the hidden states.
        cu_seqlens: int32 [S + 1], as in :func:`memory_caching`; the same as ``cu_seq_lens_q`` and ``cu_seq_lens_k``.
        mask: the call's ``attention_mask``; positions of padding mean nothing.

    Returns:
        int32 [S + 1], bounds in the row of all B * T tokens; ``None`` where each row of the batch is one sequence.

    Raises:
        ArgumentError: if two arguments name different sequences, or one has another shape or meaning.
    """
    bounds = ({} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}) | _take(given, _BOUNDS)
    places, longest = _take(given, ("seq_idx", *_POSITIONS)), _take(given, _LONGEST)
    B, T = shape
    for name, x in bounds.items():
        if mask is not None:
            raise ArgumentError(f"attention_mask with {name}: a packed row has no padding; pass one of them")
        if B != 1:
            raise ArgumentError(f"{name} with B={B}: the sequences stand in one row, so B is 1")
        if not isinstance(x, Tensor) or x.dim() != 1 or x.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(f"{name} is {_what(x)}; it must be int32 [S + 1], from 0 to T={T}")
    # Values cannot be compared in a graph, where bounds stand for all that is said about the sequences.
    if not bounds or not torch.compiler.is_compiling():
        for name, at in places.items():
            cuts = _restarts(name, at, B, T, mask)
            bounds |= {} if cuts is None else {name: cuts}
        if len(bounds) > 1:  # the values of one are read once, by what cuts up the row
            _check_one_row(bounds, B * T)
    found = next(iter(bounds.items()), None)
    for name, value in longest.items():
        if found is None and value < T:
            raise ArgumentError(f"{name}={value} with T={T}: pass cu_seqlens, which says where the sequences end")
    if found is None:
        return None
    if mask is not None:
        raise ArgumentError(f"attention_mask with several sequences in a row ({found[0]}); pass their cu_seqlens alone")
    row: Tensor = found[1].to(torch.int32)
    return row


def _take(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the names that stand for something, taken out."""
    found = {}
    for name in names:
        value = given.pop(name, None)
        if value is not None:
            found[name] = value
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _restarts(name: str, at: Tensor, B: int, T: int, mask: Tensor | None) -> Tensor | None:
    """The bounds that a number for each token gives; ``None`` where no row holds more than one sequence."""
    if not isinstance(at, Tensor) or at.is_floating_point() or at.dtype == torch.bool:
        raise ArgumentError(f"{name} is {_what(at)}; it must be integers, [B, T] = {[B, T]}")
    if tuple(at.shape) not in ((T,), (1, T), (B, T)):
        raise ArgumentError(f"{name} is {list(at.shape)}; it must be [B, T] = {[B, T]}")
    step = at.expand(B, T).diff(dim=1)
    # The number of a sequence changes where the next begins; a position goes up by one until it starts again.
    numbered = name == "seq_idx"
    new, jumps = (step != 0, torch.zeros_like(step, dtype=torch.bool)) if numbered else (step <= 0, step > 1)
    if mask is not None and mask.dim() == 2 and mask.shape[0] == B and mask.shape[1] >= T:
        tokens = mask[:, -T:].to(at.device) != 0
        new, jumps = (x & tokens[:, 1:] & tokens[:, :-1] for x in (new, jumps))
    if bool(jumps.any()):
        row, token = jumps.nonzero()[0].tolist()
        raise ArgumentError(
            f"{name} jumps by {int(step[row, token])} after token {token} of row {row}: a memory knows no positions, "
            "only where they start again, as a new sequence; leave it out"
        )
    if not bool(new.any()):
        return None
    starts = torch.cat([torch.ones_like(new[:, :1]), new], 1).flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_full((1,), B * T)]).to(torch.int32)


def _check_one_row(bounds: dict[str, Tensor], tokens: int) -> None:
    """Refuse bounds that do not cut up the row, or not in one way. Sequences without tokens do not count."""
    first: list[int] = []
    for name, x in bounds.items():
        make_segments(tokens, "packed", tokens, x)
        cuts = torch.unique_consecutive(x).tolist()
        first = first or cuts
        if cuts != first:
            raise ArgumentError(
                f"{next(iter(bounds))} and {name} name different sequences, {_some(first)} and {_some(cuts)}; pass one "
                "of them"
            )


def refuse_rest(where: str, given: dict[str, Any], takes: str) -> None:
    """Refuse what a call was given and nothing here reads; ``None`` and ``False`` ask for nothing.

    Raises:
        ArgumentError: naming the first such argument, and what to do instead.
    """
    for name, value in given.items():
        asked_for_nothing = (None, True) if name == "is_causal" else (None, False)
        if not any(value is nothing for nothing in asked_for_nothing):
            remedy = _REMEDIES.get(name, f"it takes {takes}")
            raise ArgumentError(f"{name}={_what(value)} is not an argument of {where}: {remedy}")


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return shown(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _some(cuts: list[int]) -> str:
    return f"{cuts}" if len(cuts) <= 6 else f"[{', '.join(map(str, cuts[:6]))}, ...]"
