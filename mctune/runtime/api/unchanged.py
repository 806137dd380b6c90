"""Does a replacement do what a layer does? Both are run on the same input, and nothing of the layer is left changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor
TOKENS = 256
"""Enough for a decay of 0.9999 a token to show in float32, few enough for a large layer on a CPU."""
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 6e-3, torch.bfloat16: 4e-2}
_TENSOR_CORES = 1e-3
"""Of the error of a token over how much the output varies; what rounding can come to, that of float32 on a GPU too."""
_UNCHECKED = "check=False attaches to it unseen"


def why_not_same(
    layer: nn.Module, replacement: Callable[[Tensor], Any], whole: bool, hidden_states: Tensor | None = None
) -> str | None:
    """Why a replacement cannot take the place of a layer's forward; ``None`` if their outputs are the same.

    Both run in eval mode and in training, in the layer's dtype and on its device. Modes, buffers, attributes, gradients
    and the random state are as before afterwards; hooks of the layer itself do not run, those of its parts do.

    Args:
        layer: takes hidden states, [B, T, hidden_size], alone.
        replacement: takes and returns what the layer's forward does.
        whole: whether that is a tuple of three, the output first, or the output alone.
        hidden_states: what to run on; ``None`` is a random row of :data:`TOKENS` tokens.
    """
    x = hidden_states if hidden_states is not None else _random(layer)
    if isinstance(x, str):
        return x
    with _undisturbed(layer, x.device):
        layer.eval()
        try:
            was = layer.forward(x)
        except Exception as error:
            return f"cannot be run on hidden states {list(x.shape)} alone ({_first_line(error)}; {_UNCHECKED})"
        if isinstance(was, tuple) != whole or (whole and len(was) != 3):
            expected = "(output, None, cache)" if whole else "the output alone"
            return f"returns {_shape(was)}, and would return {expected}, so its model could not read it"
        try:
            now = replacement(x)
        except Exception as error:
            return f"cannot be replaced ({_first_line(error)})"
        before, after = _output(was), _output(now)
        reason = _difference(before, after)
        if reason is not None:
            return reason
        layer.train()
        try:
            if _difference(before, _output(layer.forward(x))) is None or _difference(after, _output(replacement(x))):
                return None
        except Exception:
            return None  # It does not train, so nothing of its training is lost.
        return (
            "does in training what it does not in eval mode, dropout for one, which would be gone (set its rate to 0; "
            f"{_UNCHECKED})"
        )


def _output(returned: Any) -> Any:
    return returned[0] if isinstance(returned, tuple) else returned


def _random(layer: nn.Module) -> Tensor | str:
    """A row of tokens of unequal sizes, or why there can be none."""
    weight = next((p for p in layer.parameters() if p.is_floating_point()), None)
    like = torch.empty(0) if weight is None else weight
    if like.is_meta:
        return f"is on the meta device and cannot be run (attach once its weights are there; {_UNCHECKED})"
    widths = (getattr(part, "in_features", None) for part in (getattr(layer, "q_proj", None), *layer.modules()))
    width = next((width for width in widths if isinstance(width, int)), getattr(layer, "hidden_size", None))
    if not isinstance(width, int):
        return f"does not say how wide its hidden states are (pass some, [B, T, hidden_size], as check=; {_UNCHECKED})"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, width, generator=generator) * (0.5 + torch.rand(1, TOKENS, 1, generator=generator))
    return x.to(like)


@contextmanager
def _undisturbed(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back modes, attributes, buffers and the random state."""
    modules = [(module, dict(module.__dict__), dict(module._buffers)) for module in layer.modules()]
    values = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    forked = [] if device.type == "cpu" else [device]
    try:
        with torch.no_grad(), torch.random.fork_rng(forked, device_type=device.type if forked else "cuda"):
            yield
    finally:
        for module, attributes, buffers in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _difference(was: Any, now: Any) -> str | None:
    """How two outputs differ by more than rounding does."""
    if not isinstance(was, Tensor) or was.dim() != 3 or was.shape != now.shape or was.dtype != now.dtype:
        return f"returns {_shape(was)}, and would return {_shape(now)}"
    tolerance = _TOLERANCES.get(was.dtype, _TENSOR_CORES)
    if was.device.type != "cpu":
        tolerance = max(tolerance, _TENSOR_CORES)
    before, after = was.double(), now.double()
    varies = float((before - before.mean(1, keepdim=True)).square().mean().sqrt())
    if not bool(before.isfinite().all()) or varies <= 1e-6 * float(before.abs().max()):
        what = "the same for every token" if before.isfinite().all() else "values that are not finite"
        return f"gives {what}, so that nothing can be compared ({_UNCHECKED})"
    error = float((after - before).square().mean(-1).sqrt().max()) / varies
    if error <= tolerance:  # not so if it is NaN
        return None
    return (
        f"would change within one segment: its output by {error:.2g} times as much as it varies, and rounding explains "
        f"{tolerance:g}"
    )


def _shape(y: Any) -> str:
    if isinstance(y, Tensor):
        return f"{str(y.dtype).removeprefix('torch.')} {list(y.shape)}"
    return f"a tuple of {len(y)}" if isinstance(y, tuple) else f"a {type(y).__name__}"


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:157] + '...'}"
