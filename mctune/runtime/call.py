"""One call of the operation: its tensors, held against each other and against its options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch

from .arguments import shown
from .errors import ArgumentError
from .modes import readable
from .options import Options
from .segments import Segments, check_bounds_type, check_packing, make_segments
from .traits import RECURRENCES, any_of

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GATES = ("g", "beta", "lam", "eta", "mu")
"""The gates of all recurrences, in the order in which operators take them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Call(Options):
    """The arguments of one call, checked and with defaults filled in; the shapes are those of ``memory_caching``."""

    scale: float
    q: Tensor
    k: Tensor
    v: Tensor
    u: Tensor | None = None
    g: Tensor | None = None
    beta: Tensor | None = None
    lam: Tensor | None = None
    eta: Tensor | None = None
    mu: Tensor | None = None
    W_up: Tensor | None = None
    W_down: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def segments(self) -> Segments:
        """Where the row is cut; computing it checks ``cu_seqlens``."""
        return make_segments(self.q.shape[1], self.segmentation, self.segment_length, self.cu_seqlens)

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the matrices that a state is made of."""
        Dk, Dv = self.q.shape[3], self.v.shape[3]
        if self.W_up is None:
            return ((Dk, Dv),)
        return (Dk, self.W_up.shape[2]), (self.W_up.shape[2], Dv)

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The call with ``function`` of every tensor that has a row a token, [B, T, H, ...]."""
        tensors: dict[str, Any] = {name: getattr(self, name) for name in ("q", "k", "v", "u", *GATES)}
        mapped: dict[str, Any] = {name: function(x) for name, x in tensors.items() if x is not None}
        return replace(self, **mapped)

    @property
    def requires_grad(self) -> bool:
        """Whether autograd wants a gradient of any argument."""
        if not torch.is_grad_enabled():
            return False
        if self.q.requires_grad or self.k.requires_grad or self.v.requires_grad:
            return True
        others = (self.u, self.g, self.beta, self.lam, self.eta, self.mu, self.W_up, self.W_down)
        return any(x is not None and x.requires_grad for x in others)


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor | None,
    options: Options,
    *,
    gates: Mapping[str, Tensor | None],
    W_up: Tensor | None = None,
    W_down: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Call:
    """Check the arguments of ``memory_caching`` against each other; ``gates`` maps :data:`GATES`.

    Raises:
        ArgumentError: naming the argument, what it is, what it must be.
    """
    options = options.checked()
    _check_tensors(q, k, v, u)
    B, _, _, Dk = q.shape
    for name, gate in gates.items():
        if gate is not None:
            _check_gate(name, gate, options.recurrence, q)
    _check_deep(options.recurrence, W_up, W_down, options.memory_residual, q, v.shape[-1])
    scale = None if options.scale is None else _checked_scale(options.scale, q.dtype)
    check_packing(options.segmentation, cu_seqlens)
    if cu_seqlens is not None:
        check_bounds_type(cu_seqlens)
        # torch would take the whole call for one on meta, and hand out memory that nothing has written.
        if cu_seqlens.is_meta and not q.is_meta:
            raise ArgumentError(
                f"cu_seqlens is on meta, which holds no values, and q on {q.device}; pass it on the CPU"
            )
    if options.segmentation == "packed" and B != 1:
        raise ArgumentError(
            f"q has B={B} with segmentation='packed': the sequences stand in one row, so B is 1; put the batch into "
            "cu_seqlens"
        )
    # Spelled out: this is on the way of every call, and gathering names would cost microseconds.
    return Call(
        recurrence=options.recurrence,
        aggregation=options.aggregation,
        segmentation=options.segmentation,
        segment_length=options.segment_length,
        state_init=options.state_init,
        top_k=options.top_k,
        scale=Dk**-0.5 if scale is None else scale,
        memory_residual=options.memory_residual,
        inner_chunk=options.inner_chunk,
        q=q,
        k=k,
        v=v,
        u=u,
        g=gates["g"],
        beta=gates["beta"],
        lam=gates["lam"],
        eta=gates["eta"],
        mu=gates["mu"],
        W_up=W_up,
        W_down=W_down,
        cu_seqlens=cu_seqlens,
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, u: Tensor | None) -> None:
    _check_dense("q", q)
    _check_dense("k", k)
    _check_dense("v", v)
    if u is not None:
        _check_dense("u", u)
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


def _check_dense(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentError(f"{name} is {shown(x)}; it must be a torch.Tensor")
    if x.is_nested or x.layout is not torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise ArgumentError(f"{name} is a {kind} tensor; it must be dense and strided")


def _checked_scale(scale: Any, dtype: torch.dtype) -> float:
    if isinstance(scale, Tensor):
        raise ArgumentError(
            "scale is a tensor; it must be a number. To learn one, pass q * scale as q, q as u, and scale=1.0"
        )
    if not isinstance(scale, float | torch.SymFloat):
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise ArgumentError(f"scale={shown(scale)}: must be a number; leave it out for Dk ** -0.5")
        try:
            scale = float(scale)
        except OverflowError:
            scale = math.inf
    if not math.isfinite(scale):
        raise ArgumentError(f"scale={scale}: must be finite; leave it out for Dk ** -0.5")
    if dtype != torch.float64 and abs(scale) > torch.finfo(torch.float32).max:
        raise ArgumentError(f"scale={scale}: exceeds float32, in which {dtype} is computed")
    number: float = scale
    return number


def _check_device(name: str, x: Tensor | None, q: Tensor) -> None:
    if x is not None and x.device != q.device:
        raise ArgumentError(f"{name} is on {x.device} and q on {q.device}; move them to one device")


def _check_gate(name: str, gate: Tensor, recurrence: str, q: Tensor) -> None:
    _check_dense(name, gate)
    takes = RECURRENCES[recurrence].gates
    if name not in takes:
        users = ", ".join(repr(user) for user, row in RECURRENCES.items() if name in row.gates)
        has = f"takes only {', '.join(takes)}" if takes else "takes no gate"
        raise ArgumentError(f"{name} with recurrence={recurrence!r}, which {has}; {name} belongs to {users}")
    if gate.shape != q.shape[:3]:
        raise ArgumentError(f"{name} is {list(gate.shape)}; it must be [B, T, H] = {list(q.shape[:3])}")
    if gate.dtype not in DTYPES:
        raise ArgumentError(f"{name} is {gate.dtype}; it must be float32")
    _check_device(name, gate, q)
    if name == "g" and readable(gate) and bool((gate > 0).any()):
        raise ArgumentError(f"g reaches {float(gate.max()):g}; it is the logarithm of a decay, at most 0")


def _check_deep(
    recurrence: str, W_up: Tensor | None, W_down: Tensor | None, memory_residual: bool, q: Tensor, Dv: int
) -> None:
    H, Dk = q.shape[2:]
    for name, weight in (("W_up", W_up), ("W_down", W_down)):
        if weight is not None:
            _check_dense(name, weight)
    if not RECURRENCES[recurrence].deep:
        for name, weight in (("W_up", W_up), ("W_down", W_down)):
            if weight is not None:
                takers = any_of("deep", RECURRENCES)
                raise ArgumentError(f"{name} with recurrence={recurrence!r}, which has no layers; use {takers}")
        return
    if W_up is None or W_down is None:
        missing = "W_up" if W_up is None else "W_down"
        raise ArgumentError(f"recurrence={recurrence!r} needs {missing}: W_up is [H, Dk, E], W_down [H, E, Dv]")
    if W_up.dim() != 3 or W_up.shape[:2] != (H, Dk) or W_up.shape[2] == 0:
        raise ArgumentError(f"W_up is {list(W_up.shape)}; it must be [H, Dk, E] with H={H}, Dk={Dk} (usually E = 4 Dk)")
    if W_down.shape != (H, W_up.shape[2], Dv):
        raise ArgumentError(
            f"W_down is {list(W_down.shape)}; it must be [H, E, Dv] = {[H, W_up.shape[2], Dv]}, E of W_up, Dv of v"
        )
    for name, weight in (("W_up", W_up), ("W_down", W_down)):
        if weight.dtype not in DTYPES:
            raise ArgumentError(f"{name} is {weight.dtype}; it must be floating point of at least 16 bits")
        _check_device(name, weight, q)
    if memory_residual and Dk != Dv:
        raise ArgumentError(
            f"memory_residual=True with Dk={Dk}, Dv={Dv}: a memory can add its input only if Dk = Dv; pass "
            "memory_residual=False"
        )
