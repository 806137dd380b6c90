"""Operations of a cache in random order, held to every row computed again from its first token.

``python -m tests.fuzz.cache --minutes 60``
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mctune.runtime.api.module import MemoryCaching
from mctune.runtime.cache.cache import MemoryCache
from mctune.runtime.errors import ArgumentError
from mctune.runtime.traits import AGGREGATIONS, RECURRENCES, STATE_INITS
from tests.fuzz.driver import main
from tests.fuzz.kernels import layer_served

HIDDEN = 8
MODES = (torch.no_grad, torch.inference_mode, contextlib.nullcontext)
DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3, torch.bfloat16: float("inf")}
"""Largest difference over the outputs' RMS; in 16 bits a layer's norm makes much of a small one."""


class Run:
    """A model, a cache, and the tokens of every row so far; ``served`` are layers' options that tuned kernels serve."""

    def __init__(self, draw: random.Random, served: Callable[[random.Random], dict[str, Any]] | None = None) -> None:
        self.draw, self.log = draw, ""
        torch.manual_seed(draw.randrange(2**31))
        self.dtype = torch.float32 if served else draw.choice(DTYPES)
        options: dict[str, Any] = {
            "recurrence": draw.choice(tuple(RECURRENCES)), "aggregation": draw.choice(tuple(AGGREGATIONS)),
            "state_init": draw.choice(STATE_INITS), "num_heads": draw.choice((1, 2)), "backend": "eager",
        }  # fmt: skip
        options |= {
            "segment_length": draw.randint(1, 5), "inner_chunk": draw.randint(1, 4), "top_k": draw.randint(1, 3),
            "use_short_conv": draw.random() < 0.3, "conv_size": draw.randint(1, 4),
            "segmentation": draw.choice(("constant", "constant", "packed")), "memory_residual": draw.random() < 0.7,
        }  # fmt: skip
        options |= served(draw) if served else {}
        self.layers = [MemoryCaching(HIDDEN, layer_idx=i, **options).to(self.dtype) for i in range(draw.randint(1, 2))]
        for layer in self.layers:
            self._stir(layer)
        narrow = draw.choice((None, None, None, torch.bfloat16, torch.float16))
        if narrow is not None:
            for layer in self.layers:
                layer.norm = torch.nn.Identity()  # makes much of a difference where an output is small by chance
        self.bound, self.rewind = draw.choice((None, None, 0, 1, 3)), draw.choice((0, 0, 1, 3, 6))
        self.cache_options: dict[str, Any] = {"max_states": self.bound, "rewind": self.rewind, "state_dtype": narrow}
        self.tolerance = max(TOLERANCE[self.dtype], 0.0 if narrow is None else 0.25)
        if narrow is not None and AGGREGATIONS[options["aggregation"]].sparse:
            self.tolerance = float("inf")  # what is rounded may be chosen otherwise
        self.cache, self.rows, self.sure = MemoryCache(**self.cache_options), [], []
        self.log = f"{options} {len(self.layers)} layers {self.dtype} {self.cache_options}\n"
        self.packs = options["segmentation"] == "packed"

    @torch.no_grad()
    def _stir(self, layer: MemoryCaching) -> None:
        for name, gate in layer.gates.items():
            gate.weight.normal_(std=0.3)
            if name == "eta_proj":
                gate.bias.fill_(-4.0)  # so small that no memory diverges

    def tokens(self, *shape: int) -> Tensor:
        return torch.randn(*shape, HIDDEN, dtype=torch.float64).to(self.dtype)

    def forward(self, x: Tensor, cache: MemoryCache | None, **given: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, past_key_values=cache, **given)[0]
        return x

    @torch.no_grad()
    def again(self, row: Tensor) -> Tensor:
        """The outputs [n, D] of a row [n, D] from scratch; token by token where a cache changes what is read."""
        one = {"cu_seqlens": torch.tensor([0, len(row)], dtype=torch.int32)} if self.packs else {}
        if self.bound is None and self.cache_options["state_dtype"] is None:
            return self.forward(row[None], None, **one)[0]
        fresh = MemoryCache(self.bound, state_dtype=self.cache_options["state_dtype"])
        first = self.forward(row[None, :1], fresh, **({"cu_seqlens": torch.tensor([0, 1])} if self.packs else {}))
        return torch.cat([first, *(self.forward(row[None, i : i + 1], fresh) for i in range(1, len(row)))], 1)[0]

    def hold(self, row: int, y: Tensor) -> None:
        """y [n, D] are the outputs of the newest tokens of a row."""
        if len(y) == 0:
            return
        wanted = self.again(self.rows[row])[-len(y) :].double()
        error = float((y.double() - wanted).abs().max() / wanted.square().mean().sqrt().clamp(min=1e-3))
        assert bool(y.isfinite().all()), f"row {row} is not finite\n{self.log}"
        assert error <= self.tolerance, f"row {row} is off by {error:.2g} of its RMS\n{self.log}"

    def lengths(self) -> None:
        held = self.cache.lengths.tolist()
        assert held == [len(row) for row in self.rows], f"lengths {held}\n{self.log}"
        assert 0 <= self.cache.nbytes <= self.cache.reserved_bytes, f"bytes\n{self.log}"

    # --- the operations

    def prompt(self) -> None:
        B, T, form = self.draw.randint(1, 3), self.draw.randint(1, 14), self.draw.choice(("plain", "mask", "packed"))
        if self.packs:
            form = "packed"
        lengths = [T] * B if form == "plain" else [self.draw.randint(0, T) for _ in range(B)]
        lengths[self.draw.randrange(B)] = T
        self.log += f"prompt {form} {lengths}\n"
        self.rows, self.sure = [self.tokens(n) for n in lengths], [min(n, self.rewind) for n in lengths]
        if form == "packed":
            bounds = torch.tensor(
                [0, *torch.tensor(lengths).cumsum(0)], dtype=self.draw.choice((torch.int32, torch.int64))
            )
            y = self.forward(torch.cat(self.rows)[None], self.cache, cu_seqlens=bounds)[0].split(lengths)
        else:
            x = torch.stack([torch.cat([self.tokens(T - len(row)), row]) for row in self.rows])
            mask = torch.tensor([[0] * (T - n) + [1] * n for n in lengths])
            given = {"attention_mask": mask} if form == "mask" else {}
            y = [out[T - n :] for out, n in zip(self.forward(x, self.cache, **given), lengths, strict=True)]
        for row, out in enumerate(y):
            self.hold(row, out)

    def extend(self) -> None:
        n = self.draw.choice((1, 1, 2, self.draw.randint(1, 12)))
        self.log += f"extend {n}\n"
        x = self.tokens(len(self.rows), n)
        given = (
            {"attention_mask": torch.ones(len(self.rows), n + self.draw.randint(0, 3))}
            if self.draw.random() < 0.2
            else {}
        )
        y = self.forward(x, self.cache, **given)
        self.rows = [torch.cat(pair) for pair in zip(self.rows, x, strict=True)]
        self.sure = [min(self.rewind, sure + n) for sure in self.sure]
        for row in range(len(self.rows)):
            self.hold(row, y[row])

    def select(self) -> None:
        picked = [self.draw.randrange(len(self.rows)) for _ in range(self.draw.randint(1, 4))]
        self.log += f"select {picked}\n"
        how = self.draw.choice((self.cache.batch_select_indices, self.cache.reorder_cache))
        how(torch.tensor(picked, dtype=self.draw.choice((torch.int32, torch.int64))))
        self.rows, self.sure = [self.rows[i] for i in picked], [self.sure[i] for i in picked]

    def repeat(self) -> None:
        times = self.draw.randint(1, 2) if len(self.rows) < 4 else 1
        self.log += f"repeat {times}\n"
        self.cache.batch_repeat_interleave(times)
        self.rows = [row for row in self.rows for _ in range(times)]
        self.sure = [sure for sure in self.sure for _ in range(times)]

    def crop(self) -> None:
        longest = max(map(len, self.rows))
        length = self.draw.choice((-self.draw.randint(1, max(1, self.rewind)), self.draw.randint(0, longest + 1), -1))
        self.log += f"crop {length} of {[len(row) for row in self.rows]}, sure {self.sure}\n"
        kept = [max(0, len(row) + length) if length < 0 else min(len(row), length) for row in self.rows]
        gone = [len(row) - n for row, n in zip(self.rows, kept, strict=True)]
        try:
            self.cache.crop(length)
        except ArgumentError as error:
            self.log += f"refused: {error}\n"
            assert any(n > sure for n, sure in zip(gone, self.sure, strict=True)), f"refused\n{self.log}"
            assert f"MemoryCache(rewind={self.rewind})" not in str(error), self.log
            return
        self.rows = [row[:n] for row, n in zip(self.rows, kept, strict=True)]
        self.sure = [max(0, sure - n) for sure, n in zip(self.sure, gone, strict=True)]
        if any(gone) and not any(kept):
            self.rows = self.sure = []

    def save(self) -> None:
        self.log += "save, load\n"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            self.cache.save(path)
            before, self.cache = self.cache, MemoryCache.load(path)
            self._junk(before)
            before.save(path)  # what was loaded is not the file
        self.sure = [0] * len(self.rows)

    def copy(self) -> None:
        self.log += "copy\n"
        before, how = self.cache, self.draw.choice((copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))))
        self.cache = how(before)
        self._junk(before)

    def _junk(self, cache: MemoryCache) -> None:
        """Tokens into a cache that nothing shares with ours."""
        self.forward(self.tokens(len(self.rows), self.draw.randint(1, 7)), cache)

    def reserve(self) -> None:
        self.log += "reserve\n"
        self.cache.reserve(self.draw.randint(0, 40))
        self.cache.to("cpu")

    def refused(self) -> None:
        """What must be refused changes nothing."""
        self.log += "refused\n"
        rows = len(self.rows)
        bad: tuple[Callable[[], Any], ...] = (
            lambda: self.cache.reorder_cache(torch.ones(rows, dtype=torch.bool)),
            lambda: self.cache.batch_select_indices(torch.zeros(rows)),
            lambda: self.cache.batch_select_indices(torch.tensor([rows])),
            lambda: self.cache.batch_select_indices(torch.tensor([-1])),
            lambda: self.cache.batch_select_indices([0]),  # type: ignore[arg-type]
            lambda: self.cache.batch_repeat_interleave(0),
            lambda: self.cache.crop(1.5),  # type: ignore[arg-type]
            lambda: self.cache.reserve(-1),
            lambda: self.forward(self.tokens(rows + 1, 1), self.cache),
            lambda: self.forward(self.tokens(1, rows), self.cache, cu_seqlens=torch.arange(rows + 1)),
            lambda: self.forward(self.tokens(rows, 1), self.cache, attention_mask=torch.zeros(rows, 1)),
            lambda: self.layers[0].__class__(HIDDEN, layer_idx=0)(
                self.tokens(rows, 1).float(), past_key_values=self.cache
            ),
        )
        try:
            self.draw.choice(bad)()
        except ArgumentError:
            return
        raise AssertionError(f"accepted\n{self.log}")


def case(draw: random.Random, served: Callable[[random.Random], dict[str, Any]] | None = None) -> str:
    """One cache, up to ten operations."""
    run = Run(draw, served)
    with torch.no_grad():
        run.prompt()
    for _ in range(draw.randint(2, 10)):
        names = ("extend",) * 4 + ("crop",) * 3 + ("select", "select", "repeat", "save", "copy", "reserve", "refused")
        name = draw.choice(names) if run.rows else "prompt"
        mode = draw.choice(MODES)
        try:
            with mode():
                getattr(run, name)()
                run.lengths()
        except AssertionError:
            raise
        except Exception as error:
            raise type(error)(f"{error}\nin {name} under {mode.__name__}\n{run.log}") from error
    return f"{run.layers[0].recurrence}{' on kernels' if served else ''}"


if __name__ == "__main__":
    main("cache", case, partial(case, served=layer_served))
