"""Deep memories, chunkwise: ``dla`` and ``titans`` (arXiv:2602.24281, Eq. 30-31 and 34-36).

The memory is M(x) = gelu(x W_up) W_down (+ x). All gradients of an inner chunk are taken at the state that enters it,
so within a chunk every layer W obeys

    W_t = c_t W_0 - d_t S_0 - sum_{j <= t} c_tj x_j^T e_j,

with x_j the layer's input, e_j its error row and S_0 the momentum that enters: a token reads its own W_t without
forming it. Arrays carry one leading axis G = B * H.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import gelu

from .linear import decay_between
from .plan import Plan

Tensor = torch.Tensor


def gelu_slope(x: Tensor) -> Tensor:
    """Derivative of the tanh form of GELU."""
    root = math.sqrt(2 / math.pi)
    square = x * x
    tanh = torch.tanh(root * x * (1 + 0.044715 * square))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * root * (1 + 3 * 0.044715 * square)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Of one step's A lanes: c_t [G, A, b], d_t [G, A, b] or ``None`` (no momentum), c_tj [G, A, b, b]."""

    state: Tensor | None
    momentum: Tensor | None
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight matrix through one inner chunk.

    ``state`` [G, A, D, D'] and ``momentum`` (likewise, or ``None``) enter it; ``inputs`` [G, A, b, D] and ``errors``
    [G, A, b, D'] are its rows.
    """

    state: Tensor
    momentum: Tensor | None
    inputs: Tensor
    errors: Tensor

    def read(self, x: Tensor, by: Coefficients) -> Tensor:
        """x_t W_t of every row t, [G, A, b, D']."""
        y = x @ self.state
        if by.state is not None:
            y = by.state[..., None] * y
        if by.momentum is not None and self.momentum is not None:
            y = y - by.momentum[..., None] * (x @ self.momentum)
        return y - (by.rows * (x @ self.inputs.mT)) @ self.errors

    def leave(self, state: Tensor | None, momentum: Tensor | None, rows: Tensor) -> Tensor:
        """c W_0 - d S_0 - sum_j c_j x_j^T e_j, for c, d [G, A] and c_j [G, A, b]."""
        y = self.state if state is None else state[..., None, None] * self.state
        if momentum is not None and self.momentum is not None:
            y = y - momentum[..., None, None] * self.momentum
        return y - self.inputs.mT @ (rows[..., None] * self.errors)


@dataclass(frozen=True, eq=False)
class Chunk:
    """One step's inner chunks: chunks ``start`` to ``stop`` of the plan, and what they leave at segments that end."""

    start: int
    stop: int
    by: Coefficients
    up: Layer
    down: Layer
    closed_up: Tensor
    closed_down: Tensor


@dataclass(frozen=True, eq=False)
class DeepWalk:
    """The writes, one step after another; iterating again computes them again.

    Args:
        k, v: [G, T, Dk], [G, T, Dv].
        eta, g, mu: [G, T]; g and mu are ``None`` where absent (mu = 0, g = 0).
        W_up, W_down: the states at every start, [G, Dk, E] and [G, E, Dv].
        squared: whether the loss is ||M(k) - v||^2 (titans) rather than -<M(k), v> (dla).
        residual: whether the memory adds its input.
    """

    plan: Plan
    k: Tensor
    v: Tensor
    eta: Tensor
    g: Tensor | None
    mu: Tensor | None
    W_up: Tensor
    W_down: Tensor
    squared: bool
    residual: bool

    def __iter__(self) -> Iterator[Chunk]:
        plan = self.plan
        keys, values = plan.take(self.k), plan.take(self.v)
        state, momentum, rows, decay, products = self._coefficients()
        lanes = plan.steps[0].stop
        up, down = (W[:, None].expand(-1, lanes, -1, -1) for W in (self.W_up, self.W_down))
        s_up, s_down = (None, None) if self.mu is None else (torch.zeros_like(up), torch.zeros_like(down))
        for step in plan.steps:
            part = slice(step.start, step.stop)
            active = step.stop - step.start
            k, v = keys[:, part], values[:, part]
            up, down = up[:, :active], down[:, :active]
            hidden = k @ up
            z = gelu(hidden, approximate="tanh")
            error = self._error(z @ down, k, v)
            back = (error @ down.mT) * gelu_slope(hidden)
            layer_up = Layer(up, None if s_up is None else s_up[:, :active], k, back)
            layer_down = Layer(down, None if s_down is None else s_down[:, :active], z, error)
            by = Coefficients(
                None if state is None else state[:, part],
                None if momentum is None else momentum[:, part],
                rows[:, part],
            )
            leaving = [None if x is None else self._last(x, part) for x in (by.state, by.momentum, by.rows)]
            assert leaving[2] is not None
            up, down = (layer.leave(leaving[0], leaving[1], leaving[2]) for layer in (layer_up, layer_down))
            if decay is not None and products is not None:
                s_up, s_down = (
                    _momentum(layer, self._last(decay[:, part], part), self._last(products[:, part], part))
                    for layer in (layer_up, layer_down)
                )
            closed_up, closed_down = (W.index_select(1, step.closing) for W in (up, down))
            yield Chunk(step.start, step.stop, by, layer_up, layer_down, closed_up, closed_down)

    def _last(self, x: Tensor, part: slice) -> Tensor:
        last = self.plan.last[part]
        return x[:, torch.arange(len(last), device=last.device), last]

    def _error(self, o: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.squared:
            return -v
        return 2 * ((o + k if self.residual else o) - v)

    def _coefficients(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """c_t, d_t, c_tj of all chunks, then the momentum's own: prod mu up to t, and eta_j prod mu after j up to t."""
        plan = self.plan
        eta = plan.take(self.eta)[..., None, :]
        g = None if self.g is None else plan.take(self.g)
        ones = torch.ones(plan.size, plan.size, dtype=eta.dtype, device=eta.device).tril()
        span = ones if g is None else decay_between(g)
        state = None if g is None else g.cumsum(-1).exp()
        if self.mu is None:
            return state, None, eta * span, None, None
        mu = plan.take(self.mu)
        since = torch.where(ones.tril(-1) > 0, mu[..., :, None], 1.0).cumprod(-2).tril()
        upto = mu.cumprod(-1)
        return state, (span @ upto[..., None])[..., 0], eta * (span @ since), upto, eta * since


def _momentum(layer: Layer, decay: Tensor, rows: Tensor) -> Tensor:
    """prod mu S_0 + sum_j eta_j prod mu x_j^T e_j."""
    assert layer.momentum is not None
    return decay[..., None, None] * layer.momentum + layer.inputs.mT @ (rows[..., None] * layer.errors)
