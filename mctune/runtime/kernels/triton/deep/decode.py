"""Launch the decode kernels of a Triton package for deep memories: new tokens over the cache, in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ....errors import KernelError
from ....memory import LayerMemory
from ....traits import AGGREGATIONS
from ..loader import load_parts
from ..matrix.decode import MOST_STATES
from ..places import place_of
from ..tables import DEVICE

Tensor = torch.Tensor


class Tokens(NamedTuple):
    """q, k, u [B, n, H, Dk], v, y [B, n, H, Dv], of one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    u: Tensor
    y: Tensor


class Strengths(NamedTuple):
    """Gates of the write [B, n, H], float32, or None."""

    g: Tensor | None
    eta: Tensor | None
    mu: Tensor | None


class Memory(NamedTuple):
    """What kernels read and write of a memory; without cached and filled where all sequences are at the same place."""

    up: Tensor | None = None
    down: Tensor | None = None
    cached: Tensor | None = None
    filled: Tensor | None = None
    online_up: Tensor | None = None
    online_down: Tensor | None = None
    start_up: Tensor | None = None
    start_down: Tensor | None = None
    momentum_up: Tensor | None = None
    momentum_down: Tensor | None = None
    initial_up: Tensor | None = None
    initial_down: Tensor | None = None
    descriptors: Tensor | None = None
    key_sum: Tensor | None = None


class TritonDeepDecode:
    """y of n new tokens of every sequence, one after another, by the rendered modules of one configuration.

    Args:
        kernel: a file beside the rendered modules.
        record: its entry in the tuned table; ``record["problem"]`` names the aggregation, ``record["parts"]`` the
            modules.
        parts: the modules by operation, instead of those that ``record`` names.
    """

    device, dtype = DEVICE, None
    """What the tensors that it reads are on and in; the dtype is the call's own, one for q, k, v and u."""

    def __init__(self, kernel: Path, record: Mapping[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        parts = load_parts(kernel.parent, record["parts"]) if parts is None else parts
        self.gates = parts["deep_decode_gates"].deep_decode_gates if "deep_decode_gates" in parts else None
        self.step = parts["deep_decode"].deep_decode
        self.mix = parts["deep_decode_mix"].deep_decode_mix if "deep_decode_mix" in parts else None
        self.combine = parts["deep_decode_combine"].deep_decode_combine
        reads = AGGREGATIONS[record["problem"]["aggregation"]]
        self.most = MOST_STATES if reads.routed else None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        u: Tensor,
        *,
        g: Tensor | None,
        eta: Tensor | None,
        mu: Tensor | None,
        W_up: Tensor,
        W_down: Tensor,
        memory_residual: bool,
        inner_chunk: int,
        scale: float,
        top_k: int,
        segment_length: int,
        memory: LayerMemory,
    ) -> Tensor:
        """y ``[B, n, H, Dv]`` from q, k, u ``[B, n, H, Dk]``, v, all of one dtype, and float32 gates ``[B, n, H]``.

        The tensors of ``memory``, contiguous and float32, its states float32, bfloat16 or float16, are written in
        place; its counts stay. ``W_up`` and ``W_down`` are what an empty memory starts from; the memory has its own.
        Counts on the CPU are checked; counts on the device are not waited for: a state that there is no room for is
        left out of the cache.

        Raises:
            ArgumentError: if a count of the memory on the CPU is out of bounds.
            KernelError: if the memory has no room for the states of the tokens, or more states than the gates' kernel
                takes.
        """
        n, capacity = q.shape[1], memory.descriptors.shape[2]
        if self.most is not None and capacity > self.most:
            raise KernelError(f"learned gates over {capacity} states exceed {self.most}; use backend='eager'")
        length = min(segment_length, 2**30)  # beyond this bound it changes nothing, and it is a 32-bit argument
        counts, (cached_all, filled_all) = place_of(memory, capacity, n, length, q.device)
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        if y.numel() == 0:
            return y
        tokens = Tokens(q.contiguous(), k.contiguous(), v.contiguous(), u.contiguous(), y)
        strengths = Strengths(*(None if x is None else x.contiguous() for x in (g, eta, mu)))
        initial = memory.initial or (W_up.contiguous(), W_down.contiguous())
        pairs = {"online": memory.online, "start": memory.start, "momentum": memory.momentum, "initial": initial}
        found = dict(zip(("cached", "filled", "up", "down"), (*counts, *memory.states), strict=True))
        found |= {"descriptors": memory.descriptors, "key_sum": memory.key_sum}
        for name, pair in pairs.items():
            found |= {f"{name}_up": pair[0], f"{name}_down": pair[1]}
        held = Memory(**found)
        # More than all states cannot be chosen.
        most = max(1, min(top_k, capacity))
        for first in range(n):
            here: dict[str, Any] = {
                "memory": held, "cached_all": cached_all, "filled_all": filled_all, "first": first, "length": length
            }  # fmt: skip
            shares, parts = None, None
            if self.gates is not None:
                shares, parts = self.gates(tokens=tokens, **here, top_k=most)
            parts = self.step(
                tokens=tokens, strengths=strengths, **here, shares=shares, parts=parts, top_k=most, scale=scale,
                adds=memory_residual,
            )  # fmt: skip
            if self.mix is not None:
                parts = self.mix(**here, shares=shares, parts=parts, top_k=most)
            self.combine(tokens=tokens, **here, reads=parts.reads, scale=scale, adds=memory_residual)
        return y


LAUNCHER = TritonDeepDecode
