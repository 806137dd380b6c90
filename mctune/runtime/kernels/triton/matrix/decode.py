"""Launch the decode kernels of a Triton module: new tokens over the cache, which they read and write in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ....errors import KernelError
from ....memory import LayerMemory
from ....traits import AGGREGATIONS
from ..loader import load_parts
from ..places import place_of
from ..tables import DEVICE

MOST_STATES = 16384
"""A program of ssc holds the logits of all states."""


class Memory(NamedTuple):
    """What kernels read and write of a memory; without cached and filled where all sequences are at the same place."""

    states: torch.Tensor
    descriptors: torch.Tensor
    online: torch.Tensor
    key_sum: torch.Tensor
    last_key: torch.Tensor
    last_value: torch.Tensor
    cached: torch.Tensor | None
    filled: torch.Tensor | None


class TritonDecode:
    """y of n new tokens of every sequence by the ``decode_step`` of one rendered module.

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
            ArgumentError: if a count of the memory on the CPU is out of bounds.
            KernelError: if the memory has no room for the states of the tokens, or more states than ssc's kernels take.
        """
        n, capacity = q.shape[1], memory.descriptors.shape[2]
        if self.chooses and capacity > MOST_STATES:
            raise KernelError(f"ssc over {capacity} states exceeds {MOST_STATES}; use backend='eager'")
        # Beyond this bound it changes nothing, and it is a 32-bit argument.
        length = min(segment_length, 2**30)
        counts, (cached_all, filled_all) = place_of(memory, capacity, n, length, q.device)
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        if y.numel() == 0:
            return y
        q, k, v, u = (x.contiguous() for x in (q, k, v, u))
        g, beta, lam = (None if x is None else x.contiguous() for x in (g, beta, lam))
        (states,), (online,) = memory.states, memory.online
        held = Memory(states, memory.descriptors, online, memory.key_sum, memory.last_key, memory.last_value, *counts)
        places = {"memory": held, "cached_all": cached_all, "filled_all": filled_all, "length": length}
        # A launch reads the states once, for all of its tokens.
        for first in range(0, n, self.tokens):
            here = {**places, "first": first, "n": min(self.tokens, n - first)}
            parts = self.decode_step(
                q=q, k=k, v=v, u=u, g=g, beta=beta, lam=lam, y=y, **here, top_k=max(top_k, 1), scale=scale
            )
            if self.decode_combine is not None:
                self.decode_combine(k=k, v=v, parts=parts, y=y, **here)
        return y


LAUNCHER = TritonDecode
