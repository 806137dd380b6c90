"""Arrays that the host functions of deep templates take together, as named tuples of their own shape and names."""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Weights(NamedTuple):
    """Coefficients of the P inner chunks of b tokens, or their gradients, float32; None what there is not.

    rows [B*H, P, b, b]; last, those of a chunk's last token, state and momentum [B*H, P, b]; of the momentum itself
    decay [B*H, P], products [B*H, P, b].
    """

    rows: Tensor
    last: Tensor
    state: Tensor | None = None
    momentum: Tensor | None = None
    decay: Tensor | None = None
    products: Tensor | None = None


class Layers(NamedTuple):
    """Two layers: up [.., Dk, E], down [.., E, Dv]; and their momentum."""

    up: Tensor | None = None
    down: Tensor | None = None
    s_up: Tensor | None = None
    s_down: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Layers:
        """Both layers as operands of products."""
        assert self.up is not None and self.down is not None
        return Layers(self.up.to(dtype), self.down.to(dtype))


class Shares(NamedTuple):
    """Logits [B*H, N, T] and lse [B*H, T] of learned gates, or what all of a token's states weigh, [T]; None for 1."""

    logits: Tensor | None = None
    lse: Tensor | None = None
    even: Tensor | None = None


class Gates(NamedTuple):
    """As ``gates_backward`` takes them: the gates of cached segments go to the logits' place."""

    logits: Tensor
    gammas: Tensor
    lse: Tensor
    own: Tensor | None = None
    chosen: Tensor | None = None
    picked: Tensor | None = None
    order: Tensor | None = None
    starts: Tensor | None = None

    @property
    def shares(self) -> Shares:
        """As deep kernels take them. Logits of online segments stay where they are."""
        return Shares(self.logits, self.lse)


class ReadGradients(NamedTuple):
    """As ``gates_backward`` takes them: dgamma [1, B*H, N, T], own and delta [1, B*H, T]."""

    dq: Tensor | None
    dgamma: Tensor
    own: Tensor
    delta: Tensor


class Saved(NamedTuple):
    """errors [B*H, T, Dv], z and dhidden [B*H, T, E], float32."""

    errors: Tensor | None = None
    z: Tensor | None = None
    dhidden: Tensor | None = None


class Rows(NamedTuple):
    """Tokens of one dtype, [B, T, H, Dk] and [B, T, H, Dv]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dy: Tensor
    u: Tensor | None = None


class Keys(NamedTuple):
    """What mean keys' gradients are made of: pull [B*H, T], dmeans [B*H, N, Dk]."""

    pull: Tensor
    dmeans: Tensor


class Made(NamedTuple):
    """dq, dk [B, T, H, Dk] and dv [B, T, H, Dv], float32; derr [B*H, T, Dv], of the reads, where errors are not -v."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    derr: Tensor | None = None
