"""What a read of mixed parameters (arXiv:2602.24281, Eq. 14-15) computes on its way to y, and its backward reads."""

from __future__ import annotations

import torch

from ..call import Call
from ..modes import without_autocast
from .forward import by_head, deep_walk, in_tokens, mix_hidden
from .gates import make_gate
from .plan import Layout

Tensor = torch.Tensor


def mixture_of(call: Call, layout: Layout) -> dict[str, Tensor]:
    """Hidden units before gelu, and the rows that were written: [B, T, H, E], and rows_err [B, T, H, Dv].

    ``hidden`` is what a token reads of its own segment, ``mixture`` what it reads of all states together; ``rows_z``
    and ``rows_err`` are the inputs and the errors of the writes' second layer.
    """
    with torch.no_grad(), without_autocast(call.q.device):
        q, k, v = (by_head(x, call.compute_dtype) for x in (call.q, call.k, call.v))
        u = q if call.u is None else by_head(call.u, call.compute_dtype)
        steps, plan = list(deep_walk(call, layout, k, v)), layout.states
        gate = make_gate(call.reads, call.top_k, u, k, layout)
        hidden, mixture = mix_hidden(q * call.scale, plan, steps, gate, layout)
        z, err = (in_tokens(plan, [getattr(c.down, rows) for c in steps]) for rows in ("inputs", "errors"))
    rows = {"hidden": hidden, "rows_z": z, "rows_err": err, "mixture": mixture}
    B, T, H, _ = call.q.shape
    return {name: x.view(B, H, T, -1).transpose(1, 2) for name, x in rows.items()}
