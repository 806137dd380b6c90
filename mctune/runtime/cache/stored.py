"""What a cache's file says, held to itself: names, types, shapes and counts. Nothing of it is trusted before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from ..arguments import LARGEST, flag, known, positive, shown, whole
from ..errors import ArgumentError
from ..memory import LayerMemory, Rules
from ..traits import RECURRENCES, STATE_INITS

Tensor = torch.Tensor
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_COUNTS = ("cached", "filled", "dropped")


def options(about: Any, tensors: Mapping[str, Tensor]) -> tuple[int | None, int, torch.dtype | None]:
    """max_states, rewind and state_dtype, and that every tensor is of a layer or a convolution."""
    max_states, rewind, name = _bound(about), _entry(about, "rewind"), about.get("state_dtype")
    whole("rewind", rewind, 0)
    # Files written before state_dtype existed do not have it.
    if name is not None:
        known("state_dtype", name, _DTYPES)
    owners = {f"{index}." for index in _part(about, "layers")}
    for tensor in tensors:
        if tensor[: tensor.find(".") + 1] not in owners:
            raise ArgumentError(f"{shown(tensor)} belongs to no layer")
    return max_states, rewind, None if name is None else _DTYPES[name]


def layers(about: Any, tensors: Mapping[str, Tensor]) -> dict[int, LayerMemory]:
    """The memories by layer index."""
    bound, made = _bound(about), {}
    for index, layer in _part(about, "layers").items():
        rules = _rules(_part(layer, "rules"))
        prefix = f"{_index(index)}."
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        own = {name: x for name, x in own.items() if not name.startswith("convolution.")}
        wide = {_DTYPES[name] for name in (about.get("state_dtype"),) if isinstance(name, str) and name in _DTYPES}
        made[int(index)] = _memory(prefix, own, rules, bound, wide)
    rows = {memory.rows for memory in made.values()}
    if len(rows) > 1:
        raise ArgumentError(f"its layers hold {sorted(rows)} sequences; all must hold as many")
    return made


def convolutions(about: Any, tensors: Mapping[str, Tensor]) -> dict[int, tuple[tuple[Tensor, ...], int]]:
    """The newest inputs of the convolutions by layer index, and how many of them are spare."""
    made: dict[int, tuple[tuple[Tensor, ...], int]] = {}
    for index, spare in _part(about, "convolutions").items():
        if index not in _part(about, "layers"):
            raise ArgumentError(f"it has inputs of a convolution for {shown(index)}, which is no layer of it")
        rows, dtype = tensors[f"{index}.descriptors"].shape[0], None
        inputs = _numbered(tensors, f"{index}.convolution")
        for number, x in enumerate(inputs):
            name = f"{index}.convolution.{number}"
            first = inputs[0]
            fits = x.dim() == 3 and x.is_floating_point() and x.shape[0] == rows and x.shape[:2] == first.shape[:2]
            if not fits or dtype not in (None, x.dtype):
                raise ArgumentError(f"{name} is {x.dtype} {list(x.shape)}; it must be [B={rows}, K, width]")
            dtype = x.dtype
        whole(f"convolutions[{index}]", spare, 0)
        if inputs and spare > inputs[0].shape[1]:
            raise ArgumentError(f"convolutions[{index}]={spare} exceeds the {inputs[0].shape[1]} inputs that there are")
        made[int(index)] = inputs, spare
    named = {f"{index}.convolution.{n}" for index, (inputs, _) in made.items() for n in range(len(inputs))}
    stray = [name for name in tensors if ".convolution." in name and name not in named]
    if stray:
        raise ArgumentError(f"{shown(stray[0])} belongs to no convolution")
    return made


def _memory(
    prefix: str, own: dict[str, Tensor], rules: Rules, bound: int | None, narrow: set[torch.dtype]
) -> LayerMemory:
    layers = range(2 if rules.deep else 1)
    names = ["descriptors", "key_sum", "last_key", "last_value", *_COUNTS]
    names += [f"{name}.{n}" for name in ("states", "online") for n in layers]
    names += [f"{name}.{n}" for name in ("start", "momentum", "initial") for n in layers if rules.deep]
    if set(own) != set(names):
        missing, stray = sorted(set(names) - set(own)), sorted(set(own) - set(names))
        raise ArgumentError(f"{prefix}{missing[0]} is missing" if missing else f"{prefix}{shown(stray[0])} is unknown")
    shapes, compute = _shapes(prefix, own, layers), own["key_sum"].dtype
    for name, x in own.items():
        allowed = {torch.int32} if name in _COUNTS else {compute}
        if name.startswith("states"):
            allowed = {*allowed, *narrow} if own["states.0"].dtype == x.dtype else set()
        if tuple(x.shape) != shapes[name] or x.dtype not in allowed:
            must = " or ".join(sorted(str(dtype) for dtype in allowed)) or "one dtype for all states"
            raise ArgumentError(f"{prefix}{name} is {x.dtype} {list(x.shape)}; it must be {must} {list(shapes[name])}")
    room = own["descriptors"].shape[2]
    _check_counts(prefix, own, room, rules.segment_length, bound)
    # What lies past the states in use has no meaning, but must be finite.
    unused = torch.arange(room) >= own["cached"][:, None]
    for name in ("descriptors", *(f"states.{n}" for n in layers)):
        own[name].transpose(1, 2)[unused] = 0
    parts: dict[str, Any] = {name: own[name] for name in names if "." not in name}
    parts |= {name: _numbered(own, name) for name in ("states", "online", "start", "momentum", "initial")}
    return LayerMemory(**parts, rules=rules, bound=bound)


def _shapes(prefix: str, own: Mapping[str, Tensor], layers: range) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by the sizes of the states under way and the room for cached ones."""
    online = [own[f"online.{n}"] for n in layers]
    room = own["descriptors"].shape[2] if own["descriptors"].dim() == 4 else 0
    if any(x.dim() != 4 or 0 in x.shape for x in online) or room == 0:
        raise ArgumentError(f"{prefix}online is {[list(x.shape) for x in online]}; it must be [B, H, rows, columns]")
    if own["key_sum"].dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"{prefix}key_sum is {own['key_sum'].dtype}; it must be float32 or float64")
    (B, H, Dk, inner), Dv = online[0].shape, online[-1].shape[3]
    widths = [(Dk, inner), (inner, Dv)][: len(layers)]
    shapes: dict[str, tuple[int, ...]] = {
        "descriptors": (B, H, room, Dk), "key_sum": (B, H, Dk), "last_key": (B, H, Dk), "last_value": (B, H, Dv),
    }  # fmt: skip
    shapes |= dict.fromkeys(_COUNTS, (B,))
    for n, width in enumerate(widths):
        shapes |= {f"{name}.{n}": (B, H, *width) for name in ("online", "start", "momentum")}
        shapes |= {f"states.{n}": (B, H, room, *width), f"initial.{n}": (H, *width)}
    return shapes


def _check_counts(prefix: str, own: Mapping[str, Tensor], room: int, C: int, bound: int | None) -> None:
    most = room if bound is None else min(room, bound)
    limits = {"cached": most, "filled": C - 1, "dropped": 0 if bound is None else LARGEST}
    for name, limit in limits.items():
        least, largest = int(own[name].min()), int(own[name].max())
        if least < 0 or largest > limit:
            raise ArgumentError(f"{prefix}{name} reaches from {least} to {largest}; it must be from 0 to {limit}")


def _rules(given: Any) -> Rules:
    names = [f.name for f in fields(Rules)]
    if not isinstance(given, dict) or set(given) != set(names):
        raise ArgumentError(f"the rules of a layer are {', '.join(names)}")
    known("recurrence", given["recurrence"], RECURRENCES)
    known("state_init", given["state_init"], STATE_INITS)
    positive("segment_length", given["segment_length"])
    positive("inner_chunk", given["inner_chunk"])
    flag("memory_residual", given["memory_residual"])
    return Rules(**given)


def _bound(about: Any) -> int | None:
    max_states: int | None = _entry(about, "max_states")
    if max_states is not None:
        whole("max_states", max_states, 0)
    return max_states


def _index(index: str) -> str:
    if not (index.isascii() and index.isdecimal() and str(int(index)) == index and int(index) <= LARGEST):
        raise ArgumentError(f"{shown(index)} is no index of a layer")
    return index


def _entry(about: Any, name: str) -> Any:
    if not isinstance(about, dict) or name not in about:
        raise ArgumentError(f"its metadata has no {name}")
    return about[name]


def _part(about: Any, name: str) -> dict[str, Any]:
    part = _entry(about, name)
    if not isinstance(part, dict):
        raise ArgumentError(f"{name} in its metadata is {shown(part)}")
    return part


def _numbered(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    while f"{name}.{len(found)}" in tensors:
        found.append(tensors[f"{name}.{len(found)}"])
    return tuple(found)
