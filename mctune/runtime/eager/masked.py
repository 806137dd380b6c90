"""Products that leave out what a mask hides: multiplying by zero would not, since 0 * NaN is NaN.

Their backward leaves the same pairs out. Where values can be read (:func:`..modes.readable`) and all are finite, a
product is the plain one: looking costs one sum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd import forward_ad

from ..modes import readable

Tensor = torch.Tensor


def pairs(a: Tensor, b: Tensor, seen: Tensor | None) -> Tensor:
    """<a_t, b_j> where token t sees j, elsewhere 0: a [..., t, D], b [..., j, D] -> [..., t, j].

    Args:
        seen: bool [..., t, j], or [..., t, n] for n groups of j side by side; ``None`` where everything is seen.
    """
    if seen is None:
        return a @ b.mT
    if _transformed():
        return (a @ b.mT).masked_fill(~_widened(seen, b.shape[-2]), 0)
    if not _recorded(a, b):
        return _paired(a, b, seen)
    y: Tensor = _Pairs.apply(a, b, seen)  # type: ignore[no-untyped-call]
    return y


def mix(weights: Tensor, x: Tensor, seen: Tensor | None) -> Tensor:
    """The sum of weights_tj x_j over the j that t sees: weights [..., t, j], 0 elsewhere, x [..., j, D] -> [..., t, D].

    Args:
        seen: as in :func:`pairs`.
    """
    if seen is None:
        return weights @ x
    if _transformed():
        return _mixed(weights, x, seen)
    if not _recorded(weights, x):
        return _mixed(weights, x, seen)
    y: Tensor = _Mix.apply(weights, x, seen)  # type: ignore[no-untyped-call]
    return y


def sound(x: Tensor) -> bool:
    """Whether all of ``x`` is known to be finite (a sum that overflows leaves that open)."""
    return readable(x) and math.isfinite(x.detach().sum().item())


def _transformed() -> bool:
    """Whether something besides autograd looks on, which knows the functions below too little."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0


def _recorded(a: Tensor, b: Tensor) -> bool:
    return torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)


def _widened(seen: Tensor, columns: int) -> Tensor:
    """``seen`` of groups as that of their members."""
    each = columns // seen.shape[-1]
    return seen if each == 1 else seen.repeat_interleave(each, -1)


def _mixed(weights: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    if sound(x):
        return weights @ x
    bad = ~x.isfinite()
    # Element by element this is a product as large as the other one.
    stains = bad if readable(x) else bad.any(-1, keepdim=True)
    stained = _widened(seen, x.shape[-2]).to(x.dtype) @ stains.to(x.dtype) > 0
    return (weights @ x.masked_fill(bad, 0)).masked_fill(stained, float("nan"))


def _paired(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    y = a @ b.mT
    return y if sound(y) else y.masked_fill_(~_widened(seen, b.shape[-2]), 0)


class _Pairs(torch.autograd.Function):
    # With a setup_context, torch looks at the signature in every call: that takes as long as a small product.
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, seen)
        return _paired(a, b, seen)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b, seen = ctx.saved_tensors
        wide = _widened(seen, b.shape[-2])
        if not sound(dy):
            dy = dy.masked_fill(~wide, 0)
        da = mix(dy, b, wide).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
        db = mix(dy.mT, a, wide.mT).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
        return da, db, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, x: Tensor, seen: Tensor) -> Tensor:
        ctx.save_for_backward(weights, x, seen)
        return _mixed(weights, x, seen)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weights, x, seen = ctx.saved_tensors
        dweights = dx = None
        if ctx.needs_input_grad[0]:
            hidden = None if sound(dy) and sound(x) else seen
            dweights = pairs(dy, x, hidden).sum_to_size(weights.shape)
        if ctx.needs_input_grad[1]:
            dx = mix(weights.mT, dy, _widened(seen, x.shape[-2]).mT).sum_to_size(x.shape)
        return dweights, dx, None
