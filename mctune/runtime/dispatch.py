"""Which implementation serves a call: a tuned kernel where one fits, else the eager path. Nothing is tuned here."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch

from .arguments import Call
from .errors import BackendError
from .table import Entry, Request, Table, find, load_table
from .tvm_forward import TvmForward
from .tvm_loader import KernelError

ROOT = Path(__file__).resolve().parent.parent
"""An emitted package keeps tuned.json, manifest.json and the kernels beside the runtime's folder."""
TABLE = load_table(ROOT)
BACKENDS = ("auto", "eager", "tvm", "triton")
_NO_KERNELS = (
    "there are no tuned kernels here. To tune some for this machine: `mctune search --gpu cpu`, then import "
    "memory_caching from the package that it leaves",
    ("untuned",),
)
_warned: set[tuple[str, ...]] = set()


def serve(call: Call, backend: str) -> torch.Tensor | None:
    """y [B, T, H, Dv] from a tuned kernel; ``None`` where ``backend="auto"`` leaves the call to the eager path.

    Raises:
        BackendError: if a backend was asked for by name and cannot serve the call: why, and what to do.
    """
    reason, kind = beyond_kernels(call), None
    if reason is None:
        found = _serve(call, backend, TABLE) if TABLE.entries else _NO_KERNELS
        if isinstance(found, torch.Tensor):
            return found
        reason, kind = found
    if backend != "auto":
        raise BackendError(f'backend="{backend}" cannot serve this call: {reason}; backend="eager" can')
    if kind is not None:
        _warn_once(kind, reason)
    return None


def beyond_kernels(call: Call) -> str | None:
    """Why no kernel can serve the call, tuned or not; ``None`` if one could."""
    if call.deep:
        return f"recurrence={call.recurrence!r} has no kernels yet, only linear and swla have"
    if call.requires_grad:
        return "an argument requires a gradient and kernels have no backward yet (torch.no_grad() lifts that)"
    if call.q.device.type != "cpu":
        return f"the tensors are on {call.q.device} and the kernels run on the CPU"
    if call.q.dtype == torch.float64:
        return "the tensors are float64 and kernels compute in float32"
    return None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _serve(call: Call, backend: str, table: Table) -> torch.Tensor | tuple[str, tuple[str, ...]]:
    """y, or why there is none and the kind of problem to warn of once."""
    request = make_request(call)
    entry = find(table, request, None if backend == "auto" else backend)
    if entry is None:
        problem = request.to_json()
        reason = (
            f"none of the {len(table.entries)} tuned kernels fits {problem}. To tune one: "
            f"`mctune search --gpu cpu --problem '{problem}'`"
        )
        return reason, (request.recurrence, request.aggregation, request.segmentation, request.state_init)
    try:
        return run_kernel(call, entry)
    except KernelError as error:
        return str(error), ("unusable", str(entry.kernel))


def make_request(call: Call) -> Request:
    """The call as the table's key."""
    B, T, H, Dk = call.q.shape
    return Request(
        recurrence=call.recurrence,
        aggregation=call.aggregation,
        segmentation=call.segmentation,
        state_init=call.state_init,
        B=B,
        T=T,
        H=H,
        Dk=Dk,
        Dv=call.v.shape[-1],
        segment_length=None if call.segmentation == "logarithmic" else call.segment_length,
        top_k=call.top_k if call.aggregation == "ssc" else None,
        dtype=str(call.q.dtype).removeprefix("torch."),
    )


def run_kernel(call: Call, entry: Entry) -> torch.Tensor:
    """The entry's kernel on a call that it serves; other dtypes are converted to float32 and back."""
    g, beta, lam = (None if gate is None else _float32(gate) for gate in (call.g, call.beta, call.lam))
    q = _float32(call.q)
    y = _kernel(entry)(
        q,
        _float32(call.k),
        _float32(call.v),
        q if call.u is None else _float32(call.u),
        g=g,
        beta=beta,
        lam=lam,
        scale=call.scale,
        top_k=call.top_k,
        segments=call.segments,
    ).y
    return y.to(call.q.dtype)


@cache
def _kernel(entry: Entry) -> TvmForward:
    return TvmForward(entry.kernel, entry.record)


def _float32(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.float32).contiguous()


def _warn_once(kind: tuple[str, ...], reason: str) -> None:
    if kind not in _warned and not torch.compiler.is_compiling():
        _warned.add(kind)
        # From here up: serve, memory_caching, its caller.
        warnings.warn(f"the eager path runs: {reason}", stacklevel=4)
