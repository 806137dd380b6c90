"""Arrays that kernels of one call pass on to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Decays(NamedTuple):
    """Of SWLA's writes: cum, now and after ``[B*H, T]``, before ``[B*H, P]``, float32."""

    cum: Tensor
    now: Tensor
    after: Tensor
    before: Tensor


class KeySums(NamedTuple):
    """Sums of keys, float32: of pieces ``[B*H, P, SK]``, None where every segment is one; and, where gates are learned,
    of a piece's keys before every step of its state, ``[B*H, T / step + P, SK]``."""

    pieces: Tensor | None
    running: Tensor | None


class States(NamedTuple):
    """``[B*H, P, SK, SV]``: ends float32, operand; past ``[B*H, N, SK, SV]``; mean keys, float32; sums of keys."""

    ends: Tensor | None
    operand: Tensor
    past: Tensor | None
    means: Tensor
    sums: KeySums


class Gates(NamedTuple):
    """Learned gates: logits ``[B*H, N, T]`` and lse ``[B*H, T]``, float32; none by pairs, which have the others."""

    logits: Tensor
    lse: Tensor
    own: None = None
    chosen: None = None
    picked: None = None
