"""Launch the forward kernels of one exported library: segment states, then the read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ....errors import KernelError
from ....segments import Segments
from ....traits import RECURRENCES
from ...results import Forward, padded
from ..arguments import launch
from ..loader import load_library, runnable

_ALIGNMENT = 64
_INT32 = 2**31 - 1


class TvmForward:
    """y = memory_caching(q, k, v, u) on the CPU by ``segment_states`` and ``read_forward`` of one library.

    Args:
        library: the exported ``.so``.
        record: its entry in the tuned table; ``record["problem"]`` names the recurrence and the widths,
            ``cpu_flags`` what the library needs of the CPU.

    Attributes:
        gives: names of what it can keep for a backward.

    Raises:
        KernelError: if the library cannot be run on this machine.
    """

    device, dtype = "cpu", torch.float32
    """What the tensors that it reads are on and in."""
    gives = frozenset(("states", "means"))

    def __init__(self, library: Path, record: Mapping[str, Any]) -> None:
        module = load_library(runnable(library, record))
        # Absent where the read computes the states as it goes.
        fused = not module.implements_function("segment_states")
        self.segment_states = None if fused else module["segment_states"]
        self.read_forward = module["read_forward"]
        problem = record["problem"]
        self.gated = RECURRENCES[problem["recurrence"]].gated
        self.Dk, self.Dv = padded(problem["Dk"]), padded(problem["Dv"])

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
        segments: Segments,
        keep: Sequence[str] = (),
    ) -> Forward:
        """y from float32 q, k, u ``[B, T, H, Dk]``, v and gates ``[B, T, H]``, and of ``states`` and ``means`` those
        that are to be kept.

        Raises:
            KernelError: if an array has more elements than the kernels' 32-bit indices reach.
        """
        B, T, H, Dv = v.shape
        N = segments.count
        check_reach(B * T * H * max(self.Dk, self.Dv), B * H * N * self.Dk * self.Dv)
        q, k, u = (flat_rows(x, self.Dk) for x in (q, k, u))
        v = flat_rows(v, self.Dv)
        states = q.new_empty(B * H * N * self.Dk, self.Dv)
        means = q.new_empty(B * H * N, self.Dk)
        y = q.new_empty(B * T * H, self.Dv)
        values = {
            "q": q, "u": u, "k": k, "v": v, **flat_gates(q, B * T * H if self.gated else None, g, beta, lam),
            "states": states, "means": means, "begin": segments.begin, "end": segments.end, "first": segments.first,
            "tokens": T, "heads": H, "longest": segments.longest,
            # It sizes scratch memory and is a 32-bit argument; more than all segments cannot be chosen.
            "top_k": min(max(top_k, 1), N), "scale": float(scale), "y": y,
        }  # fmt: skip
        if self.segment_states is not None:
            launch("segment_states", self.segment_states, values)
        launch("read_forward", self.read_forward, values)
        y = y.view(B, T, H, self.Dv)[..., :Dv].contiguous()
        made = {"states": states.view(B * H * N, self.Dk, self.Dv), "means": means}
        return Forward(y, {name: made[name] for name in keep})


def check_reach(*sizes: int) -> None:
    """Refuse arrays of more elements than the kernels' 32-bit indices reach.

    Raises:
        KernelError: naming the largest.
    """
    largest = max(sizes)
    if largest > _INT32:
        raise KernelError(f"an array of {largest} elements exceeds 2^31 - 1; split the batch, or use backend='eager'")


def flat_gates(
    like: torch.Tensor, rows: int | None, g: torch.Tensor | None, beta: torch.Tensor | None, lam: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """g, beta, lam as ``[rows]``; absent ones are 0, 0, 1. Without ``rows``, for a recurrence that has none, one 0."""
    if rows is None:
        return dict.fromkeys(("g", "beta", "lam"), like.new_zeros(1))
    return {
        name: like.new_full((rows,), absent) if gate is None else gate.to(torch.float32).reshape(rows).contiguous()
        for name, gate, absent in (("g", g, 0.0), ("beta", beta, 0.0), ("lam", lam, 1.0))
    }


def flat_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """``[B, T, H, D]`` as ``[B * T * H, width]``, contiguous, aligned to a cache line, padded with zeros."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[-1] != width:
        rows = torch.nn.functional.pad(rows, (0, width - rows.shape[-1]))
    rows = rows.contiguous()
    return rows if rows.data_ptr() % _ALIGNMENT == 0 else rows.clone()


LAUNCHER = TvmForward
