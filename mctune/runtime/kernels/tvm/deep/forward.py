"""Launch the forward kernels of a deep memory from one exported library: the writes, then the read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ....segments import Segments
from ...kept import ROWS, given
from ...results import Forward
from ..arguments import launch
from ..loader import load_library, runnable
from ..matrix.forward import check_reach
from .sizes import Shape, flat_arguments


class TvmDeepForward:
    """y = memory_caching(q, k, v, u) of a deep memory on the CPU, by ``deep_write`` and ``deep_read`` of one library.

    Args:
        library: the exported ``.so``.
        record: its entry in the tuned table; ``record["problem"]`` names the recurrence, the aggregation and the
            widths, ``cpu_flags`` what the library needs of the CPU.

    Attributes:
        gives: names of what it can keep for a backward (:func:`kept.given`).

    Raises:
        KernelError: if the library cannot be run on this machine.
    """

    device, dtype = "cpu", torch.float32
    """What the tensors that it reads are on and in."""

    def __init__(self, library: Path, record: Mapping[str, Any]) -> None:
        module = load_library(runnable(library, record))
        self.deep_write, self.deep_read = module["deep_write"], module["deep_read"]
        self.problem = record["problem"]
        self.gives = given("cpu", self.problem, record["config"])

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
        segments: Segments,
        keep: Sequence[str] = (),
    ) -> Forward:
        """y from float32 q, k, u ``[B, T, H, Dk]``, v, gates ``[B, T, H]``, W_up ``[H, Dk, E]`` and W_down; and
        those of ``gives`` that are to be kept.

        Raises:
            KernelError: if an array has more elements than the kernels' 32-bit indices reach.
        """
        s = Shape.of(self.problem, q, v, W_up, segments)
        keeps = not set(ROWS).isdisjoint(keep)
        check_reach(s.rows * max(s.Dk, s.Dv, (s.mixed or keeps) and s.E), s.states * s.E * max(s.Dk, s.Dv))
        x = flat_arguments(s, q, k, v, u, g, eta, mu, W_up, W_down, memory_residual, inner_chunk, scale, top_k)
        new = x["q"].new_empty
        x |= s.left_by_writes(new, {}, keeps)
        x["mixture"], x["y"] = new(s.rows if s.mixed else 1, s.E), new(s.rows, s.Dv)
        launch("deep_write", self.deep_write, x)
        launch("deep_read", self.deep_read, x)
        y = x["y"].view(s.B, s.T, s.H, s.Dv)[..., : v.shape[3]].contiguous()
        made = x | {"up": x["up"].view(s.states, s.Dk, s.E), "down": x["down"].view(s.states, s.E, s.Dv)}
        return Forward(y, {name: made[name] for name in keep})


LAUNCHER = TvmDeepForward
