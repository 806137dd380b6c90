"""Give a trained linear-attention model cached memories without training (arXiv:2602.24281, section 4.3).

Weights and ``state_dict`` stay as they are: only how layers mix tokens changes, until :meth:`Attached.detach`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..cache.cache import MemoryCache
from ..call import GATES, check_call
from ..errors import ArgumentError
from ..options import Options
from .functional import memory_caching
from .module import MemoryCaching
from .padding import check_cached, padded, unpadded

Tensor = torch.Tensor
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEATURES = ("feature_map", "feature_map_q", "feature_map_k")
_KNOWN = (*PROJECTIONS, *_FEATURES, "norm")
"""All that a layer of plain linear attention may be made of."""
_SOFTMAX = ("is_causal", "attention_dropout", "attn_dropout", "rotary_emb", "rotary")
"""What tells a layer of softmax attention, which has the same projections."""
_TRAITS = ("aggregation", "segment_length", "segmentation", "state_init")


class Mixed(NamedTuple):
    """What ``mix`` takes from a layer's hidden states: q, k [B, T, H, Dk], v [B, T, H, Dv], as its memory gets them.

    ``finish`` makes the layer's hidden states [B, T, hidden_size] of y [B, T, H, Dv]; ``scale`` multiplies q
    (``None``: Dk ** -0.5); g, beta, lam [B, T, H] and ``recurrence`` are as in :func:`memory_caching`.

    Examples:
        >>> def mix(layer, hidden_states):  # a layer with one projection for q, k and v, and one head
        ...     q, k, v = layer(hidden_states)[:, :, None].chunk(3, -1)
        ...     return Mixed(q, k, v, finish=lambda y: y.flatten(2))
        >>> model = nn.Sequential(nn.Linear(16, 48))
        >>> attached = attach_memory_caching(model, segment_length=32, layers=["0"], mix=mix)
    """

    q: Tensor
    k: Tensor
    v: Tensor
    finish: Callable[[Tensor], Tensor]
    scale: float | None = None
    recurrence: str = "linear"
    g: Tensor | None = None
    beta: Tensor | None = None
    lam: Tensor | None = None


Mix = Callable[[nn.Module, Tensor], Mixed]


@dataclass(frozen=True)
class Attached:
    """A model whose layers :func:`attach_memory_caching` has changed.

    Attributes:
        model: the model.
        layers: names of the changed layers.

    Examples:
        >>> attached = attach_memory_caching(nn.Sequential(MemoryCaching(64)), segment_length=32)
        >>> attached.detach()  # the model is what it was
    """

    model: nn.Module
    layers: tuple[str, ...]

    def detach(self) -> None:
        """Restore the layers; calling it again does nothing."""
        for name in self.layers:
            layer = self.model.get_submodule(name)
            before = layer.__dict__.pop("_before_attaching", None)
            if isinstance(before, dict):
                for trait, value in before.items():
                    setattr(layer, trait, value)
            elif before is not None:
                del layer.forward


def attach_memory_caching(
    model: nn.Module,
    segment_length: int = 256,
    aggregation: str = "mean",
    layers: Iterable[str] | None = None,
    mix: Mix | None = None,
    *,
    state_init: str | None = None,
    top_k: int = 2,
) -> Attached:
    """Let the linear-attention layers of a trained model read the cached states of their past; nothing is trained.

    Up to ``segment_length`` tokens a layer's output is what it was. Layers of :class:`MemoryCaching` keep their
    recurrence and gates. Others need q_proj, k_proj, v_proj, o_proj and num_heads; num_kv_heads, feature_map_q and
    feature_map_k (or feature_map), norm_q and norm_k (division by the sum), norm (of each head) and scale are used too.
    They then take ``cu_seqlens``, ``attention_mask`` and a :class:`MemoryCache` as ``past_key_values``, and return
    (output, None, cache) if their own forward knows past_key_values, else the output.

    Args:
        model: changed in place; its weights and state_dict are not.
        segment_length: tokens of a segment.
        aggregation: as in :func:`memory_caching`; ``mean`` has no parameters. The gated ones compare q with keys.
        layers: names as in ``model.named_modules()``; ``None`` is every layer that is known to be right.
        mix: what a layer that is not known does before and after its memory; needs ``layers``.
        state_init: as in :func:`memory_caching`; ``None`` is a MemoryCaching layer's own, and ``checkpoint`` for
            others: they were trained with one memory for the whole sequence.
        top_k: cached segments that ``ssc`` reads for each token; other aggregations ignore it.

    Returns:
        Which layers were changed, and how to undo it.

    Raises:
        ArgumentError: naming the layer that cannot be served and why; if there is none to attach to; on a bad option.

    Examples:
        >>> model = torch.nn.Sequential(MemoryCaching(64, segment_length=4096))
        >>> attached = attach_memory_caching(model, segment_length=32, aggregation="mean")
        >>> attached.layers
        ('0',)
        >>> attached.detach()
    """
    start = state_init or "checkpoint"
    Options(aggregation=aggregation, state_init=start, segment_length=segment_length, top_k=top_k).checked()
    found = dict(_find(model, layers, mix))
    for name, layer in found.items():
        if "_before_attaching" in layer.__dict__:
            raise ArgumentError(f"layer {name!r} has memory caching attached already: call detach() of the first one")
    for layer in found.values():
        if isinstance(layer, MemoryCaching) and mix is None:
            layer.__dict__["_before_attaching"] = {trait: getattr(layer, trait) for trait in (*_TRAITS, "top_k")}
            layer.aggregation, layer.segment_length, layer.top_k = aggregation, segment_length, top_k
            layer.state_init = state_init or layer.state_init
            layer.segmentation = "constant" if layer.segmentation == "logarithmic" else layer.segmentation
            continue
        triple = "past_key_values" in inspect.signature(layer.forward).parameters
        how = _How(mix or linear_attention, segment_length, aggregation, state_init or "checkpoint", top_k, triple)
        layer.__dict__["_before_attaching"] = how
        layer.forward = partial(_forward, layer, how)
    return Attached(model, tuple(found))


@dataclass(frozen=True)
class _How:
    mix: Mix
    segment_length: int
    aggregation: str
    state_init: str
    top_k: int
    triple: bool


def _find(model: nn.Module, layers: Iterable[str] | None, mix: Mix | None) -> Iterable[tuple[str, nn.Module]]:
    modules = dict(model.named_modules())
    if layers is None:
        if mix is not None:
            raise ArgumentError("mix= without layers=: name the layers that it is for, as model.named_modules() does")
        found = {
            name: layer
            for name, layer in modules.items()
            if isinstance(layer, MemoryCaching) or all(hasattr(layer, part) for part in PROJECTIONS)
        }
        if not found:
            raise ArgumentError(
                f"{type(model).__name__} has no layer of MemoryCaching and none with {', '.join(PROJECTIONS)}: pass "
                "layers=[names] and mix=, which takes q, k and v from a layer"
            )
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        for name in names:
            if name not in modules:
                raise ArgumentError(f"layers has {name!r}, which is not among the names of model.named_modules()")
        found = {name: modules[name] for name in names}
    for name, layer in found.items():
        reason = None if mix is not None or isinstance(layer, MemoryCaching) else _unknown(layer)
        if reason is not None:
            raise ArgumentError(
                f"layer {name!r}, a {type(layer).__name__}, {reason}: pass layers= without it, or layers=[{name!r}] "
                "and mix=, which takes q, k and v from such a layer"
            )
    return found.items()


def _unknown(layer: nn.Module) -> str | None:
    """Why a layer is not known to be plain linear attention."""
    for part in (*PROJECTIONS, "num_heads"):
        if not hasattr(layer, part):
            return f"has no {part}"
    for name in _SOFTMAX:
        if hasattr(layer, name):
            return f"has {name}, so it is softmax attention"
    if getattr(layer, "do_feature_map_norm", False):
        return "divides by the sum of its keys (do_feature_map_norm), which a cached state does not hold"
    for name, _ in layer.named_parameters():
        if name.split(".")[0] not in _KNOWN:
            return f"has parameters {name}, which plain linear attention has not"
    for name in _FEATURES:
        value = getattr(layer, name, None)
        if value is not None and not callable(value):
            return f"has {name}={value!r}, which cannot be called"
    return None


def linear_attention(layer: nn.Module, hidden_states: Tensor) -> Mixed:
    """What a layer of plain linear attention does before and after its memory: the default of ``mix``.

    Args:
        layer: has q_proj, k_proj, v_proj, o_proj and num_heads.
        hidden_states: [B, T, hidden_size].

    Returns:
        q, k, v, [B, T, H, D], with shared key and value heads repeated, and what makes hidden states of y.

    Examples:
        >>> layer = nn.ModuleDict({name: nn.Linear(64, 64) for name in PROJECTIONS})
        >>> layer.num_heads = 4
        >>> linear_attention(layer, torch.randn(2, 10, 64)).q.shape
        torch.Size([2, 10, 4, 16])
    """
    parts: Any = layer
    heads = parts.num_heads
    groups = heads // (getattr(parts, "num_kv_heads", None) or heads)

    def by_head(x: Tensor, count: int) -> Tensor:
        return x.reshape(*x.shape[:2], count, -1)

    q = by_head(parts.q_proj(hidden_states), heads)
    k, v = (by_head(project(hidden_states), heads // groups) for project in (parts.k_proj, parts.v_proj))
    if groups > 1:
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    shared = getattr(parts, "feature_map", None)
    q, k = (
        x if feature is None else feature(x)
        for x, feature in ((q, getattr(parts, "feature_map_q", shared)), (k, getattr(parts, "feature_map_k", shared)))
    )
    # A sum of features may be zero; flash-linear-attention adds the same epsilon.
    q, k = (
        x / (x.sum(-1, keepdim=True) + 1e-4) if getattr(parts, flag, False) is True else x
        for x, flag in ((q, "norm_q"), (k, "norm_k"))
    )

    def finish(y: Tensor) -> Tensor:
        norm = getattr(parts, "norm", None)
        out: Tensor = parts.o_proj((y if norm is None else norm(y)).flatten(2))
        return out

    scale = getattr(parts, "scale", None)
    return Mixed(q, k, v, finish, scale if isinstance(scale, float) else None)


def _forward(
    layer: nn.Module,
    how: _How,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: MemoryCache | None = None,
    use_cache: bool | None = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, None, MemoryCache | None]:
    """The attached layer's forward, called as :meth:`MemoryCaching.forward` is."""
    cache = MemoryCache() if use_cache and past_key_values is None and how.triple else past_key_values
    index = getattr(layer, "layer_idx", None)
    if cache is not None and not isinstance(cache, MemoryCache):
        raise ArgumentError(f"past_key_values is a {type(cache).__name__}; it must be a MemoryCache")
    if cache is not None and index is None:
        raise ArgumentError("a cache for a layer without layer_idx: give every layer its own layer_idx=0, 1, ...")
    started = cache is not None and cache.layer(index or 0) is not None
    found = None
    if attention_mask is not None:
        if cu_seqlens is not None:
            raise ArgumentError("attention_mask with cu_seqlens: a packed row has no padding; pass one of them")
        if cache is not None:
            check_cached(attention_mask, hidden_states.shape[1], started)
        found = None if started else unpadded(attention_mask, hidden_states)
    if found is None:
        y = _mix(layer, how, hidden_states, cu_seqlens, cache, index)
    else:
        places, bounds = found
        row = hidden_states.flatten(0, 1).index_select(0, places)[None]
        y = padded(_mix(layer, how, row, bounds, cache, index), places, hidden_states.shape[:2])
    return (y, None, cache) if how.triple else y


def _mix(
    layer: nn.Module,
    how: _How,
    hidden_states: Tensor,
    cu_seqlens: Tensor | None,
    cache: MemoryCache | None,
    index: int | None,
) -> Tensor:
    mixed = how.mix(layer, hidden_states)
    segmentation = "constant" if cu_seqlens is None else "packed"
    if cache is None or index is None:
        y = memory_caching(
            mixed.q,
            mixed.k,
            mixed.v,
            recurrence=mixed.recurrence,
            aggregation=how.aggregation,
            segment_length=how.segment_length,
            segmentation=segmentation,
            state_init=how.state_init,
            top_k=how.top_k,
            scale=mixed.scale,
            g=mixed.g,
            beta=mixed.beta,
            lam=mixed.lam,
            cu_seqlens=cu_seqlens,
        )
        return mixed.finish(y)
    options = Options(
        recurrence=mixed.recurrence,
        aggregation=how.aggregation,
        segment_length=how.segment_length,
        segmentation=segmentation,
        state_init=how.state_init,
        top_k=how.top_k,
        scale=mixed.scale,
    )
    gates = {name: getattr(mixed, name, None) for name in GATES}
    call = check_call(mixed.q, mixed.k, mixed.v, None, options, gates=gates, cu_seqlens=cu_seqlens)
    return mixed.finish(cache.extend(call, index, "auto", layer))
