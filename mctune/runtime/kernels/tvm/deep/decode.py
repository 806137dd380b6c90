"""Launch the decode kernel of a deep memory: new tokens over the cache, which it reads and writes in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ....memory import LayerMemory
from ....traits import RECURRENCES
from ..arguments import launch
from ..loader import load_library, runnable
from ..matrix.decode import check_memory


class TvmDeepDecode:
    """y of n new tokens of every sequence, on the CPU by ``deep_decode`` of one library.

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
        self.deep_decode = load_library(runnable(library, record))["deep_decode"]
        self.writes = RECURRENCES[record["problem"]["recurrence"]]

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        u: torch.Tensor,
        *,
        g: torch.Tensor | None,
        eta: torch.Tensor | None,
        mu: torch.Tensor | None,
        W_up: torch.Tensor,
        W_down: torch.Tensor,
        memory_residual: bool,
        inner_chunk: int,
        scale: float,
        top_k: int,
        segment_length: int,
        memory: LayerMemory,
    ) -> torch.Tensor:
        """y ``[B, n, H, Dv]``, float32, from float32 q, k, u ``[B, n, H, Dk]``, v, gates ``[B, n, H]`` and layers.

        The tensors of ``memory``, float32, contiguous and of any alignment, are written in place; its counts stay.

        Raises:
            ArgumentError: if a count of the memory is out of bounds.
            KernelError: if the cached states are of 16 bits, the memory has no room for those of the tokens, or an
                array has more elements than the kernel's 32-bit indices reach.
        """
        needed = check_memory(v, memory, segment_length)
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        none, gates = v.new_zeros(1, 1, 1), {"g": (g, 0.0), "eta": (eta, 1.0), "mu": (mu, 0.0)}
        values: dict[str, Any] = {
            name: none if name not in self.writes.gates
            else v.new_full(v.shape[:3], absent) if gate is None
            else gate.contiguous()
            for name, (gate, absent) in gates.items()
        }  # fmt: skip
        momentum = memory.momentum if self.writes.momentum else (v.new_zeros(1, 1, 1, 1),) * 2
        for name, layers in (("online", memory.online), ("start", memory.start), ("momentum", momentum)):
            values[f"{name}_up"], values[f"{name}_down"] = (x.unsqueeze(2) for x in layers)
        values |= {
            "q": q.contiguous(), "u": u.contiguous(), "k": k.contiguous(), "v": v.contiguous(),
            "W_up": W_up.contiguous(), "W_down": W_down.contiguous(),
            "up": memory.states[0], "down": memory.states[1], "descriptors": memory.descriptors,
            "key_sum": memory.key_sum, "cached": memory.cached, "filled": memory.filled,
            # All are 32-bit arguments; beyond these bounds they change nothing.
            "length": min(segment_length, 2**30), "inner": min(inner_chunk, segment_length, 2**30),
            "top_k": min(max(top_k, 1), needed + 1), "adds_input": int(memory_residual), "scale": scale, "y": y,
        }  # fmt: skip
        launch("deep_decode", self.deep_decode, values)
        return y


LAUNCHER = TvmDeepDecode
