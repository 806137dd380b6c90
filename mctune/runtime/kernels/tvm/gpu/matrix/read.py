"""The read: the kernel of ``read_forward`` on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ....triton.tables import Tables
from ..functions import Function, blocks
from .arrays import Decays, Gates, States
from .operation import Operation

Tensor = torch.Tensor


class Read(Operation):
    """The operation ``read_forward``; arguments as of :class:`Operation`."""

    def __init__(
        self, functions: Mapping[str, Function], problem: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        super().__init__(functions, problem, config)
        self.DV = problem["Dv"]
        self.values = config["read_BV"]

    def read_forward(
        self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, states: States, gates: Gates | None, decays: Decays | None,
        *, tables: Tables, tiles: Tensor, y: Tensor, scale: float, heads: int, **_: Any,
    ) -> Tensor:  # fmt: skip
        """y ``[B, T, H, DV]``, written from q, k ``[B, T, H, DK]`` and v, all of one dtype."""
        T, H, N, P = q.shape[1], q.shape[2], tables.seg_first.shape[0], tables.begin.shape[0]
        kernel = "read_summed" if gates is None else "read_gated"
        gamma = {"past": states.past} if gates is None else {"logits": gates.logits, "lse": gates.lse}
        self.launch(
            kernel, (tiles.shape[0] * blocks(self.DV, self.values), heads, 1), q, q=q, k=k, v=v,
            operand=states.operand, y=y, **({} if decays is None else decays._asdict()), **gamma,
            begin=tables.begin, end=tables.end, segment=tables.segment, entering=tables.entering,
            seg_first=tables.seg_first, seg_last=tables.seg_last, tiles=tiles, scale=scale, T=T, H=H, N=N, P=P,
        )  # fmt: skip
        return y
