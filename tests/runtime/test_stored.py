"""A cache's file from someone else: whatever was changed in it, it is refused, or it is a cache that works."""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mctune.runtime.api.module import MemoryCaching
from mctune.runtime.cache.cache import MemoryCache
from mctune.runtime.cache.file import FORMAT
from mctune.runtime.errors import ArgumentError
from mctune.runtime.traits import RECURRENCES

Tensor = torch.Tensor
VALUES: tuple[Any, ...] = (
    None, -1, 0, 1, 3, 2**31, 2**70, 1.5, 1e300, "x", "", "linear", "float16",
    True, [], [1], {}, {"0": 1}, "1", "²", " 0",
)  # fmt: skip
CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x[:1], lambda x: torch.cat([x, x]), lambda x: x[..., :1], lambda x: x[None], lambda x: x[:0],
    lambda x: x.sum(),
    lambda x: x.double(), lambda x: x.half(), lambda x: x.float(), lambda x: x.long(), lambda x: x.int(),
    lambda x: x.bool(),
    lambda x: x.mT if x.dim() > 1 else x, lambda x: x + 1, lambda x: x - 1, lambda x: x + 2**30, lambda x: x * 0 - 5,
    lambda x: x.flatten(), lambda x: torch.cat([x, x], -1), lambda x: torch.cat([x, x], 2) if x.dim() > 2 else x,
)  # fmt: skip


def saved(draw: random.Random, path: Path) -> tuple[dict[str, Tensor], Any, MemoryCaching]:
    recurrence, rows = draw.choice(tuple(RECURRENCES)), draw.randint(1, 2)
    layer = MemoryCaching(
        8, 2, recurrence=recurrence, state_init=draw.choice(("independent", "checkpoint")), segment_length=3,
        inner_chunk=2, use_short_conv=draw.random() < 0.5, layer_idx=0, backend="eager",
    )  # fmt: skip
    cache = MemoryCache(draw.choice((None, 2)), draw.choice((0, 2)), draw.choice((None, torch.float16)))
    with torch.no_grad():
        layer(torch.randn(rows, draw.randint(1, 13), 8), past_key_values=cache)
    cache.save(path)
    with safe_open(str(path), "pt") as file:
        about = json.loads(file.metadata()["cache"])
    return {name: x.clone() for name, x in load_file(str(path)).items()}, about, layer


def spoil(draw: random.Random, tensors: dict[str, Tensor], about: Any) -> Any:
    """One change, anywhere."""
    name, kind = draw.choice(sorted(tensors)), draw.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[draw.choice(("x", "0.x", "1.states.0", "0.states.7", "0.convolution.9", name + "."))] = tensors[
            name
        ].clone()
    elif kind < 5:
        tensors[name] = draw.choice(CHANGES)(tensors[name]).contiguous().clone()
    else:
        place = about
        while True:
            key = draw.choice(sorted(place))
            if not isinstance(place[key], dict) or not place[key] or draw.random() < 0.2:
                break
            place = place[key]
        value = draw.choice(VALUES)
        if kind == 5:
            del place[key]
        elif kind == 6:
            place[str(value)] = place.pop(key)
        else:
            place[key] = value
    return about


def test_a_file_that_was_changed_anywhere(tmp_path: Path) -> None:
    seed, path = secrets.randbelow(2**31), tmp_path / "cache"
    for number in range(60):
        draw = random.Random(f"{seed} {number}")
        tensors, about, layer = saved(draw, path)
        about = spoil(draw, tensors, about)
        save_file(tensors, str(path), metadata={"format": FORMAT, "cache": json.dumps(about)})
        try:
            cache = MemoryCache.load(path)
        except ArgumentError as error:
            assert "\n" not in str(error), (seed, number, str(error))
            continue
        rows = max(1, len(cache.lengths))
        try:
            with torch.no_grad():
                for n in (1, 4):
                    assert layer(torch.randn(rows, n, 8), past_key_values=cache)[0].shape == (rows, n, 8)
                cache.crop(-1)
        except ArgumentError:
            continue  # another layer's
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {number}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "1", "[" * 100_000, '{"layers": NaN}'])
def test_metadata_that_is_none(text: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, str(tmp_path / "cache"), metadata={"format": FORMAT, "cache": text})
    with pytest.raises(ArgumentError, match="is no file of MemoryCache"):
        MemoryCache.load(tmp_path / "cache")


def test_a_file_of_another_kind_or_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    saved(random.Random(1), path)
    whole = path.read_bytes()
    for content in (b"", b"x" * 100, whole[: len(whole) // 2], whole[:9], b"\xff" * 16 + whole):
        path.write_bytes(content)
        with pytest.raises(ArgumentError, match="is no file of MemoryCache"):
            MemoryCache.load(path)


def test_a_loaded_cache_is_not_its_file(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    saved(random.Random(2), path)
    cache = MemoryCache.load(path)
    before = [x.clone() for _, x in cache.layer(0).stores()]  # type: ignore[union-attr]
    content = bytearray(path.read_bytes())
    with path.open("r+b") as file:
        file.seek(len(content) // 2)
        file.write(b"\x7f" * (len(content) - len(content) // 2))
    for x, (name, now) in zip(before, cache.layer(0).stores(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(x, now), name


def test_a_save_that_fails_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    path = tmp_path / "cache"
    saved(random.Random(3), path)
    whole = path.read_bytes()

    def full(tensors: object, file: str, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        MemoryCache().save(path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]
