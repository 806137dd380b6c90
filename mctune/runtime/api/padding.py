"""Padded batches as packed rows: a mask decides which tokens there are."""

from __future__ import annotations

import torch

from ..arguments import shown
from ..errors import ArgumentError

Tensor = torch.Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def unpadded(attention_mask: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor] | None:
    """Where the tokens of a padded batch stand, and the bounds of the packed row that they make.

    Args:
        attention_mask: [B, T], 1 at tokens and 0 at padding, on either side.
        hidden_states: [B, T, D].

    Returns:
        int64 [M], places in the B * T tokens, and int32 [B + 1]; ``None`` where nothing is padding.

    Raises:
        ArgumentError: on another shape, other values, padding between tokens, or a mask without tokens.
    """
    _check_type(attention_mask)
    shape = list(hidden_states.shape[:2])
    if list(attention_mask.shape) != shape:
        raise ArgumentError(f"attention_mask is {list(attention_mask.shape)}; it must be [B, T] = {shape}")
    tokens = attention_mask != 0
    if bool((tokens & (attention_mask != 1)).any()):
        raise ArgumentError("attention_mask has values besides 0 and 1; pass [B, T], 1 at tokens and 0 at padding")
    if bool(tokens.all()):
        return None
    if not bool(tokens.any()):
        raise ArgumentError("attention_mask is 0 everywhere: there must be at least 1 token")
    starts = (tokens[:, 1:] & ~tokens[:, :-1]).sum(1) + tokens[:, 0]
    if bool((starts > 1).any()):
        row = int(starts.argmax())
        raise ArgumentError(f"attention_mask has padding between the tokens of row {row}; pad on the left or the right")
    counts = tokens.sum(1)
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return tokens.flatten().nonzero()[:, 0].to(hidden_states.device), bounds


def _check_type(attention_mask: Tensor) -> None:
    if not isinstance(attention_mask, Tensor) or attention_mask.is_nested or attention_mask.layout != torch.strided:
        raise ArgumentError(f"attention_mask is {shown(attention_mask)}; it must be a dense torch.Tensor, [B, T]")
    if attention_mask.is_meta:
        raise ArgumentError("attention_mask is on meta, which holds no values; pass it on the CPU")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_cached(attention_mask: Tensor, tokens: int, started: bool, rows: int | None = None) -> None:
    """Refuse padding that a cache cannot skip.

    Raises:
        ArgumentError: unless padding is on the left, and among the first tokens of the sequences.
    """
    _check_type(attention_mask)
    if (
        attention_mask.dim() != 2
        or attention_mask.shape[1] < tokens
        or attention_mask.shape[0] != (attention_mask.shape[0] if rows is None else rows)
    ):
        size = "" if rows is None else f"B={rows} and "
        raise ArgumentError(f"attention_mask is {list(attention_mask.shape)}; it must be [B, T] with {size}T={tokens}")
    if started and not bool(attention_mask[:, -tokens:].all()):
        raise ArgumentError(
            "attention_mask has padding after the first call with this cache; only the call that starts the sequences "
            "may have some, on the left"
        )
    # A row of nothing but padding is a sequence that has no token yet.
    if not started and bool(((attention_mask[:, -1] == 0) & (attention_mask != 0).any(1)).any()):
        raise ArgumentError("attention_mask has padding on the right with a cache; pad on the left")


def padded(y: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """[1, M, D] back to [B, T, D], 0 at padding."""
    flat = y.new_zeros(shape.numel(), y.shape[2])
    return flat.index_copy(0, places, y[0]).view(*shape, -1)
