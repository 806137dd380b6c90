"""What the operators compute: tuned kernels on converted arrays, or the eager path, and its gradients by autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..call import Call
from ..eager.ends import end_states
from ..eager.forward import by_head, lay_out, run_eager
from ..eager.gates import descriptors
from ..eager.rows import rows_of
from ..errors import KernelError
from ..kernels.dispatch import fall_back, kernel_for
from ..kernels.kept import OF_SEGMENTS, ROWS, make_kept, segments_at_most
from ..kernels.launch import as_read, options, rows
from ..modes import without_autocast

Tensor = torch.Tensor
TENSORS = ("q", "k", "v", "u", "g", "beta", "lam", "eta", "mu", "W_up", "W_down")
"""The arguments that have a gradient, in the order of the operators."""


def run_forward(call: Call, route: str, keeps: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """y [B, T, H, Dv] in the dtype of q, and the arrays that ``keeps`` names, as :func:`kept.shape` has them."""
    if route != "eager":
        try:
            return _launch_forward(call, route, keeps)
        except KernelError as error:
            fall_back(error, route)
    with torch.no_grad():
        return run_eager(call, lay_out(call)), _kept(call, keeps, _eager_kept(call, keeps) if keeps else {})


def run_backward(dy: Tensor, call: Call, kept: Mapping[str, Tensor], route: str) -> tuple[Tensor, ...]:
    """The gradients of :data:`TENSORS`, contiguous, in their dtypes; an empty one for what is absent.

    Without u, the connector's gradient is in dq. ``kept``: what :func:`run_forward` gave, by name.
    """
    if route != "eager":
        try:
            return _launch_backward(dy, call, route, kept)
        except KernelError as error:
            fall_back(error, route)
    return _eager_backward(dy, call)


def _launch_forward(call: Call, route: str, keeps: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    kernel = kernel_for(call, "forward", route)
    forward = kernel(*rows(call, kernel), **options(call), segments=call.segments, keep=keeps)
    return forward.y.to(call.q.dtype), _kept(call, keeps, forward.kept)


def _launch_backward(dy: Tensor, call: Call, route: str, kept: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    kernel = kernel_for(call, "backward", route)
    used = call.q.shape[0] * call.q.shape[2] * call.segments.count
    kept = {name: x[:used] if name in OF_SEGMENTS else x for name, x in kept.items()}
    read = rows(call, kernel)
    found = kernel(as_read(dy, read[0].dtype), *read, **options(call), segments=call.segments, kept=kept)
    by_name = found._asdict()
    if call.u is None and found.u is not None:
        by_name["q"] = found.q + found.u
    return tuple(_gradient(getattr(call, name), by_name.get(name), call.q) for name in TENSORS)


def _gradient(x: Tensor | None, dx: Tensor | None, like: Tensor) -> Tensor:
    if x is None:
        return like.new_empty(0)
    return x.new_zeros(x.shape) if dx is None else dx.to(x.dtype).contiguous()


def _eager_backward(dy: Tensor, call: Call) -> tuple[Tensor, ...]:
    tensors = {name: getattr(call, name) for name in TENSORS if getattr(call, name) is not None}
    # An operator's body runs below autograd, so enable it here; autocast would narrow the gradients' products.
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with autograd, torch.enable_grad(), without_autocast(call.q.device):
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        y = run_eager(replace(call, **leaves), lay_out(call))
        found = torch.autograd.grad(y, list(leaves.values()), dy, materialize_grads=True)
    gradients = dict(zip(leaves, found, strict=True))
    return tuple(gradients[name].contiguous() if name in gradients else call.q.new_empty(0) for name in TENSORS)


def _kept(call: Call, keeps: Sequence[str], made: Mapping[str, Tensor]) -> list[Tensor]:
    """The arrays in order; rows of zeros after those of a packed row's segments."""
    B, T, H, _ = call.q.shape
    rows = B * H * segments_at_most(T, call.segmentation, call.segment_length, call.cu_seqlens) if keeps else 0
    return [_lengthened(made[name], rows) if name in OF_SEGMENTS else made[name] for name in keeps]


def _lengthened(x: Tensor, rows: int) -> Tensor:
    return x if x.shape[0] == rows else torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def _eager_kept(call: Call, keeps: Sequence[str]) -> dict[str, Tensor]:
    """The same arrays as kernels leave them."""
    layout = lay_out(call)
    k, v = (by_head(x, torch.float32) for x in (call.k, call.v))
    u = by_head(call.q if call.u is None else call.u, torch.float32)
    states, means = end_states(call, layout, k, v).states, descriptors(k, k, layout)[0]
    top_k = call.top_k if call.reads.sparse else None
    rows = {} if set(ROWS).isdisjoint(keeps) else rows_of(call, layout)
    return make_kept(keeps, states, means, u, k, top_k, call.segments, call.q.dtype, rows)
