"""What a deep memory (arXiv:2602.24281, Eq. 30-31, 34-36) computes token by token on its way to y, and its backward
reads."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu

from ..call import Call
from ..modes import without_autocast
from .deep import Chunk
from .forward import by_head, deep_walk, in_tokens, mix_hidden
from .gates import make_gate
from .plan import Layout

Tensor = torch.Tensor


def rows_of(call: Call, layout: Layout) -> dict[str, Tensor]:
    """Rows by token, [B, T, H, E], and [B, T, H, Dv] for ``rows_err`` and ``online``.

    ``hidden`` are the hidden units before gelu that a token reads of its own segment; ``rows_h`` those of the writes,
    whose errors are ``rows_err``, and ``rows_raw`` what these make of W_down: the gradients of the units after gelu.
    ``online`` is what is read of the own segment; or, where parameters are mixed, ``mixture`` the hidden units of all
    states together.
    """
    with torch.no_grad(), without_autocast(call.q.device):
        q, k, v = (by_head(x, call.compute_dtype) for x in (call.q, call.k, call.v))
        u = q if call.u is None else by_head(call.u, call.compute_dtype)
        steps, plan = list(deep_walk(call, layout, k, v)), layout.states
        gate = make_gate(call.reads, call.top_k, u, k, layout)
        hidden, mixture = mix_hidden(q * call.scale, plan, steps, gate, layout)
        rows = {
            "hidden": hidden,
            "rows_h": in_tokens(plan, [c.up.inputs @ c.up.state for c in steps]),
            "rows_err": in_tokens(plan, [c.down.errors for c in steps]),
            "rows_raw": in_tokens(plan, [c.down.errors @ c.down.state.mT for c in steps]),
        }
        if call.reads.mixes_parameters:
            rows["mixture"] = mixture
        else:
            online = in_tokens(plan, _second(steps, plan.take(gelu(hidden, approximate="tanh"))))
            rows["online"] = online + q * call.scale if call.memory_residual else online
    B, T, H, _ = call.q.shape
    return {name: x.view(B, H, T, -1).transpose(1, 2) for name, x in rows.items()}


def _second(steps: list[Chunk], z: Tensor) -> list[Tensor]:
    return [chunk.down.read(z[:, chunk.start : chunk.stop], chunk.by) for chunk in steps]
