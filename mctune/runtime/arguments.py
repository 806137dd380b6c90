"""What ``memory_caching`` accepts: every bad combination is named, with the limit and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .errors import ArgumentError
from .segments import SEGMENTATIONS, Segments, make_segments

Tensor = torch.Tensor
AGGREGATIONS = ("residual", "grm", "soup", "ssc", "mean")
ROUTED = ("grm", "soup", "ssc")
"""Aggregations whose gates compare a token's connector u with the segments' mean keys."""
STATE_INITS = ("independent", "checkpoint")
DEEP = ("dla", "titans")
GATES = {"linear": (), "swla": ("g", "beta", "lam"), "dla": ("eta",), "titans": ("g", "eta", "mu")}
"""The gates that each recurrence takes."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call, checked and with defaults filled in."""

    q: Tensor
    k: Tensor
    v: Tensor
    u: Tensor | None
    recurrence: str
    aggregation: str
    segmentation: str
    segment_length: int
    state_init: str
    top_k: int
    scale: float
    g: Tensor | None
    beta: Tensor | None
    lam: Tensor | None
    eta: Tensor | None
    mu: Tensor | None
    W_up: Tensor | None
    W_down: Tensor | None
    memory_residual: bool
    inner_chunk: int
    cu_seqlens: Tensor | None

    @property
    def deep(self) -> bool:
        """Whether the memory is a two-layer MLP."""
        return self.recurrence in DEEP

    @property
    def carried(self) -> bool:
        """Whether a segment starts from the end state of the one before it."""
        return self.state_init == "checkpoint"

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def segments(self) -> Segments:
        """Where the row is cut; computing it checks ``cu_seqlens``."""
        return make_segments(self.q.shape[1], self.segmentation, self.segment_length, self.cu_seqlens)

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The call with ``function`` of every tensor that has a row a token, [B, T, H, ...]."""
        tensors: dict[str, Any] = {n: getattr(self, n) for n in ("q", "k", "v", "u", "g", "beta", "lam", "eta", "mu")}
        mapped: dict[str, Any] = {name: function(x) for name, x in tensors.items() if x is not None}
        return replace(self, **mapped)

    @property
    def requires_grad(self) -> bool:
        """Whether autograd wants a gradient of any argument."""
        tensors = (self.q, self.k, self.v, self.u, self.g, self.beta, self.lam, self.eta, self.mu)
        needed = any(x is not None and x.requires_grad for x in (*tensors, self.W_up, self.W_down))
        return needed and torch.is_grad_enabled()


def check_options(
    recurrence: str,
    aggregation: str,
    segmentation: str,
    state_init: str,
    segment_length: int,
    top_k: int,
    inner_chunk: int,
) -> None:
    """Refuse an unknown name or a size below 1 among the options that are not tensors."""
    choices = {
        "recurrence": (recurrence, tuple(GATES)),
        "aggregation": (aggregation, AGGREGATIONS),
        "segmentation": (segmentation, SEGMENTATIONS),
        "state_init": (state_init, STATE_INITS),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ArgumentError(f"{name}={value!r} is not one of {', '.join(allowed)}")
    sizes = {"inner_chunk": (inner_chunk, recurrence in DEEP), "top_k": (top_k, aggregation == "ssc")}
    sizes["segment_length"] = (segment_length, segmentation != "logarithmic")
    for name, (size, used) in sizes.items():
        if used and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ArgumentError(f"{name}={size!r}: must be an integer of at least 1")


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor | None,
    *,
    recurrence: str,
    aggregation: str,
    segment_length: int,
    segmentation: str,
    state_init: str,
    top_k: int,
    scale: float | None,
    gates: Mapping[str, Tensor | None],
    W_up: Tensor | None,
    W_down: Tensor | None,
    memory_residual: bool,
    inner_chunk: int,
    cu_seqlens: Tensor | None,
) -> Call:
    """Check the arguments of ``memory_caching`` against each other; ``gates`` maps g, beta, lam, eta, mu.

    Raises:
        ArgumentError: naming the argument, what it is, what it must be.
    """
    check_options(recurrence, aggregation, segmentation, state_init, segment_length, top_k, inner_chunk)
    _check_tensors(q, k, v, u)
    B, _, _, Dk = q.shape
    for name, gate in gates.items():
        if gate is not None:
            _check_gate(name, gate, recurrence, q)
    _check_deep(recurrence, W_up, W_down, memory_residual, q, v.shape[-1])
    if scale is not None and not math.isfinite(scale):
        raise ArgumentError(f"scale={scale}: must be finite; leave it out for Dk ** -0.5")
    if segmentation == "packed" and B != 1:
        raise ArgumentError(
            f"q has B={B} with segmentation='packed': the sequences stand in one row, so B is 1; put the batch into "
            "cu_seqlens"
        )
    return Call(
        q,
        k,
        v,
        u,
        recurrence,
        aggregation,
        segmentation,
        segment_length,
        state_init,
        top_k,
        Dk**-0.5 if scale is None else scale,
        gates["g"],
        gates["beta"],
        gates["lam"],
        gates["eta"],
        gates["mu"],
        W_up,
        W_down,
        memory_residual,
        inner_chunk,
        cu_seqlens,
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, u: Tensor | None) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise ArgumentError(f"q is {list(q.shape)}; it must be [B, T, H, Dk] with no axis of length 0")
    if q.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ArgumentError(f"q is {q.dtype}; it must be one of {names}")
    for name, x in (("k", k), ("u", u)):
        if x is not None and x.shape != q.shape:
            raise ArgumentError(f"{name} is {list(x.shape)}; it must be like q, {list(q.shape)}")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] == 0:
        raise ArgumentError(f"v is {list(v.shape)}; it must be [B, T, H, Dv] with q's {list(q.shape[:3])} in front")
    for name, x in (("k", k), ("v", v), ("u", u)):
        if x is not None and x.dtype != q.dtype:
            raise ArgumentError(f"{name} is {x.dtype} and q is {q.dtype}; q, k, v and u share one dtype")
        _check_device(name, x, q)


def _check_device(name: str, x: Tensor | None, q: Tensor) -> None:
    if x is not None and x.device != q.device:
        raise ArgumentError(f"{name} is on {x.device} and q on {q.device}; move them to one device")


def _check_gate(name: str, gate: Tensor, recurrence: str, q: Tensor) -> None:
    takes = GATES[recurrence]
    if name not in takes:
        users = ", ".join(repr(user) for user, names in GATES.items() if name in names)
        has = f"takes only {', '.join(takes)}" if takes else "takes no gate"
        raise ArgumentError(f"{name} with recurrence={recurrence!r}, which {has}; {name} belongs to {users}")
    if gate.shape != q.shape[:3]:
        raise ArgumentError(f"{name} is {list(gate.shape)}; it must be [B, T, H] = {list(q.shape[:3])}")
    if not gate.is_floating_point():
        raise ArgumentError(f"{name} is {gate.dtype}; it must be float32")
    _check_device(name, gate, q)
    if name == "g" and _readable(gate) and bool((gate > 0).any()):
        raise ArgumentError(f"g reaches {float(gate.max()):g}; it is the logarithm of a decay, at most 0")


def _readable(x: Tensor) -> bool:
    """Whether values can be checked: doing so would stall a GPU, break a graph, and is impossible under vmap."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return x.device.type == "cpu" and not traced


def _check_deep(
    recurrence: str, W_up: Tensor | None, W_down: Tensor | None, memory_residual: bool, q: Tensor, Dv: int
) -> None:
    H, Dk = q.shape[2:]
    if recurrence not in DEEP:
        for name, weight in (("W_up", W_up), ("W_down", W_down)):
            if weight is not None:
                raise ArgumentError(f"{name} with recurrence={recurrence!r}, which has no layers; use dla or titans")
        return
    if W_up is None or W_down is None:
        missing = "W_up" if W_up is None else "W_down"
        raise ArgumentError(f"recurrence={recurrence!r} needs {missing}: W_up is [H, Dk, E], W_down [H, E, Dv]")
    if W_up.dim() != 3 or W_up.shape[:2] != (H, Dk) or W_up.shape[2] == 0:
        raise ArgumentError(f"W_up is {list(W_up.shape)}; it must be [H, Dk, E] with H={H}, Dk={Dk} (usually E = 4 Dk)")
    if W_down.shape != (H, W_up.shape[2], Dv):
        raise ArgumentError(f"W_down is {list(W_down.shape)}; it must be [H, E, Dv] = {[H, W_up.shape[2], Dv]}")
    for name, weight in (("W_up", W_up), ("W_down", W_down)):
        if not weight.is_floating_point():
            raise ArgumentError(f"{name} is {weight.dtype}; it must be floating point")
        _check_device(name, weight, q)
    if memory_residual and Dk != Dv:
        raise ArgumentError(
            f"memory_residual=True with Dk={Dk}, Dv={Dv}: a memory can add its input only if Dk = Dv; pass "
            "memory_residual=False"
        )
