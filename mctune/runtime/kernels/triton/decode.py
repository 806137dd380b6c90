"""Launch the decode kernels of a Triton module: new tokens over the cache, which they read and write in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...memory import LayerMemory
from ...traits import AGGREGATIONS
from ..tvm.loader import KernelError
from .loader import load_parts
from .tables import DEVICE

MOST_STATES = 16384
"""A program of ssc holds the logits of all states."""


class TritonDecode:
    """y of n new tokens of every sequence by the ``decode_step`` of one rendered module.

    Args:
        kernel: a file beside the rendered modules.
        record: its entry in the tuned table; ``record["problem"]`` names the aggregation, ``record["parts"]`` the
            modules.
        parts: the modules by operation, instead of those that ``record`` names.
    """

    device, dtype = DEVICE, None
    """Of the tensors that it reads; the dtype is the call's own, one for q, k, v and u."""

    def __init__(self, kernel: Path, record: Mapping[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        parts = load_parts(kernel.parent, record["parts"]) if parts is None else parts
        self.decode_step = parts["decode_step"].decode_step
        self.decode_combine = parts["decode_combine"].decode_combine if "decode_combine" in parts else None
        self.tokens = record["config"]["decode_TOKENS"]
        self.chooses = AGGREGATIONS[record["problem"]["aggregation"]].sparse

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        u: torch.Tensor,
        *,
        g: torch.Tensor | None,
        beta: torch.Tensor | None,
        lam: torch.Tensor | None,
        scale: float,
        top_k: int,
        segment_length: int,
        memory: LayerMemory,
    ) -> torch.Tensor:
        """y ``[B, n, H, Dv]`` from q, k, u ``[B, n, H, Dk]``, v, all of one dtype, and float32 gates ``[B, n, H]``.

        The tensors of ``memory``, contiguous and float32, its states float32, bfloat16 or float16, are written in
        place; its counts stay. Counts on the CPU are checked, and passed as numbers where all sequences are at the same
        place. Counts on the device are not waited for: a state that there is no room for is left out of the cache.

        Raises:
            KernelError: if the memory has no room for the states of the tokens, or more states than ssc's kernels take.
        """
        n, (states,), (online,), descriptors = q.shape[1], memory.states, memory.online, memory.descriptors
        capacity = descriptors.shape[2]
        if self.chooses and capacity > MOST_STATES:
            raise KernelError(f"ssc over {capacity} states exceeds {MOST_STATES}; use backend='eager'")
        # Beyond this bound it changes nothing, and it is a 32-bit argument.
        length = min(segment_length, 2**30)
        cached, filled = memory.cached, memory.filled
        counts: tuple[torch.Tensor | None, torch.Tensor | None] = (cached, filled)
        numbers = (0, 0)
        if cached.device.type == "cpu":
            where = set(zip(cached.tolist(), filled.tolist(), strict=True))
            needed = max((used + (begun + n) // length for used, begun in where), default=0)
            if needed > capacity:
                raise KernelError(
                    f"{n} more tokens need room for {needed} states and the memory has room for {capacity}; "
                    f"call memory.reserve({n}) first"
                )
            if len(where) == 1:
                counts, (numbers,) = (None, None), where
            elif q.device.type != "cpu":
                both = torch.stack((cached, filled)).to(q.device, non_blocking=True)
                counts = (both[0], both[1])
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        if y.numel() == 0:
            return y
        q, k, v, u = (x.contiguous() for x in (q, k, v, u))
        g, beta, lam = (None if x is None else x.contiguous() for x in (g, beta, lam))
        last = {"key_sum": memory.key_sum, "last_key": memory.last_key, "last_value": memory.last_value}
        places = {"cached": counts[0], "filled": counts[1], "cached_all": numbers[0], "filled_all": numbers[1]}
        # A launch reads the states once, for all of its tokens.
        for first in range(0, n, self.tokens):
            here = {**places, "length": length, "first": first, "n": min(self.tokens, n - first)}
            parts, stats = self.decode_step(
                q=q, k=k, v=v, u=u, g=g, beta=beta, lam=lam, states=states, descriptors=descriptors, online=online,
                **last, y=y, **here, top_k=max(top_k, 1), scale=scale,
            )  # fmt: skip
            if self.decode_combine is not None:
                self.decode_combine(k=k, v=v, **last, parts=parts, stats=stats, y=y, **here)
        return y
