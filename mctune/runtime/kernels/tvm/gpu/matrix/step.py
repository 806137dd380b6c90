"""A decode step: the kernels of ``decode_step`` on tensors, a token a launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .....errors import KernelError
from ..functions import Function, aligned, blocks
from .operation import Operation

Tensor = torch.Tensor
_THREADS = 128


class DecodeStep(Operation):
    """The operation ``decode_step``; arguments as of :class:`Operation`."""

    def __init__(
        self, functions: Mapping[str, Function], problem: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        super().__init__(functions, problem, config)
        self.independent = problem["state_init"] == "independent"
        self.splits, self.columns = config["decode_splits"], min(config["decode_BV"], _THREADS)

    def decode_step(
        self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, g: Tensor | None, beta: Tensor | None, lam: Tensor | None,
        *, memory: Any, y: Tensor, cached_all: int, filled_all: int, first: int, n: int, length: int, top_k: int,
        scale: float,
    ) -> None:  # fmt: skip
        """Tokens first to first + n of q, k, u ``[B, T, H, DK]``, v and y ``[B, T, H, DV]`` over a memory, which is
        written in place, and their y.

        Raises:
            KernelError: if there is no kernel for the dtype of the cached states.
        """
        (B, total, H, _), capacity, DV = q.shape, memory.descriptors.shape[2], v.shape[-1]
        heads, kernel = B * H, f"decode_read_{str(memory.states.dtype).removeprefix('torch.')}"
        if f"{kernel}_kernel" not in self.functions:
            raise KernelError(f"cached states of {memory.states.dtype} have no kernel here; use float32 or float16")
        q, k, v, u = (aligned(x) for x in (q, k, v, u))
        gates = {}
        if self.gated:
            gates = {
                name: q.new_full(q.shape[:3], absent, dtype=torch.float32) if x is None else aligned(x)
                for name, x, absent in (("g", g, 0.0), ("beta", beta, 0.0), ("lam", lam, 1.0))
            }
        parts = memory.online.new_empty((heads, self.splits + 1, DV))
        weights = memory.online.new_empty((heads, capacity + 1)) if self.routed else q
        last = {"last_key": memory.last_key, "last_value": memory.last_value} if self.gated else {}
        uneven = memory.cached is not None
        place: dict[str, Any] = {
            "cached": memory.cached if uneven else q, "filled": memory.filled if uneven else q,
            "capacity": capacity, "length": length, "uneven": int(uneven), "cached_all": cached_all,
            "filled_all": filled_all, "total": total, "H": H,
        }  # fmt: skip
        grid = (blocks(DV, self.columns) * (self.splits + 1), heads, 1)
        for token in range(first, first + n):
            place["first"] = token
            if self.routed:
                self.launch(
                    "decode_gates", (heads, 1, 1), u, u=u, k=k, descriptors=memory.descriptors, key_sum=memory.key_sum,
                    weights=weights, top_k=top_k, **place,
                )  # fmt: skip
            self.launch(
                kernel, grid, q, q=q, k=k, v=v, states=memory.states, online=memory.online, weights=weights,
                parts=parts, **last, **gates, scale=scale, splits=self.splits, independent=int(self.independent),
                **place,
            )  # fmt: skip
            self.launch(
                "decode_combine", (heads, 1, 1), k, k=k, v=v, y=y, parts=parts, descriptors=memory.descriptors,
                key_sum=memory.key_sum, **last, splits=self.splits, independent=int(self.independent), **place,
            )  # fmt: skip
