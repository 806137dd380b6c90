"""What backward kernels take, in groups, and what their wrappers share. No flag is in here: it is copied as it stands.

A member that a kernel does not read is None, which Triton compiles away. Numbers of run time are in no group: Triton
would specialise a group's, and compile a kernel again for another number of tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Rows(NamedTuple):
    """q, k, u ``[B, T, H, DK]`` and v, dy ``[B, T, H, DV]``, of one dtype."""

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    u: torch.Tensor | None = None
    dy: torch.Tensor | None = None


class Gates(NamedTuple):
    """Learned gates, of :mod:`gates` and :mod:`pair_order`; all None where gates are equal.

    Attributes:
        logits, gammas [B*H, N, T], own [B*H, T]: float32 logits of cached segments, where their gates go (it may be the
            same array), and the logits of the online segment.
        lse [B*H, T]: float32, the logarithm of the sum of a token's exponentials.
        chosen, picked [B*H, T, top_k]: int32 segments that ssc chose, and their logits, -inf without a segment.
        order, starts: int32, the pairs of a token and a segment in the order of the segments.
    """

    logits: torch.Tensor | None = None
    gammas: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    own: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    picked: torch.Tensor | None = None
    order: torch.Tensor | None = None
    starts: torch.Tensor | None = None


class Keys(NamedTuple):
    """Of :mod:`segment_states`, float32: means ``[B*H, N, SK]``; sums ``[B*H, P, SK]``, None for whole segments."""

    means: torch.Tensor
    sums: torch.Tensor | None


class ReadGradients(NamedTuple):
    """dq ``[B, T, H, DK]``; to be added up over blocks dgamma ``[blocks, B*H, N, T]``, own, delta ``[blocks, B*H, T]``.

    dq is in q's dtype, the others are float32: the gradients of the cached segments' gates, row i at the tokens of
    later segments; that of the online segment's; the sum of all, each times its gate. dgamma and delta are None where
    gates are equal or others have their gradients.
    """

    dq: torch.Tensor | None = None
    dgamma: torch.Tensor | None = None
    own: torch.Tensor | None = None
    delta: torch.Tensor | None = None


class GateGradients(NamedTuple):
    """Gradients of learned gates, by :mod:`gates_backward`; all None where gates are equal.

    Attributes:
        du [B, T, H, DK]: of u, in its dtype; the others are float32.
        dmeans [B*H, N, SK]: of each key of a segment, through the segment's mean key.
        gate [B*H, T]: the online segment's gate.
        pull [B*H, T]: how a token pulls at the keys of its segment up to it, dr_t^(s) / (how many they are).
        pulls [B*H, P, SK]: sums of pull times u over each piece; None where every segment is one piece.
    """

    du: torch.Tensor | None = None
    dmeans: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    pull: torch.Tensor | None = None
    pulls: torch.Tensor | None = None


class StateGradients(NamedTuple):
    """Gradients of end states, and of what enters pieces, by :mod:`state_backward`.

    Attributes:
        dends [B*H, P, SK, SV]: of the end states of pieces, in q's dtype. The others are float32, and None for linear
            and where no piece is entered.
        crossing [B*H, P]: what the end state says of the decay of what enters: e^{cum_end} <dEnd, A>, and the like of
            the row before the piece.
        dk_lead [B*H, P, 2, SK], dv_lead [B*H, P, SV]: of the row before the piece; dk in two parts.
        dbefore [B*H, P]: of the strength ``before``.
    """

    dends: torch.Tensor | None = None
    crossing: torch.Tensor | None = None
    dk_lead: torch.Tensor | None = None
    dv_lead: torch.Tensor | None = None
    dbefore: torch.Tensor | None = None


class Pieces(NamedTuple):
    """int32 ``[P]``: see :class:`Tables`."""

    begin: torch.Tensor | None = None
    end: torch.Tensor | None = None
    segment: torch.Tensor | None = None
    entering: torch.Tensor | None = None


class Segments(NamedTuple):
    """int32 ``[N]``: see :class:`Tables`; ``last`` is None where every segment is one piece."""

    begin: torch.Tensor | None = None
    end: torch.Tensor | None = None
    first: torch.Tensor | None = None
    past_end: torch.Tensor | None = None
    piece: torch.Tensor | None = None
    last: torch.Tensor | None = None


class Tables(Protocol):
    """Where the P pieces, N segments and sequences of a row of tokens begin and end: int32 tables, by the launcher.

    Attributes:
        begin, end [P]: a piece's first token, and one past its last; segment: that it is part of; entering: the piece
            whose end state enters it, or -1.
        seg_begin, seg_end [N]: tokens; seg_first, seg_past_end: the first segment of the sequence, and one past its
            last; seg_piece, seg_last: first and last piece.
        seq_begin, seq_end: pieces of a sequence.
        crosses: whether any piece is entered; whole: whether every segment is one piece.
    """

    begin: torch.Tensor
    end: torch.Tensor
    segment: torch.Tensor
    entering: torch.Tensor
    seg_begin: torch.Tensor
    seg_end: torch.Tensor
    seg_first: torch.Tensor
    seg_past_end: torch.Tensor
    seg_piece: torch.Tensor
    seg_last: torch.Tensor
    seq_begin: torch.Tensor
    seq_end: torch.Tensor
    crosses: bool

    @property
    def whole(self) -> bool: ...

    def tiles(self, rows: int) -> torch.Tensor:
        """int32 ``[tiles, 2]``: piece and first token of every tile of at most ``rows`` tokens."""


def last_pieces(tables: Tables) -> torch.Tensor | None:
    """The last piece of every segment, None where it is the only one."""
    return None if tables.whole else tables.seg_last
