"""What a deep memory (arXiv:2602.24281, Eq. 30-31, 34-36) computes token by token on its way to y, and its backward
reads."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu

from ..call import Call
from ..modes import without_autocast
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
        q = q * call.scale
        steps, plan = list(deep_walk(call, layout, k, v)), layout.states
        rows = {
            "rows_h": in_tokens(plan, [c.up.inputs @ c.up.state for c in steps]),
            "rows_err": in_tokens(plan, [c.down.errors for c in steps]),
            "rows_raw": in_tokens(plan, [c.down.errors @ c.down.state.mT for c in steps]),
        }
        if call.reads.mixes_parameters:
            u = by_head(call.q if call.u is None else call.u, call.compute_dtype)
            gate = make_gate(call.reads, call.top_k, u, k, layout)
            rows["hidden"], rows["mixture"] = mix_hidden(q, plan, steps, gate, layout)
        else:
            x = plan.take(q)
            hidden = [c.up.read(x[:, c.start : c.stop], c.by) for c in steps]
            online = [c.down.read(gelu(h, approximate="tanh"), c.by) for c, h in zip(steps, hidden, strict=True)]
            rows["hidden"], rows["online"] = in_tokens(plan, hidden), in_tokens(plan, online)
            if call.memory_residual:
                rows["online"] = rows["online"] + q
    B, T, H, _ = call.q.shape
    return {name: x.view(B, H, T, -1).transpose(1, 2) for name, x in rows.items()}
