"""Give a trained linear-attention model cached memories without training (arXiv:2602.24281, section 4.3).

Weights and ``state_dict`` stay as they are: only how layers mix tokens changes, until :meth:`Attached.detach`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..cache.cache import MemoryCache
from ..call import GATES, check_call
from ..copies import own, package_of
from ..errors import ArgumentError
from ..options import Options, given
from .functional import memory_caching
from .module import MemoryCaching
from .packing import TAKES, refuse_rest, take_bounds
from .padding import as_row
from .unchanged import why_not_same

Tensor = torch.Tensor
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEATURES = ("feature_map", "feature_map_q", "feature_map_k")
_KNOWN = (*PROJECTIONS, *_FEATURES, "norm")
"""All that a layer of plain linear attention may be made of."""
_SOFTMAX = ("is_causal", "attention_dropout", "attn_dropout", "rotary_emb", "rotary")
"""What tells a layer of softmax attention, which has the same projections."""
_TRAITS = ("aggregation", "segment_length", "segmentation", "state_init", "top_k")


class Mixed(NamedTuple):
    """What ``mix`` takes from a layer's hidden states: q, k [B, T, H, Dk], v [B, T, H, Dv], as its memory gets them.

    ``finish`` makes the layer's hidden states [B, T, hidden_size] of y [B, T, H, Dv]; ``scale`` multiplies q
    (``None``: Dk ** -0.5); g, beta, lam [B, T, H] and ``recurrence`` are as in :func:`memory_caching`.

    Examples:
        >>> def mix(layer, hidden_states):  # a layer with one projection for q, k and v, and one head
        ...     q, k, v = layer(hidden_states)[:, :, None].chunk(3, -1)
        ...     return Mixed(q, k, v, finish=lambda y: y.flatten(2))
        >>> model = nn.Sequential(nn.Linear(16, 48))
        >>> # This layer alone mixes no tokens, so there is no output to compare with.
        >>> attached = attach_memory_caching(model, segment_length=32, layers=["0"], mix=mix, check=False)
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
            for trait, value in layer.__dict__.pop("_before_attaching", {}).items():
                if trait == "forward" and value is None:
                    del layer.forward
                else:
                    setattr(layer, trait, value)


def attach_memory_caching(
    model: nn.Module,
    segment_length: int = 256,
    aggregation: str = "mean",
    layers: Iterable[str] | None = None,
    mix: Mix | None = None,
    *,
    state_init: str | None = None,
    top_k: int | None = 2,
    check: bool | Tensor = True,
) -> Attached:
    """Let the linear-attention layers of a trained model read the cached states of their past; nothing is trained.

    Up to ``segment_length`` tokens a layer's output is what it was. Layers of :class:`MemoryCaching` keep their
    recurrence and gates, and change from the end of their own first segment on if that is earlier. Others need q_proj,
    k_proj, v_proj, o_proj and num_heads; num_kv_heads (or num_key_value_heads), feature_map_q and feature_map_k (or
    feature_map), norm_q and norm_k (division by the sum), norm (of each head) and scale are used too. They are run on
    random hidden states beside what would replace them, and refused if the outputs differ by more than rounding does;
    if one layer is refused, none is changed. They then take ``cu_seqlens``, ``attention_mask`` and a
    :class:`MemoryCache` as ``past_key_values``, and return (output, None, cache) if their own forward knows
    past_key_values, else the output.

    Args:
        model: changed in place; its weights and state_dict are not.
        segment_length: tokens of a segment.
        aggregation: as in :func:`memory_caching`; ``mean`` has no parameters. The gated ones compare q with keys.
        layers: names as in ``model.named_modules()``; ``None`` is every layer that is known to be right.
        mix: what a layer that is not known does before and after its memory; needs ``layers``.
        state_init: as in :func:`memory_caching`; ``None`` is a MemoryCaching layer's own, and ``checkpoint`` for
            others: they were trained with one memory for the whole sequence.
        top_k: cached segments that ``ssc`` reads for each token; other aggregations ignore it.
        check: hidden states, [B, T, hidden_size], to compare layers on instead of random ones; ``False`` compares
            nothing, for layers that cannot be run alone or yet (on the meta device).

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
    options = given(aggregation=aggregation, state_init=start, segment_length=segment_length, top_k=top_k).checked()
    if not isinstance(check, bool | Tensor):
        raise ArgumentError(f"check is a {type(check).__name__}; it must be True, False or hidden states, a tensor")
    found = _find(model, layers, mix)
    replaced = {}
    for name, layer in found.items():
        if "_before_attaching" in layer.__dict__:
            raise ArgumentError(f"layer {name!r} has memory caching attached already: call detach() of the first one")
        if mix is None and _is_ours(layer):
            continue
        how = _How.of(layer, mix, segment_length, aggregation, start, options.top_k)
        if check is not False:
            alone = partial(_forward, layer, how.for_a_check())
            reason = why_not_same(layer, alone, how.triple, None if check is True else check)
            if reason is not None:
                raise ArgumentError(_refusal(name, layer, reason, mix))
        replaced[name] = how
    for name, layer in found.items():
        if name in replaced:
            # An instance has a forward of its own where something else has replaced it before.
            layer.__dict__["_before_attaching"] = {"forward": layer.__dict__.get("forward")}
            layer.forward = partial(_forward, layer, replaced[name])
            continue
        ours: Any = layer
        layer.__dict__["_before_attaching"] = {trait: getattr(layer, trait) for trait in _TRAITS}
        ours.aggregation, ours.segment_length, ours.top_k = aggregation, segment_length, options.top_k
        ours.state_init = state_init or ours.state_init
        ours.segmentation = "constant" if ours.segmentation == "logarithmic" else ours.segmentation
    return Attached(model, tuple(found))


@dataclass(frozen=True)
class _How:
    """How the replacement of a layer runs.

    Attributes:
        names: of the arguments that the layer's own forward takes by their places.
        defaults: what its arguments are if they are not given.
        triple: whether its own forward knows ``past_key_values``, and then returns (output, None, cache).
    """

    mix: Mix
    segment_length: int
    aggregation: str
    state_init: str
    top_k: int
    names: tuple[str, ...]
    defaults: dict[str, Any]
    triple: bool
    backend: str = "auto"

    @classmethod
    def of(cls, layer: nn.Module, mix: Mix | None, length: int, aggregation: str, start: str, top_k: int) -> _How:
        """For a layer whose forward is still its own."""
        parameters = inspect.signature(layer.forward).parameters.values()
        places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = tuple(p.name for p in parameters if p.kind in places) or ("hidden_states",)
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        triple = any(p.name == "past_key_values" for p in parameters)
        return cls(mix or linear_attention, length, aggregation, start, top_k, names, defaults, triple)

    def for_a_check(self) -> _How:
        """The same where all tokens are of one segment, on the path that warns of nothing."""
        return replace(self, segment_length=1 << 30, backend="eager")


def _is_ours(layer: nn.Module) -> bool:
    """Whether it is a MemoryCaching, of this copy of the runtime or of another that has the same options."""
    return package_of(MemoryCaching, layer) is not None and all(hasattr(layer, trait) for trait in _TRAITS)


def _find(model: nn.Module, layers: Iterable[str] | None, mix: Mix | None) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if layers is None:
        if mix is not None:
            raise ArgumentError("mix= without layers=: name the layers that it is for, as model.named_modules() does")
        found = {
            name: layer
            for name, layer in modules.items()
            if _is_ours(layer) or all(hasattr(layer, part) for part in PROJECTIONS)
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
        reason = None if mix is not None or _is_ours(layer) else _unknown(layer)
        if reason is not None:
            raise ArgumentError(_refusal(name, layer, reason, mix))
    return found


def _refusal(name: str, layer: nn.Module, reason: str, mix: Mix | None) -> str:
    remedy = f"or layers=[{name!r}] and mix=, which takes q, k and v from such a layer"
    if mix is not None:
        remedy = "or a mix= that does what the layer does"
    return f"layer {name!r}, a {type(layer).__name__}, {reason}: pass layers= without it, {remedy}"


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
    shared_heads = getattr(parts, "num_kv_heads", None) or getattr(parts, "num_key_value_heads", None)
    groups = heads // (shared_heads or heads)

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


def _forward(layer: nn.Module, how: _How, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None, Any]:
    """The attached layer's forward, called as its own is, or as :meth:`MemoryCaching.forward`."""
    where = f"the forward of a {type(layer).__name__} with memory caching attached"
    if len(args) > len(how.names):
        raise ArgumentError(f"{len(args)} arguments by place for {where}, which takes {', '.join(how.names)}")
    given = dict(zip(how.names, args, strict=False)) | kwargs
    hidden_states = given.pop(how.names[0] if how.names[0] in given else "hidden_states", None)
    if not isinstance(hidden_states, Tensor) or hidden_states.dim() != 3:
        raise ArgumentError(f"{how.names[0]} of {where} must be a tensor, [B, T, hidden_size]")
    mask, cache = given.pop("attention_mask", None), given.pop("past_key_values", None)
    if given.pop("use_cache", None) and cache is None and how.triple:
        cache = MemoryCache()
    index = getattr(layer, "layer_idx", None)
    if cache is not None:
        cache = own("past_key_values", cache, MemoryCache)
        if index is None:
            raise ArgumentError("a cache for a layer without layer_idx: give every layer its own layer_idx=0, 1, ...")
    bounds = take_bounds(given, hidden_states.shape[:2], given.pop("cu_seqlens", None), mask)
    # An argument that says what the layer does anyway was there when the layer was checked.
    rest = {name: value for name, value in given.items() if not _same(value, how.defaults.get(name))}
    refuse_rest(where, rest, TAKES)
    started = None if cache is None else cache.layer(index or 0) is not None
    found = as_row(hidden_states, mask, bounds, started)
    if found is None:
        y = _mix(layer, how, hidden_states, None, cache, index)
    else:
        row, bounds, restored = found
        y = restored(_mix(layer, how, row, bounds, cache, index))
    return (y, None, cache) if how.triple else y


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, bool | int | float | str) and value == default)


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
            backend=how.backend,
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
    return mixed.finish(cache.extend(call, index, how.backend, layer))
