"""Coefficients of inner chunks from the gates of tokens, and their gradients: c_t, d_t, c_tj (Eq. 30-31, 34-36).

They are small, a row of b numbers a token: torch makes them, and its autograd turns their gradients into the gates'.
"""

from __future__ import annotations

import torch

from ....eager.deep import coefficients
from ..tables import Tables
from .groups import Weights

Tensor = torch.Tensor


def make_weights(
    tables: Tables, b: int, like: Tensor, g: Tensor | None, eta: Tensor | None, mu: Tensor | None
) -> tuple[Tensor, Weights]:
    """int64 [P, b], the token of each place of the inner chunks, T where there is none; and the coefficients.

    ``tables``: whose pieces are inner chunks; ``like`` [B, T, H, D]; gates [B, T, H] or ``None``.
    """
    T = like.shape[1]
    place = tables.begin.long()[:, None] + torch.arange(b, device=like.device)
    place = torch.where(place < tables.end[:, None], place, T)
    made = _weights(place, like, *(_taken(x, place) for x in (g, eta, mu)))
    return place, made


def _taken(gate: Tensor | None, place: Tensor) -> Tensor | None:
    """[B, T, H] as [B*H, P, b], 0 where there is no token."""
    if gate is None:
        return None
    gate = torch.nn.functional.pad(gate.to(torch.float32), (0, 0, 0, 1))
    B, _, H = gate.shape
    return gate.index_select(1, place.flatten()).transpose(1, 2).reshape(B * H, *place.shape)


def _weights(place: Tensor, like: Tensor, g: Tensor | None, eta: Tensor | None, mu: Tensor | None) -> Weights:
    B, T, H, _ = like.shape
    if eta is None:
        eta = (place < T).to(torch.float32).expand(B * H, -1, -1)
    by, upto, products = coefficients(eta, g, mu)
    index = ((place < T).sum(1) - 1).expand(B * H, -1)[..., None]
    row = index[..., None].expand(-1, -1, -1, place.shape[1])
    made = [by.rows, by.rows.gather(2, row)[:, :, 0], by.state, by.momentum, None, None]
    if upto is not None and products is not None:
        made[4:] = upto.gather(2, index)[..., 0], products.gather(2, row)[:, :, 0]
    return Weights(*(x if x is None else x.contiguous() for x in made))  # type: ignore[arg-type]


def gate_gradients(
    place: Tensor, gradients: Weights, g: Tensor | None, eta: Tensor | None, mu: Tensor | None
) -> dict[str, Tensor | None]:
    """Gradients of the gates that were given, [B, T, H] float32, from those of their coefficients."""
    given = {name: x for name, x in (("g", g), ("eta", eta), ("mu", mu)) if x is not None}
    if not given:
        return {}
    # An operator's body runs below autograd, so enable it here.
    below = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with below, torch.enable_grad():
        leaves = {name: x.detach().to(torch.float32).requires_grad_() for name, x in given.items()}
        like = next(iter(given.values()))[..., None]
        taken = (_taken(leaves.get(name), place) for name in ("g", "eta", "mu"))
        made = _weights(place, like, *taken)
        both = [(x, dx) for x, dx in zip(made, gradients, strict=True) if x is not None and x.requires_grad]
        found = torch.autograd.grad(
            [x for x, _ in both], list(leaves.values()), [dx for _, dx in both], materialize_grads=True
        )
    return dict(zip(leaves, found, strict=True))
