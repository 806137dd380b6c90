"""What `mctune bench` sets mctune against: torch's attention, FlashAttention 3, fla's kernels, torch.compile.

Each takes its tensors in the layout that it prefers, arranged beforehand: none is charged for a copy.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mctune.measure.gpu.shapes import Call, Data, Results, Shape, Tensor, through_autograd, through_options
from mctune.runtime.api.functional import memory_caching

Make = Callable[[Shape, Data], Call]
DISTRIBUTIONS = ("torch", "fla-core", "flash-attn-3")
"""Whose kernels they are."""
FA3_MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")
"""Where FlashAttention 3 keeps its functions: FlashAttention 2 has them in ``flash_attn.flash_attn_interface``."""


def attention(backend: SDPBackend) -> Make:
    """Causal attention; a decoded token attends to the whole context, which flash splits over the GPU by itself."""

    def make(shape: Shape, data: Data) -> Call:
        if shape.kind == "decode":
            q, k, v = data.heads_first

            def step() -> Results:
                with torch.no_grad(), sdpa_kernel(backend):
                    return {"y": F.scaled_dot_product_attention(q, k, v)}

            return step

        def attend(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                query, key, value = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

        return through_autograd(shape, data, attend, routed=False)

    return make


def products(shape: Shape, data: Data) -> Call:
    """A decoded token's attention as two products and a softmax: SDPA's own such form widens the cache to float32."""
    q, k, v = data.heads_first
    keys, scale = k.transpose(-1, -2), shape.D**-0.5

    def step() -> Results:
        with torch.no_grad():
            return {"y": ((q * scale) @ keys).softmax(-1) @ v}

    return step


def fa3_module() -> str | None:
    """FlashAttention 3's module, where the machine has it."""
    for name in FA3_MODULES:
        # A broken installation counts as none.
        with contextlib.suppress(ImportError, ValueError):
            if importlib.util.find_spec(name) is not None:
                return name
    return None


def fa3(shape: Shape, data: Data) -> Call:
    """The same by FlashAttention 3, which takes [B, T, H, D]; over a cache it chooses the splits itself."""
    module = importlib.import_module(fa3_module() or FA3_MODULES[0])

    def only(found: Tensor | tuple[Tensor, ...]) -> Tensor:
        # Its first releases returned the logsumexp too.
        return found[0] if isinstance(found, tuple) else found

    if shape.kind == "decode":
        q = data.q[:, -1:].contiguous()

        def step() -> Results:
            with torch.no_grad():
                return {"y": only(module.flash_attn_with_kvcache(q, data.k, data.v))}

        return step

    def run(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        return only(module.flash_attn_func(q, k, v, causal=True))

    return through_autograd(shape, data, run, routed=False)


def fla_linear(shape: Shape, data: Data) -> Call:
    """The recurrence alone."""
    from fla.ops.linear_attn import chunk_linear_attn

    def run(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        y: Tensor = chunk_linear_attn(q, k, v, normalize=False)[0]
        return y

    return through_autograd(shape, data, run, routed=False)


def fla_gla(shape: Shape, data: Data) -> Call:
    """The recurrence with a decay for each token and head."""
    from fla.ops.simple_gla import chunk_simple_gla

    def run(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        y: Tensor = chunk_simple_gla(q, k, v, data.g)[0]
        return y

    return through_autograd(shape, data, run, routed=False)


def fla_log_linear(shape: Shape, data: Data) -> Call:
    """Every level of the hierarchy with a weight of its own, in the dtype of q: its kernels multiply the two."""
    from fla.ops.log_linear_attn import chunk_log_linear_attn

    levels = math.ceil(math.log2(shape.T)) + 1
    scales = torch.rand(*data.g.shape, levels, device=data.g.device).to(data.q.dtype)

    def run(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        y: Tensor = chunk_log_linear_attn(q, k, v, data.g, scales, scale=None)[0]
        return y

    return through_autograd(shape, data, run, routed=False)


def compiled(aggregation: str) -> Make:
    """mctune's PyTorch path under torch.compile."""

    def make(shape: Shape, data: Data) -> Call:
        problem = shape.problem(aggregation)
        # Otherwise it makes the length dynamic at the second one that it sees, and compiles more slowly.
        function = torch.compile(memory_caching, dynamic=False)
        return through_autograd(shape, data, through_options(function, problem), problem.routed)

    return make
