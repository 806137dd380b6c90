"""A cache as a safetensors file: one tensor a store, the rules in the file's metadata."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError
from ..memory import LayerMemory
from . import stored

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
    # Beside and renamed: a file that is there stays whole until the new one is.
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        library.save_file(tensors, str(beside), metadata={"format": FORMAT, "cache": json.dumps(about)})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_layers(path: Path) -> tuple[dict[int, LayerMemory], _Convolutions, int | None, int, torch.dtype | None]:
    """What :func:`write_layers` wrote: memories, convolutions, max_states, rewind, state_dtype.

    A file may come from anyone: nothing in it is used before :mod:`stored` has held it to the rest.

    Raises:
        ArgumentError: if the file is of another kind, contradicts itself, or without the safetensors package.
    """
    library = _safetensors()
    try:
        with import_module("safetensors").safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ArgumentError(f"{path} is no file of MemoryCache.save: its format is {metadata.get('format')!r}")
        found = library.load_file(str(path))
    except import_module("safetensors").SafetensorError as error:
        raise ArgumentError(f"{path} is no file of MemoryCache.save: {error}") from error
    try:
        with torch.inference_mode(False), torch.no_grad():
            # Copies: what the library hands out is the file itself, and changes with it.
            tensors = {name: x.clone() for name, x in found.items()}
            about = json.loads(metadata.get("cache", "null"))
            return stored.layers(about, tensors), stored.convolutions(about, tensors), *stored.options(about, tensors)
    except (ArgumentError, RecursionError, ValueError) as error:
        reason = "its metadata cannot be read" if not isinstance(error, ArgumentError) else str(error)
        raise ArgumentError(f"{path} is no file of MemoryCache.save: {reason}") from error


def _safetensors() -> Any:
    try:
        return import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        raise ArgumentError("saving and loading a MemoryCache needs safetensors: pip install safetensors") from error
