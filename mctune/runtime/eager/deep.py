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

from .masked import mix, pairs
from .matrix import decay_between
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
    """Coefficients of one step's A lanes: c_t [G, A, b], d_t [G, A, b] or ``None`` (no momentum), c_tj [G, A, b, b].

    ``seen`` bool [b, b] or [A, b, b]: the rows j that row t sees.
    """

    state: Tensor | None
    momentum: Tensor | None
    rows: Tensor
    seen: Tensor

    def last(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Those of the last token: c, d [G, A] and c_j [G, A, b]."""
        state, momentum = (None if x is None else x[..., -1] for x in (self.state, self.momentum))
        return state, momentum, self.rows[..., -1, :]


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
        return y - mix(by.rows * pairs(x, self.inputs, by.seen), self.errors, by.seen)

    def leave(self, state: Tensor | None, momentum: Tensor | None, rows: Tensor) -> Tensor:
        """c W_0 - d S_0 - sum_j c_j x_j^T e_j, for c, d [G, A] and c_j [G, A, b]."""
        y = self.state if state is None else state[..., None, None] * self.state
        if momentum is not None and self.momentum is not None:
            y = y - momentum[..., None, None] * self.momentum
        return y - self.inputs.mT @ (rows[..., None] * self.errors)


@dataclass(frozen=True, eq=False)
class Chunk:
    """One step's inner chunks: chunks ``start`` to ``stop`` of the plan, and what they leave at segments that end.

    ``momentum`` is what they leave of S, one tensor a layer, [G, A, D, D']; empty where there is none.
    """

    start: int
    stop: int
    by: Coefficients
    up: Layer
    down: Layer
    closed_up: Tensor
    closed_down: Tensor
    momentum: tuple[Tensor, ...]


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
        g = None if self.g is None else plan.take_or_zero(self.g)
        # A product of zeros has a slower backward, and one that is not finite stays within its token's sight.
        mu = None if self.mu is None else plan.take(self.mu)
        whole, decay, products = coefficients(plan.take_or_zero(self.eta), g, mu)
        seen = plan.seen()
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
            error = error_rows(z @ down, k, v, self.squared, self.residual)
            back = (error @ down.mT) * gelu_slope(hidden)
            layer_up = Layer(up, None if s_up is None else s_up[:, :active], k, back)
            layer_down = Layer(down, None if s_down is None else s_down[:, :active], z, error)
            by = Coefficients(
                None if whole.state is None else whole.state[:, part],
                None if whole.momentum is None else whole.momentum[:, part],
                whole.rows[:, part],
                seen if seen.dim() == 2 else seen[part],
            )
            leaving = [None if x is None else self._last(x, part) for x in (by.state, by.momentum, by.rows)]
            assert leaving[2] is not None
            up, down = (layer.leave(leaving[0], leaving[1], leaving[2]) for layer in (layer_up, layer_down))
            if decay is not None and products is not None:
                s_up, s_down = (
                    next_momentum(layer, self._last(decay[:, part], part), self._last(products[:, part], part))
                    for layer in (layer_up, layer_down)
                )
            closed_up, closed_down = (W.index_select(1, step.closing) for W in (up, down))
            left = () if s_up is None or s_down is None else (s_up, s_down)
            yield Chunk(step.start, step.stop, by, layer_up, layer_down, closed_up, closed_down, left)

    def _last(self, x: Tensor, part: slice) -> Tensor:
        last = self.plan.last[part]
        return x[:, torch.arange(len(last), device=last.device), last]


def error_rows(o: Tensor, k: Tensor, v: Tensor, squared: bool, residual: bool) -> Tensor:
    """e, the loss's gradient at the output: o is what the layers make of k, without the input that is added."""
    if not squared:
        return -v
    return 2 * ((o + k if residual else o) - v)


def coefficients(
    eta: Tensor, g: Tensor | None = None, mu: Tensor | None = None
) -> tuple[Coefficients, Tensor | None, Tensor | None]:
    """c_t, d_t, c_tj of chunks with gates [..., b]; then the momentum's own: prod mu up to t, eta_j prod mu past j."""
    ones = torch.ones(eta.shape[-1], eta.shape[-1], dtype=eta.dtype, device=eta.device).tril()
    seen = ones > 0
    span = ones if g is None else decay_between(g)
    state = None if g is None else g.cumsum(-1).exp()
    eta = eta[..., None, :]
    if mu is None:
        return Coefficients(state, None, (eta * span).tril(), seen), None, None
    since = torch.where(ones.tril(-1) > 0, mu[..., :, None], 1.0).cumprod(-2).tril()
    upto = mu.cumprod(-1)
    # A NaN in mu reaches the rows after it, and is not lost in those before.
    rows = (eta * mix(span, since, seen)).tril()
    return Coefficients(state, mix(span, upto[..., None], seen)[..., 0], rows, seen), upto, (eta * since).tril()


def next_momentum(layer: Layer, decay: Tensor, rows: Tensor) -> Tensor:
    """prod mu S_0 + sum_j eta_j prod mu x_j^T e_j, for decay [G, A] and rows [G, A, b]."""
    assert layer.momentum is not None
    return decay[..., None, None] * layer.momentum + layer.inputs.mT @ (rows[..., None] * layer.errors)
