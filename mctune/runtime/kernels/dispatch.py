"""Which implementation serves a call: tuned kernels where they fit, else the eager path. Nothing is tuned here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

import torch

from ..call import Call
from ..errors import BackendError, KernelError
from ..manifest import CONTENTS, PACKAGE
from ..traits import AGGREGATIONS
from .at_hand import hardware_of
from .kept import OF_SEGMENTS, ROWS, Names, given, kept, segments_at_most, wanted
from .support import BACKENDS as _WITH_KERNELS
from .support import Support, support
from .table import Entry, Request, find, load_table, serving

TABLE = load_table(CONTENTS)
NAMESPACE = PACKAGE.replace(".", "__")
"""This copy's namespace in torch.ops: ``mctune``, or the name of the emitted package, which has its own table."""
BACKENDS = ("auto", "eager", *_WITH_KERNELS)
_TYPICAL = {"B": 1, "T": 4096, "H": 4, "segment_length": 256}
"""Stand for sizes that are not known while a graph is traced; a kernel serves any."""
_warned: set[tuple[str, ...]] = set()


@dataclass(frozen=True)
class Route:
    """How the operators run a call.

    Attributes:
        backend: ``tvm`` or ``triton`` (the nearest tuned kernels), ``auto`` (the same, and eager where one cannot be
            run) or ``eager``.
        keeps: names of the arrays that the forward keeps for the backward (:mod:`kept`).
        entry, backward: the kernels of the pass, and of the backward where a gradient is wanted. ``None`` leaves the
            choice to the operator, among those of ``backend``: sizes are not known while a graph is traced.
    """

    backend: str
    keeps: Names = ()
    entry: Entry | None = None
    backward: Entry | None = None

    @property
    def text(self) -> str:
        """As an argument of the operators: the backend, then the entries' places in the table."""
        places = [str(TABLE.numbers[entry]) for entry in (self.entry, self.backward) if entry is not None]
        return " ".join([self.backend, *places])


@dataclass(frozen=True)
class _Refusal:
    """Why no tuned kernel serves, and the kind of reason, to warn of once; ``None``: no tuning would change that."""

    reason: str
    kind: tuple[str, ...] | None = None


def _no_kernels(device: str) -> _Refusal:
    return _Refusal(
        f"there are no tuned kernels here. To tune some for this machine: `mctune search --gpu {_named(device)}`, then "
        "import memory_caching from the package that it leaves",
        ("untuned",),
    )


def _named(device: str) -> str:
    """What `mctune search --gpu` calls a torch device."""
    return "cpu" if device == "cpu" else "NAME"


def route(call: Call, backend: str) -> Route | None:
    """How the operators run the call; ``None`` leaves it to the eager path, in sight of autograd.

    While a graph is traced, or a transform of torch.func is active, it is always an operator: one opaque node, with a
    rule for batches.

    Raises:
        BackendError: if a backend was asked for by name and cannot serve the call: why, and what to do.
    """
    if torch.compiler.is_compiling():
        # The f-strings make constants of widths that are symbolic: a kernel is for one width.
        Dk, Dv = f"{call.q.shape[3]}", f"{call.v.shape[3]}"
        device, dtype, grad = call.q.device.type, str(call.q.dtype), call.requires_grad
        names = (call.recurrence, call.aggregation, call.segmentation, call.state_init)
        layers = None if call.W_up is None else (f"{call.W_up.shape[2]}", f"{call.inner_chunk}")
        chosen, keeps, reason = _choose_for_a_graph(backend, names, Dk, Dv, layers, dtype, device, grad)
        if chosen is None:
            raise _unserved(backend, reason)
        return Route(chosen, tuple(keeps.split()))
    transformed = torch._C._are_functorch_transforms_active()
    # What a transform of torch.func wraps does not tell whether a gradient is wanted.
    grad = call.requires_grad or (transformed and torch.is_grad_enabled())
    chosen = _choose(make_request(call, "forward"), backend, grad)
    if isinstance(chosen, Route):
        return replace(chosen, keeps=()) if transformed else chosen
    if backend != "auto":
        raise _unserved(backend, chosen.reason)
    if chosen.kind is not None:
        warn_once(chosen.kind, chosen.reason)
    return Route("eager") if transformed or call.q.is_meta else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose_for_a_graph(
    backend: str,
    names: tuple[str, str, str, str],
    Dk: str,
    Dv: str,
    layers: tuple[str, str] | None,
    dtype: str,
    device: str,
    grad: bool,
) -> tuple[str | None, str, str]:
    """The fields of the route, the backend ``None`` where the one asked for cannot serve, and why not.

    Which of the tuned kernels run depends on sizes that a graph leaves open: what all of them agree on is kept.
    ``layers``: E and the inner chunk of a deep memory.
    """
    recurrence, aggregation, segmentation, state_init = names
    request = Request(
        pass_="forward",
        recurrence=recurrence,
        aggregation=aggregation,
        segmentation=segmentation,
        state_init=state_init,
        Dk=int(Dk),
        Dv=int(Dv),
        top_k=2 if AGGREGATIONS[aggregation].sparse else None,
        E=None if layers is None else int(layers[0]),
        inner_chunk=None if layers is None else int(layers[1]),
        dtype=dtype.removeprefix("torch."),
        device=device,
        hardware=hardware_of(torch.device(device)) if TABLE.several else None,
        **(_TYPICAL | {"segment_length": None} if segmentation == "logarithmic" else _TYPICAL),
    )
    chosen = _choose(request, backend, grad)
    if isinstance(chosen, Route):
        backwards = serving(TABLE, replace(request, pass_="backward"), _named_backend(backend)) if grad else ()
        keeps = _keeps(request, serving(TABLE, request, _named_backend(backend)), backwards, None)
        return chosen.backend, " ".join(keeps), ""
    if backend == "auto" and chosen.kind is not None:
        warn_once(chosen.kind, chosen.reason)
    return ("eager" if backend == "auto" else None), "", chosen.reason


def _choose(request: Request, backend: str, grad: bool) -> Route | _Refusal:
    """The tuned kernels of a forward and, with ``grad``, of its backward; or what stands in the way."""
    possible = beyond_kernels(request)
    if possible.reason is not None:
        return _Refusal(possible.reason)
    if not TABLE.entries:
        return _no_kernels(request.device)
    entries: list[Entry] = []
    for one in (request, replace(request, pass_="backward")) if grad else (request,):
        entry = find(TABLE, one, _named_backend(backend))
        if entry is None:
            return _Refusal(_misfit(one), (one.pass_, one.recurrence, one.aggregation, one.state_init))
        try:
            launcher(entry)
        except KernelError as error:
            return _Refusal(str(error), ("unusable", str(entry.kernel)))
        entries.append(entry)
    N = segments_at_most(request.T, request.segmentation, request.segment_length or 1, None)
    return Route(backend, _keeps(request, entries[:1], entries[1:], N), *entries)


def _keeps(request: Request, forwards: Sequence[Entry], backwards: Sequence[Entry], N: int | None) -> Names:
    """What a forward of N segments, ``None`` where a graph is traced, keeps for its backward."""
    if request.segmentation == "logarithmic":
        return ()  # the number of segments does not follow from the lengths alone
    gives = [given(*_tuned(entry)) for entry in forwards]
    if request.segmentation == "packed" and N is None:
        gives.append(frozenset((*OF_SEGMENTS, *ROWS)))
    wants = [wanted(*_tuned(entry)) for entry in backwards]
    return kept(gives, wants, N, request.Dk, request.Dv, request.dtype)


def _tuned(entry: Entry) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    return entry.row.device, entry.problem, entry.record.get("config", {})


def _misfit(request: Request) -> str:
    problem = request.to_json()
    return (
        f"none of the {len(TABLE.entries)} tuned kernels fits {problem}. To tune one: "
        f"`mctune search --gpu {_named(request.device)} --problem '{problem}'`"
    )


def beyond_kernels(request: Request) -> Support:
    """Whether there can be a kernel for the call, tuned or not."""
    return support(request.recurrence, request.device, request.dtype)


def _named_backend(backend: str) -> str | None:
    return None if backend == "auto" else backend


def make_request(call: Call, pass_: str) -> Request:
    """The call as the table's key."""
    B, T, H, Dk = call.q.shape
    return Request(
        pass_=pass_,
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
        top_k=call.top_k if call.reads.sparse else None,
        E=None if call.W_up is None else call.W_up.shape[2],
        inner_chunk=call.inner_chunk if call.deep else None,
        dtype=str(call.q.dtype).removeprefix("torch."),
        device=call.q.device.type,
        hardware=hardware_of(call.q.device) if TABLE.several else None,
    )


@cache
def launcher(entry: Entry) -> Any:
    """What launches the entry's kernel: ``TvmForward`` and its like, by backend and pass.

    Raises:
        KernelError: if it cannot be run on this machine.
    """
    module = import_module(f".{entry.row.maker}.{entry.family}.{entry.pass_}", __package__)
    return module.LAUNCHER(entry.kernel, entry.record)


def kernel_for(call: Call, pass_: str, route: str) -> Any:
    """The launcher of the kernel that a route names (:attr:`Route.text`), or else of its backend's nearest one.

    Raises:
        KernelError: if there is none, or it cannot be run here.
    """
    backend, *places = route.split()
    for place in places:
        if TABLE.entries[int(place)].pass_ == pass_:
            return launcher(TABLE.entries[int(place)])
    request = make_request(call, pass_)
    possible, entry = beyond_kernels(request), find(TABLE, request, _named_backend(backend))
    if possible.reason is not None or entry is None:
        raise KernelError(possible.reason or _misfit(request))
    return launcher(entry)


def decode_kernel(call: Call, backend: str) -> Any | None:
    """What launches the nearest kernel of a step; ``None`` leaves the step to the eager path.

    Raises:
        BackendError: if a backend was asked for by name and cannot serve the call: why, and what to do.
    """
    if backend == "eager":
        return None
    request = make_request(call, "decode")
    chosen = _choose(request, backend, grad=False)
    if isinstance(chosen, Route):
        assert chosen.entry is not None
        return launcher(chosen.entry)
    if backend != "auto":
        raise _unserved(backend, chosen.reason)
    if chosen.kind is not None:
        warn_once(chosen.kind, chosen.reason)
    return None


def fall_back(error: KernelError, route: str) -> None:
    """An operator's kernel cannot be run: say so once and go on eagerly, unless the backend was asked for by name."""
    backend = route.split()[0]
    if backend != "auto":
        raise _unserved(backend, str(error)) from error
    warn_once(("unusable", str(error)), str(error))


def warn_once(kind: tuple[str, ...], reason: str) -> None:
    """Warn that the eager path runs, once a kind."""
    if kind not in _warned:
        _warned.add(kind)
        # The frames from here up: route, serve, memory_caching, its caller.
        warnings.warn(f"the eager path runs: {reason}", stacklevel=5)


def _unserved(backend: str, reason: str) -> BackendError:
    return BackendError(f'backend="{backend}" cannot serve this call: {reason}; backend="eager" can')
