"""States of pieces, and mean keys: the kernels of ``segment_states`` on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ....triton.tables import Tables
from ..functions import Function, aligned, blocks, check_reach
from .arrays import Decays, KeySums, States
from .operation import Operation

Tensor = torch.Tensor
_BLOCK = 256
"""Elements of a state that a block of ``carry`` has."""


class SegmentStates(Operation):
    """The operation ``segment_states``; arguments as of :class:`Operation`."""

    def __init__(
        self, functions: Mapping[str, Function], problem: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        super().__init__(functions, problem, config)
        self.keys = config["states_warps"] * config["states_rows"]
        self.values = min(config["states_BV"], self.SV)
        self.step = config["states_BT"]

    def decays(self, g: Tensor, beta: Tensor, lam: Tensor, *, tables: Tables) -> Decays:
        """cum, now, after ``[B*H, T]`` and before ``[B*H, P]``, float32, from gates ``[B, T, H]`` float32."""
        B, T, H = g.shape
        P = tables.begin.shape[0]
        cum, now, after = (g.new_empty((B * H, T)) for _ in range(3))
        made = Decays(cum, now, after, g.new_empty((B * H, P)))
        g, beta, lam = (aligned(x) for x in (g, beta, lam))
        self.launch(
            "decays", (P, B * H, 1), g, g=g, beta=beta, lam=lam, **made._asdict(), begin=tables.begin, end=tables.end,
            entering=tables.entering, T=T, H=H, P=P,
        )  # fmt: skip
        return made

    def segment_states(self, k: Tensor, v: Tensor, decayed: Decays | None, *, tables: Tables, exact: bool) -> States:
        """The states of all pieces, from k ``[B, T, H, DK]`` and v ``[B, T, H, DV]`` of one dtype.

        Returns:
            End states, float32, in memories of 16 bits only those of the last pieces of segments (unless ``exact``,
            None or scratch); the states of all pieces as operands of products, in k's dtype (``ends`` itself where
            that is float32, not written where sums of states are read and nothing enters a piece); the sum of earlier
            segments' states in k's dtype, where gates are equal, else None; mean keys; sums of keys.

        Raises:
            KernelError: if an array has more elements than the kernels' 32-bit indices reach.
        """
        B, T, H, _ = k.shape
        heads, P, N = B * H, tables.begin.shape[0], tables.seg_begin.shape[0]
        check_reach(heads * P * self.SK * self.SV, k.numel(), v.numel(), heads * N * T)
        half = k.dtype != torch.float32
        means = k.new_empty((heads, N, self.SK), dtype=torch.float32)
        ends = sums = None
        past = None if self.routed else k.new_empty((heads, N, self.SK, self.SV))
        operand = k.new_empty((heads, P, self.SK, self.SV)) if half else None
        running = means.new_empty((heads, T // self.step + P, self.SK)) if self.routed else None
        if P > N:
            sums = k.new_empty((heads, P, self.SK), dtype=torch.float32)
        carries = tables.crosses or past is not None
        if exact or carries or operand is None:
            ends = k.new_empty((heads, P, self.SK, self.SV), dtype=torch.float32)
        count = blocks(self.SV, self.values) * blocks(self.SK, self.keys) * P
        self.launch(
            "local", (count, heads, 1), k, k=k, v=v, **self._decays(decayed),
            **({} if running is None else {"running": running}), operand=operand, ends=ends, means=means, sums=sums,
            begin=tables.begin, end=tables.end, entering=tables.entering, to_ends=int(ends is not None),
            to_operand=int(operand is not None and not carries), to_means=int(sums is None),
            to_sums=int(sums is not None), T=T, H=H, P=P,
        )  # fmt: skip
        if sums is not None:
            self.launch(
                "means", (N, heads, 1), sums, sums=sums, means=means, seg_begin=tables.seg_begin,
                seg_end=tables.seg_end, seg_piece=tables.seg_piece, seg_last=tables.seg_last, N=N, P=P,
            )  # fmt: skip
        if carries:
            assert ends is not None
            # Inside a segment the operands of the pieces are read, not these.
            every = 1 if self.gated or operand is None else 2
            self._carry(
                ends, operand if tables.crosses else None, past, decayed, tables, T,
                every if tables.crosses and (exact or operand is None) else 0,
            )  # fmt: skip
        made = ends if operand is None else operand
        assert made is not None
        return States(ends, made, past, means, KeySums(sums, running))

    def past_states(self, ends: Tensor, *, like: Tensor, cum: Tensor | None, tables: Tables) -> Tensor:
        """past ``[B*H, N, SK, SV]`` in the dtype of ``like``, from ``ends``, where every segment is one piece."""
        past = like.new_empty(ends.shape)
        # What entered a piece is in its end state already.
        self._carry(ends, None, past, None, tables, like.shape[1], 0, torch.full_like(tables.entering, -1))
        return past

    def _decays(self, decayed: Decays | None) -> dict[str, Tensor]:
        return {} if decayed is None else decayed._asdict()

    def _carry(
        self, ends: Tensor, operand: Tensor | None, past: Tensor | None, decayed: Decays | None, tables: Tables,
        T: int, to_carried: int, entering: Tensor | None = None,
    ) -> None:  # fmt: skip
        heads, P = ends.shape[:2]
        across = blocks(self.SK * self.SV, _BLOCK)
        self.launch(
            "carry", (across, tables.seq_begin.shape[0], heads), tables.end, operand=operand, past=past, ends=ends,
            cum=None if decayed is None else decayed.cum, end=tables.end, segment=tables.segment,
            entering=tables.entering if entering is None else entering, seg_last=tables.seg_last,
            seq_begin=tables.seq_begin, seq_end=tables.seq_end, to_carried=to_carried,
            to_operand=int(operand is not None), to_past=int(past is not None), T=T,
            N=tables.seg_begin.shape[0], P=P,
        )  # fmt: skip
