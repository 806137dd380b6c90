"""Launch the decode kernel of one exported library: new tokens over the cache, which it reads and writes in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ....errors import KernelError
from ....memory import LayerMemory
from ....traits import RECURRENCES
from ..arguments import launch
from ..loader import load_library, runnable
from .forward import check_reach


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
    """What the tensors that it reads are on and in."""

    def __init__(self, library: Path, record: Mapping[str, Any]) -> None:
        self.decode_step = load_library(runnable(library, record))["decode_step"]
        self.gated = RECURRENCES[record["problem"]["recurrence"]].gated

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
            ArgumentError: if a count of the memory is out of bounds.
            KernelError: if the cached states are of 16 bits, the memory has no room for those of the tokens, or an
                array has more elements than the kernel's 32-bit indices reach.
        """
        needed = check_memory(v, memory, segment_length)
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        if self.gated:
            last_key, last_value = memory.last_key, memory.last_value
            g, beta, lam = (
                v.new_full(v.shape[:3], absent) if gate is None else gate.contiguous()
                for gate, absent in ((g, 0.0), (beta, 0.0), (lam, 1.0))
            )
        else:
            g = beta = lam = last_key = last_value = v.new_zeros(1, 1, 1)
        values = {
            "q": q.contiguous(), "u": u.contiguous(), "k": k.contiguous(), "v": v.contiguous(),
            "g": g, "beta": beta, "lam": lam, "states": memory.states[0], "descriptors": memory.descriptors,
            "online": memory.online[0], "key_sum": memory.key_sum, "last_key": last_key, "last_value": last_value,
            "cached": memory.cached, "filled": memory.filled,
            # Both are 32-bit arguments; beyond these bounds they change nothing.
            "length": min(segment_length, 2**30), "top_k": min(max(top_k, 1), needed + 1), "scale": scale, "y": y,
        }  # fmt: skip
        launch("decode_step", self.decode_step, values)
        return y


def check_memory(v: torch.Tensor, memory: LayerMemory, segment_length: int) -> int:
    """How many states there may be after the tokens of v.

    Raises:
        KernelError: if a kernel cannot serve the memory, or the memory has no room for them.
    """
    n, layers = v.shape[1], zip(memory.states, memory.online, strict=True)
    if memory.states[0].dtype != torch.float32:
        raise KernelError(
            f"cached states of {memory.states[0].dtype}, and kernels of the CPU read torch.float32; use "
            "MemoryCache(state_dtype=None)"
        )
    needed = memory.needed(n, segment_length)
    if needed > memory.capacity:
        raise KernelError(
            f"{n} more tokens need room for {needed} states and the memory has room for {memory.capacity}; "
            f"call memory.reserve({n}) first"
        )
    for states, online in layers:
        check_reach(states.numel(), n * (online.numel() // min(online.shape[2:])))
    return needed


LAUNCHER = TvmDecode
