"""Memory with a fence before and after it: what a kernel writes beside an array is seen, what it reads there is NaN."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Tensor = torch.Tensor
FENCE = 4096
"""Bytes of each fence; a multiple of every alignment that a launcher asks for."""
_BYTE = 0xFF
"""Everywhere in a fence: NaN in every float type, -1 in integers."""


class Fences:
    """Rooms for arrays, each between two fences."""

    def __init__(self) -> None:
        self._rooms: list[tuple[str, Tensor]] = []
        self._storages: set[int] = set()

    def around(self, name: str, x: Tensor) -> Tensor:
        """A copy of ``x``, of the same strides, between two fences; ``name`` is for the report."""
        if x.device.type == "meta" or x.is_sparse or x.is_quantized:
            return x
        # A contiguous one alone: what else its storage holds must not be where the fence should be.
        alone = x.is_contiguous()
        size = x.numel() * x.itemsize if alone else x.untyped_storage().nbytes() // x.itemsize * x.itemsize
        room = torch.empty(size + 2 * FENCE, dtype=torch.uint8, device=x.device)
        room[:FENCE] = _BYTE
        room[FENCE + size :] = _BYTE
        typed = room[FENCE : FENCE + size].view(x.dtype)
        if alone:
            inside = typed.view(x.shape)
            inside.copy_(x)
        else:
            typed.copy_(torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage()))
            inside = typed.as_strided(x.size(), x.stride(), typed.storage_offset() + x.storage_offset())
        self._rooms.append((name, room))
        self._storages.add(room.untyped_storage().data_ptr())
        return inside

    def holds(self, x: Tensor) -> bool:
        """Whether ``x`` stands between fences."""
        return x.untyped_storage().data_ptr() in self._storages

    def broken(self) -> str | None:
        """The first array beside which something was written, and on which side."""
        for name, room in self._rooms:
            for side, fence in (("before", room[:FENCE]), ("after", room[len(room) - FENCE :])):
                if not bool((fence == _BYTE).all()):
                    return f"it wrote {side} the memory of {name}"
        return None


class FencedAllocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside ``with``, whatever torch allocates stands between ``fences``."""

    def __init__(self, fences: Fences) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fences = fences

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs or {}))}
        name = str(func).removeprefix("aten.").partition(".")[0]

        def inside(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() in given or self._fences.holds(x):
                return x
            return self._fences.around(f"an array made by {name} {list(x.shape)}", x)

        return map_tensors(lambda _, x: inside(x), found)


def map_tensors(function: Callable[[str, Tensor], Tensor], value: Any, name: str = "") -> Any:
    """``value`` with every tensor in it replaced: in tuples, lists, mappings and dataclasses; ``name`` says where."""
    if isinstance(value, Tensor):
        return function(name, value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, x, _joined(name, key)) for key, x in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, getattr(value, key), _joined(name, key)) for key in value._fields))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, x, _joined(name, str(index))) for index, x in enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.init]
        return replace(value, **{key: map_tensors(function, getattr(value, key), _joined(name, key)) for key in names})
    return value


def named_tensors(value: Any) -> dict[str, Tensor]:
    """Every tensor in ``value``, by where it is."""
    found: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> Tensor:
        found[name] = x
        return x

    map_tensors(note, value)
    return found


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _tensors(value: Any) -> list[Tensor]:
    return list(named_tensors(value).values())
