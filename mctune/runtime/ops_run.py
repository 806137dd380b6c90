"""What the operators compute: tuned kernels on converted arrays, or the eager path, and its gradients by autograd."""

from __future__ import annotations

from dataclasses import replace

import torch

from .arguments import Call
from .dispatch import fall_back, kernel_for
from .eager import by_head, lay_out, run_eager, swla_gates
from .gates import descriptors
from .launch import as_read, options, rows
from .linear import run_linear
from .tvm_forward import padded
from .tvm_loader import KernelError

Tensor = torch.Tensor
TENSORS = ("q", "k", "v", "u", "g", "beta", "lam", "eta", "mu", "W_up", "W_down")
"""The arguments that have a gradient, in the order of the operators."""


def saved_rows(T: int, segmentation: str, segment_length: int, cu_seqlens: Tensor | None) -> int:
    """States that a forward saves of each row and head: those of a row, or as many as a packed row can have at most."""
    if segmentation == "packed":
        return T // segment_length + (1 if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    return (T + segment_length - 1) // segment_length


def run_forward(call: Call, backend: str, saves: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, H, Dv] in the dtype of q, and what ``saves`` asks for, float32, else two empty tensors.

    Saved are the end state [B * H * N, Dk, Dv] and the mean key [B * H * N, Dk] of every segment, widths padded as
    kernels have them. A packed row's N is :func:`saved_rows`; what its segments leave unused is at the end, and 0.
    """
    if backend != "eager":
        try:
            return _launch_forward(call, saves)
        except KernelError as error:
            fall_back(error, backend)
    with torch.no_grad():
        y = run_eager(call, lay_out(call))
        return (y, *_saved(call, *_eager_states(call))) if saves else _unsaved(y)


def run_backward(dy: Tensor, call: Call, states: Tensor, means: Tensor, backend: str) -> tuple[Tensor, ...]:
    """The gradients of :data:`TENSORS`, contiguous, in their dtypes; an empty one for what is absent.

    Without u, the connector's gradient is in dq. ``states`` and ``means`` are as :func:`run_forward` gave them.
    """
    if backend != "eager":
        try:
            return _launch_backward(dy, call, states, means)
        except KernelError as error:
            fall_back(error, backend)
    return _eager_backward(dy, call)


def _launch_forward(call: Call, saves: bool) -> tuple[Tensor, Tensor, Tensor]:
    kernel = kernel_for(call, "forward")
    forward = kernel(*rows(call, kernel), **options(call), segments=call.segments)
    y: Tensor = forward.y.to(call.q.dtype)
    return (y, *_saved(call, forward.states, forward.means)) if saves else _unsaved(y)


def _launch_backward(dy: Tensor, call: Call, states: Tensor, means: Tensor) -> tuple[Tensor, ...]:
    kernel, saved = kernel_for(call, "backward"), {}
    if states.numel():
        used = call.q.shape[0] * call.q.shape[2] * call.segments.count
        saved = {"states": states[:used], "means": means[:used]}
    read = rows(call, kernel)
    found = kernel(as_read(dy, read[0].dtype), *read, **options(call), segments=call.segments, **saved)
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
    # An operator's body runs below autograd, which is lifted here; autocast would narrow the gradients' products.
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with autograd, torch.enable_grad(), torch.autocast(call.q.device.type, enabled=False):
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        y = run_eager(replace(call, **leaves), lay_out(call))
        found = torch.autograd.grad(y, list(leaves.values()), dy, materialize_grads=True)
    gradients = dict(zip(leaves, found, strict=True))
    return tuple(gradients[name].contiguous() if name in gradients else call.q.new_empty(0) for name in TENSORS)


def _unsaved(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return y, y.new_empty(0, dtype=torch.float32), y.new_empty(0, dtype=torch.float32)


def _saved(call: Call, states: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of zeros after those of a packed row's segments."""
    B, T, H, _ = call.q.shape
    unused = B * H * saved_rows(T, call.segmentation, call.segment_length, call.cu_seqlens) - states.shape[0]
    if unused == 0:
        return states, means
    return torch.cat([states, states.new_zeros(unused, *states.shape[1:])]), torch.cat(
        [means, means.new_zeros(unused, means.shape[1])]
    )


def _eager_states(call: Call) -> tuple[Tensor, Tensor]:
    """The states and mean keys of every segment as kernels leave them."""
    layout = lay_out(call)
    k, v = (by_head(x, torch.float32) for x in (call.k, call.v))
    states = run_linear(k, k, v, layout.states, swla_gates(call))[1].flatten(0, 1)
    means = descriptors(k, k, layout)[0].flatten(0, 1)
    rows, columns = (padded(x.shape[-1]) - x.shape[-1] for x in (k, v))
    return torch.nn.functional.pad(states, (0, columns, 0, rows)), torch.nn.functional.pad(means, (0, rows))
