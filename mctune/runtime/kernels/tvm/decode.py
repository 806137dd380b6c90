"""Launch the decode kernel of one exported library: new tokens over the cache, which it reads and writes in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...memory import LayerMemory
from ...traits import RECURRENCES
from .loader import KernelError, load_library, runnable

_INT32 = 2**31 - 1


class TvmDecode:
    """y of n new tokens of every sequence, on the CPU by ``decode_step`` of one library.

    Args:
        library: the exported ``.so``.
        record: its entry in the tuned table; ``record["problem"]`` names the recurrence and the widths,
            ``cpu_flags`` what the library needs of the CPU.

    Raises:
        KernelError: if the library cannot be run on this machine.
    """

    device, dtype = "cpu", torch.float32
    """Of the tensors that it reads."""

    def __init__(self, library: Path, record: Mapping[str, Any]) -> None:
        self.decode_step = load_library(runnable(library, record))["decode_step"]
        self.gated = RECURRENCES[record["problem"]["recurrence"]].gated
        self._nothing = torch.zeros(1, 1, 1)

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
        """y ``[B, n, H, Dv]``, float32, from float32 q, k, u ``[B, n, H, Dk]``, v and gates ``[B, n, H]``.

        The tensors of ``memory``, float32, contiguous and of any alignment, are written in place; its counts stay.

        Raises:
            KernelError: if the cached states are of 16 bits, the memory has no room for those of the tokens, or an
                array has more elements than the kernel's 32-bit indices reach.
        """
        B, n, H, Dk = q.shape
        (states,), (online,), descriptors = memory.states, memory.online, memory.descriptors
        cached, filled = memory.cached, memory.filled
        if states.dtype != torch.float32:
            raise KernelError(
                f"cached states of {states.dtype}, and kernels of the CPU read torch.float32; use "
                "MemoryCache(state_dtype=None)"
            )
        needed = max(
            used + (begun + n) // segment_length for used, begun in zip(cached.tolist(), filled.tolist(), strict=True)
        )
        if needed > descriptors.shape[2]:
            raise KernelError(
                f"{n} more tokens need room for {needed} states and the memory has room for {descriptors.shape[2]}; "
                f"call memory.reserve({n}) first"
            )
        largest = max(states.numel(), n * (online.numel() // min(Dk, v.shape[3])))
        if largest > _INT32:
            raise KernelError(
                f"an array of {largest} elements exceeds 2^31 - 1; split the batch, or use backend='eager'"
            )
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        nothing = self._nothing
        if self.gated:
            gates = tuple(
                q.new_full((B, n, H), absent) if gate is None else gate.contiguous()
                for gate, absent in ((g, 0.0), (beta, 0.0), (lam, 1.0))
            )
            last = (memory.last_key, memory.last_value)
        else:
            gates, last = (nothing, nothing, nothing), (nothing, nothing)
        self.decode_step(
            q.contiguous(),
            u.contiguous(),
            k.contiguous(),
            v.contiguous(),
            *gates,
            states,
            descriptors,
            online,
            memory.key_sum,
            *last,
            cached,
            filled,
            # Both are 32-bit arguments; beyond these bounds they change nothing.
            min(segment_length, 2**30),
            min(max(top_k, 1), needed + 1),
            scale,
            y,
        )
        return y
