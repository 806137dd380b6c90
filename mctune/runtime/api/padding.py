"""Padded batches as packed rows: a mask decides which tokens there are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..arguments import shown
from ..errors import ArgumentError

Tensor = torch.Tensor
_VALUES = "attention_mask has values besides 0 and 1; pass [B, T], 1 at tokens and 0 at padding"
_LATE = (
    "attention_mask has padding after the first call with this cache; only the call that starts the sequences may have "
    "some, on the left"
)
_RIGHT = "attention_mask has padding on the right with a cache; pad on the left"
Packed = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]
"""A packed row, [1, M, D], its bounds, and what makes [B, T, D] of a row like it, 0 at padding."""


def as_row(
    hidden_states: Tensor, attention_mask: Tensor | None, bounds: Tensor | None, started: bool | None
) -> Packed | None:
    """What is mixed in place of the batch: a packed row; ``None`` where each row of the batch is one sequence.

    Args:
        hidden_states: [B, T, D].
        attention_mask: [B, T], as in :func:`packed`; for sequences that a cache holds also [B, all tokens].
        bounds: int32 [S + 1], from 0 to B * T, where rows hold several sequences.
        started: whether a cache holds the sequences already; ``None`` without a cache.

    Raises:
        ArgumentError: on a mask that is not one, or that a cache cannot skip.
    """
    B, T = hidden_states.shape[:2]
    if started is not None and attention_mask is not None:
        check_cached(attention_mask, T, started, B)
    if attention_mask is not None and not started:
        return packed(attention_mask, hidden_states)
    return None if bounds is None else (hidden_states.reshape(1, B * T, -1), bounds, lambda y: y.view(B, T, -1))


def packed(attention_mask: Tensor, hidden_states: Tensor) -> Packed | None:
    """The tokens of a padded batch as a packed row; ``None`` where nothing is padding.

    In a graph of ``torch.compile``, which cannot depend on how many tokens there are, padding stays in the row, as its
    last sequence; what is refused is then refused when the graph runs, as a RuntimeError.

    Args:
        attention_mask: [B, T], 1 at tokens and 0 at padding, on either side.
        hidden_states: [B, T, D].

    Raises:
        ArgumentError: on another shape, other values, padding between tokens, or a mask without tokens.
    """
    _check_type(attention_mask)
    shape = hidden_states.shape[:2]
    if attention_mask.shape != shape:
        raise ArgumentError(f"attention_mask is {list(attention_mask.shape)}; it must be [B, T] = {list(shape)}")
    if torch.compiler.is_compiling():
        return _sorted(attention_mask.to(hidden_states.device), hidden_states)
    found = unpadded(attention_mask, hidden_states)
    if found is None:
        return None
    places, bounds = found
    row = hidden_states.flatten(0, 1).index_select(0, places)[None]
    return row, bounds, partial(padded, places=places, shape=shape)


def _sorted(attention_mask: Tensor, hidden_states: Tensor) -> Packed:
    """All B * T places, padding last."""
    tokens = attention_mask != 0
    torch._assert_async((tokens == attention_mask).all(), _VALUES)
    torch._assert_async((_runs(tokens) < 2).all(), "attention_mask has padding between the tokens of a row")
    order = (~tokens).flatten().to(torch.uint8).argsort(stable=True)
    counts = tokens.sum(1)
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0), counts.new_full((1,), tokens.numel())]).to(torch.int32)
    visible = torch.where(tokens[..., None], hidden_states, 0)
    row = visible.flatten(0, 1).index_select(0, order)[None]

    def restore(y: Tensor) -> Tensor:
        return torch.where(tokens[..., None], padded(y, order, tokens.shape), 0)

    return row, bounds, restore


@torch.compiler.disable  # type: ignore[untyped-decorator]
def unpadded(attention_mask: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor] | None:
    """Where the tokens of a padded batch stand, and the bounds of the packed row that they make.

    Args:
        attention_mask: [B, T], 1 at tokens and 0 at padding, on either side.
        hidden_states: [B, T, D].

    Returns:
        int64 [M], places in the B * T tokens, and int32 [B + 1]; ``None`` where nothing is padding.

    Raises:
        ArgumentError: on other values, padding between tokens, or a mask without tokens.
    """
    tokens = attention_mask != 0
    if bool((tokens & (attention_mask != 1)).any()):
        raise ArgumentError(_VALUES)
    if bool(tokens.all()):
        return None
    if not bool(tokens.any()):
        raise ArgumentError("attention_mask is 0 everywhere: there must be at least 1 token")
    runs = _runs(tokens)
    if bool((runs > 1).any()):
        row = int(runs.argmax())
        raise ArgumentError(f"attention_mask has padding between the tokens of row {row}; pad on the left or the right")
    counts = tokens.sum(1)
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return tokens.flatten().nonzero()[:, 0].to(hidden_states.device), bounds


def _runs(tokens: Tensor) -> Tensor:
    """How many times tokens begin in each row, [B]."""
    return (tokens[:, 1:] & ~tokens[:, :-1]).sum(1) + tokens[:, 0]


def _check_type(attention_mask: Tensor) -> None:
    if not isinstance(attention_mask, Tensor) or attention_mask.is_nested or attention_mask.layout != torch.strided:
        raise ArgumentError(f"attention_mask is {shown(attention_mask)}; it must be a dense torch.Tensor, [B, T]")
    if attention_mask.is_meta:
        raise ArgumentError("attention_mask is on meta, which holds no values; pass it on the CPU")


def check_cached(attention_mask: Tensor, tokens: int, started: bool, rows: int) -> None:
    """Refuse padding that a cache cannot skip.

    Raises:
        ArgumentError: unless padding is on the left, and among the first tokens of the sequences; in a
            graph of ``torch.compile``, a RuntimeError when it runs.
    """
    _check_type(attention_mask)
    if attention_mask.dim() != 2 or attention_mask.shape[1] < tokens or attention_mask.shape[0] != rows:
        raise ArgumentError(
            f"attention_mask is {list(attention_mask.shape)}; it must be [B, T] with B={rows} and T={tokens}"
        )
    # Only the call that starts the sequences may have padding; a row of nothing else has no token yet.
    given = attention_mask != 0
    right, message = (~given[:, -tokens:], _LATE) if started else (~given[:, -1:] & given.any(1, keepdim=True), _RIGHT)
    if torch.compiler.is_compiling():
        torch._assert_async(~right.any(), message)
    elif bool(right.any()):
        raise ArgumentError(message)


def padded(y: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """[1, M, D] back to [B, T, D], 0 at padding."""
    flat = y.new_zeros(shape.numel(), y.shape[2])
    return flat.index_copy(0, places, y[0]).view(*shape, -1)
