"""Tensors that outlive a call: made outside of the caller's modes, so that a later call in another mode can use them.

What is memoised in one mode (``torch.inference_mode``, ``FakeTensorMode``, a device context, a transform) would carry
it into every later call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def ordinary() -> Iterator[None]:
    """Tensors made here are ordinary ones, whatever the mode outside; no gradient is recorded."""
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        transformed = peek_interpreter_stack() is not None
        with temporarily_clear_interpreter_stack() if transformed else nullcontext():
            if torch._C._len_torch_dispatch_stack():
                with _disable_current_modes():
                    yield
            else:
                yield


def in_ordinary_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: run it in :func:`kept`."""

    @wraps(function)
    def run(*arguments: P.args, **named: P.kwargs) -> T:
        with kept():
            return function(*arguments, **named)

    return run


def kept() -> Any:
    """:func:`ordinary` under ``torch.inference_mode``, whose tensors no later call could change; else nothing."""
    return ordinary() if torch.is_inference_mode_enabled() else nullcontext()


def without_autocast(device: torch.device) -> Any:
    """A context without autocast on a device; torch has none on meta, and refuses to turn it off there."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def readable(x: torch.Tensor) -> bool:
    """Whether values can be read: doing so would stall a GPU, break a graph, and is impossible under vmap."""
    if x.device.type != "cpu" or type(x) not in (torch.Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    return not (torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())


def for_now(x: T) -> T:
    """A memoised tensor, or what holds some, for use under the modes at work: under ``FakeTensorMode``, fake copies."""
    fake = fake_mode()
    return x if fake is None else _faked(x, fake)


def fake_mode() -> FakeTensorMode | None:
    """The ``FakeTensorMode`` at work: tensors have shapes and no values."""
    if not torch._C._len_torch_dispatch_stack():
        return None
    return next((mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, FakeTensorMode)), None)


def _faked(x: Any, mode: FakeTensorMode) -> Any:
    if isinstance(x, torch.Tensor):
        return mode.from_tensor(x)
    if isinstance(x, tuple):
        return tuple(_faked(part, mode) for part in x)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: _faked(getattr(x, field.name), mode) for field in fields(x)})
    return x
