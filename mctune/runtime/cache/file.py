"""A cache as a safetensors file: one tensor a store, the rules in the file's metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError
from ..memory import LayerMemory, Rules

Tensor = torch.Tensor
FORMAT = "memory-cache-1"
_Convolutions = dict[int, tuple[tuple[Tensor, ...], int]]


def write_layers(
    path: Path,
    layers: dict[int, LayerMemory],
    convolutions: _Convolutions,
    max_states: int | None,
    rewind: int,
    state_dtype: torch.dtype | None,
) -> None:
    """Write memories and the convolutions' inputs; room beyond the states in use is left out.

    Args:
        path: of the safetensors file, which is overwritten.
        layers: the memory of each layer, by its index.
        convolutions: of each layer, the newest inputs of its convolutions, [B, K, width] each, and how many of the
            oldest of the K are there only to go back.
        max_states, rewind, state_dtype: the cache's options.

    Raises:
        ArgumentError: without the safetensors package.
    """
    library = _safetensors()
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {"max_states": max_states, "rewind": rewind, "layers": {}, "convolutions": {}}
    about["state_dtype"] = None if state_dtype is None else str(state_dtype).removeprefix("torch.")
    for index, memory in layers.items():
        assert memory.rules is not None
        about["layers"][index] = {"rules": asdict(memory.rules)}
        used = max(1, int(memory.cached.max()))
        for name, x in memory.stores():
            full = name.startswith(("states", "descriptors"))
            tensors[f"{index}.{name}"] = (x[:, :, :used] if full else x).detach().contiguous().clone()
    for index, (inputs, spare) in convolutions.items():
        about["convolutions"][index] = spare
        for number, x in enumerate(inputs):
            tensors[f"{index}.convolution.{number}"] = x.detach().contiguous().clone()
    library.save_file(tensors, str(path), metadata={"format": FORMAT, "cache": json.dumps(about)})


def read_layers(path: Path) -> tuple[dict[int, LayerMemory], _Convolutions, int | None, int, torch.dtype | None]:
    """What :func:`write_layers` wrote: memories, convolutions, max_states, rewind, state_dtype.

    Raises:
        ArgumentError: if the file is of another kind, or without the safetensors package.
    """
    library = _safetensors()
    with import_module("safetensors").safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ArgumentError(f"{path} is no file of MemoryCache.save: its format is {metadata.get('format')!r}")
    about, tensors = json.loads(metadata["cache"]), library.load_file(str(path))
    layers = {}
    for index, layer in about["layers"].items():
        parts: dict[str, Any] = {}
        for f in fields(LayerMemory):
            whole = f"{index}.{f.name}"
            if whole in tensors:
                parts[f.name] = tensors[whole]
            elif f.name in ("states", "online", "start", "momentum", "initial"):
                parts[f.name] = _numbered(tensors, whole)
        parts["bound"] = about["max_states"]
        layers[int(index)] = LayerMemory(rules=Rules(**layer["rules"]), **parts)
    convolutions = {
        int(index): (_numbered(tensors, f"{index}.convolution"), spare)
        for index, spare in about["convolutions"].items()
    }
    # Files written before state_dtype existed do not have it.
    name = about.get("state_dtype")
    return layers, convolutions, about["max_states"], about["rewind"], None if name is None else getattr(torch, name)


def _numbered(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, ...]:
    count = sum(key.startswith(f"{name}.") for key in tensors)
    return tuple(tensors[f"{name}.{number}"] for number in range(count))


def _safetensors() -> Any:
    try:
        return import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        raise ArgumentError("saving and loading a MemoryCache needs safetensors: pip install safetensors") from error
