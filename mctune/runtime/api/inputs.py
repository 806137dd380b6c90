"""What a layer is given, held against what it and its cache are, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..arguments import LARGEST, shown
from ..cache.cache import MemoryCache
from ..errors import ArgumentError
from ..segments import check_bounds, check_bounds_type

Tensor = torch.Tensor


def check_hidden(hidden_states: Tensor, hidden_size: int) -> None:
    """Refuse what is no dense [B, T, hidden_size] with at least one token."""
    must = f"it must be [B, T, hidden_size={hidden_size}]"
    if not isinstance(hidden_states, Tensor):
        raise ArgumentError(f"hidden_states is {shown(hidden_states)}; {must}, a torch.Tensor")
    if hidden_states.is_nested or hidden_states.layout is not torch.strided:
        raise ArgumentError(f"hidden_states is a nested or sparse tensor; {must}, dense")
    if hidden_states.dim() != 3 or hidden_states.shape[-1] != hidden_size:
        raise ArgumentError(f"hidden_states is {list(hidden_states.shape)}; {must}")
    if not hidden_states.is_floating_point():
        raise ArgumentError(f"hidden_states is {hidden_states.dtype}; it must be floating point")
    if hidden_states.shape[0] == 0 or hidden_states.shape[1] == 0:
        raise ArgumentError(
            f"hidden_states is {list(hidden_states.shape)}; it must hold at least 1 sequence and 1 token"
        )


def check_packed(hidden_states: Tensor, cu_seqlens: Tensor, read: bool) -> None:
    """Refuse bounds that do not cut up the row.

    Values are looked at where ``read``, because a short convolution needs them before the operation has checked them.
    """
    check_bounds_type(cu_seqlens)
    B, T = hidden_states.shape[:2]
    if B != 1:
        raise ArgumentError(
            f"hidden_states has B={B} with cu_seqlens: the sequences stand in one row, so B is 1; put the batch into "
            "cu_seqlens"
        )
    if cu_seqlens.is_meta and not hidden_states.is_meta:
        raise ArgumentError("cu_seqlens is on meta, which holds no values; pass it on the CPU")
    if read and not cu_seqlens.is_meta and not torch.compiler.is_compiling():
        check_bounds(T, cu_seqlens)


def check_rows(cache: MemoryCache, layer_idx: int, hidden_states: Tensor) -> None:
    """Refuse another number of rows than the cache holds."""
    memory = cache.layer(layer_idx)
    if memory is not None and memory.rows != hidden_states.shape[0]:
        raise ArgumentError(
            f"hidden_states has B={hidden_states.shape[0]} rows and the cache holds {memory.rows} sequences; pass "
            f"[B={memory.rows}, n, hidden_size], or change the cache first: batch_select_indices, "
            "batch_repeat_interleave"
        )


def check_past(cache: MemoryCache, layer_idx: int, convs: Sequence[Any] | Any, x: Tensor) -> tuple[Tensor, ...] | None:
    """The inputs that an earlier call has left for the layer's convolutions; ``None`` where the sequences start."""
    past = cache.conv_state(layer_idx)
    if cache.layer(layer_idx) is None:
        return None
    fits = past is not None and len(past) == len(convs)
    if fits and past is not None:
        for kept, conv in zip(past, convs, strict=True):
            width, size = conv.weight.shape
            fits = fits and kept.shape[0] == x.shape[0] and kept.shape[1] >= size - 1 and kept.shape[2] == width
    if not fits:
        raise ArgumentError(
            f"layer {layer_idx} of the cache was not written by a layer with this use_short_conv=True, conv_size and "
            "width; start with an empty cache"
        )
    return past


def head_widths(hidden_size: int, num_heads: int, head_dim: int | None, expand_v: float) -> tuple[int, int]:
    """Dk and Dv.

    Raises:
        ArgumentError: if they are not whole.
    """
    if head_dim is None and hidden_size % num_heads:
        raise ArgumentError(
            f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}; pass head_dim, or change one"
        )
    Dk = hidden_size // num_heads if head_dim is None else head_dim
    Dv = int(Dk * expand_v)
    if Dv != Dk * expand_v or not 1 <= Dv <= LARGEST:
        raise ArgumentError(
            f"head_dim={Dk}, expand_v={shown(expand_v)}: head_dim and head_dim * expand_v must be whole numbers of at "
            "least 1"
        )
    return Dk, Dv
