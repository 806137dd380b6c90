"""Learned gates: the kernel of ``gates`` on tensors."""

from __future__ import annotations

import torch

from ....triton.tables import Tables
from .arrays import Gates, KeySums
from .operation import Operation

Tensor = torch.Tensor


class LearnedGates(Operation):
    """The operation ``gates``."""

    def gates(
        self, u: Tensor, k: Tensor, means: Tensor, sums: KeySums | None, *, tables: Tables, tiles: Tensor, top_k: int
    ) -> Gates:
        """logits ``[B*H, N, T]`` and lse ``[B*H, T]``, from u, k ``[B, T, H, DK]`` and mean keys ``[B*H, N, SK]``.

        ``sums``: of :class:`SegmentStates`; without them, where every segment is one piece, keys are added up again.
        Row i of the logits is written at the tokens of segment i, where it is the online one, and of later ones.
        """
        B, T, H, _ = u.shape
        N = tables.seg_first.shape[0]
        logits = u.new_empty((B * H, N, T), dtype=torch.float32)
        made = Gates(logits, logits.new_empty((B * H, T)))
        pieces, running = (None, None) if sums is None else sums
        self.launch(
            "gates", (tiles.shape[0], B * H, 1), means, u=u, k=k, means=means, sums=pieces, running=running,
            logits=made.logits, lse=made.lse,
            begin=tables.begin, end=tables.end, segment=tables.segment, seg_begin=tables.seg_begin,
            seg_first=tables.seg_first, seg_piece=tables.seg_piece, tiles=tiles,
            many=int(pieces is not None), ahead=int(running is not None),
            top_k=top_k, T=T, H=H, N=N, P=tables.begin.shape[0],
        )  # fmt: skip
        return made
