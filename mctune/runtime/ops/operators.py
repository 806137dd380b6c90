"""``memory_caching`` and its backward as operators of torch.library: opaque to compilers, known to autograd and vmap.

The operators are ``memory_caching_forward`` and ``memory_caching_backward`` in the namespace of this copy of the
runtime (``mctune::``). Their arguments are those of :class:`Call`: all tensors, then all options.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.library import custom_op

from ..call import Call
from ..errors import BackendError
from ..kernels.dispatch import NAMESPACE, Route
from ..kernels.kept import Sizes, shape
from ..options import NAMES
from .run import TENSORS, run_backward, run_forward
from .vmap import batch_backward, batch_forward

Tensor = torch.Tensor
_INPUTS = (*TENSORS, "cu_seqlens")
_TENSORS = "Tensor q, Tensor k, Tensor v, " + ", ".join(f"Tensor? {name}" for name in _INPUTS[3:])
_OPTIONS = (
    "str recurrence, str aggregation, str segmentation, SymInt segment_length, str state_init, SymInt top_k, "
    "float scale, bool memory_residual, SymInt inner_chunk, str route"
)


def forward(call: Call, route: Route) -> tuple[Tensor, list[Tensor]]:
    """y [B, T, H, Dv], and what the route keeps for a backward (:func:`run_forward`)."""
    arguments = (*flatten(call), route.text)
    if torch._C._are_functorch_transforms_active():
        return _transformed(*arguments), []
    done: tuple[Tensor, list[Tensor]] = forward_op(*arguments, " ".join(route.keeps))
    return done


def flatten(call: Call) -> tuple[Any, ...]:
    """The arguments of the forward operator, but for the last two, route and keeps."""
    return tuple([getattr(call, name) for name in (*_INPUTS, *NAMES)])


def _call(*arguments: Any) -> Call:
    return Call(**dict(zip((*_INPUTS, *NAMES), arguments, strict=True)))


@custom_op(
    f"{NAMESPACE}::memory_caching_forward",
    mutates_args=(),
    schema=f"({_TENSORS}, {_OPTIONS}, str keeps) -> (Tensor y, Tensor[] kept)",
)
def forward_op(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    *inputs, route, keeps = arguments
    return run_forward(_call(*inputs), route, tuple(keeps.split()))


@custom_op(
    f"{NAMESPACE}::memory_caching_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_TENSORS}, Tensor[] kept, {_OPTIONS}, str keeps) -> ("
    + ", ".join(f"Tensor d{name}" for name in TENSORS)
    + ")",
)
def backward_op(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    n = len(_INPUTS)
    kept, *options, route, keeps = arguments[n:]
    named = dict(zip(keeps.split(), kept, strict=True))
    return run_backward(dy, _call(*arguments[:n], *options), named, route)


@forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    *inputs, _, keeps = arguments
    call = _call(*inputs)
    shapes = [shape(name, Sizes.of(call)) for name in keeps.split()]
    return call.q.new_empty(call.v.shape), [call.q.new_empty(size, dtype=dtype) for size, dtype in shapes]


@backward_op.register_fake
def _(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in arguments[: len(TENSORS)])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    n, kept = len(_INPUTS), output[1]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:n], *kept)
    ctx.options = inputs[n:]


def _gradients(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    saved, n = ctx.saved_tensors, len(_INPUTS)
    return _wanted(ctx, backward_op(dy, *saved[:n], list(saved[n:]), *ctx.options))


def _wanted(ctx: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    found = [dx if needed else None for dx, needed in zip(gradients, needs, strict=False)]
    return (*found, *(None,) * (len(needs) - len(found)))


def _refuse(ctx: Any, *_: Any) -> None:
    raise BackendError('memory_caching has no second derivative by this path; backend="eager" has')


forward_op.register_autograd(_gradients, setup_context=_save)
backward_op.register_autograd(_refuse)
forward_op.register_vmap(partial(batch_forward, forward_op))
backward_op.register_vmap(partial(batch_backward, backward_op))


# torch.func does not know the autograd function that register_autograd makes (torch 2.13); it knows this one.
class _Transformed(torch.autograd.Function):
    """The forward under the transforms of torch.func; nothing is saved but the arguments."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        y: Tensor = forward_op(*arguments, "")[0]
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        n = len(_INPUTS)
        ctx.save_for_backward(*inputs[:n])
        ctx.options = inputs[n:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (dy, *ctx.saved_tensors, [], *ctx.options, "")
        return _wanted(ctx, _TransformedBackward.apply(*arguments))  # type: ignore[no-untyped-call]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _transformed(*arguments: Any) -> Tensor:
    y: Tensor = _Transformed.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


class _TransformedBackward(torch.autograd.Function):
    """The same of the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = backward_op(*arguments)
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(_refuse)
