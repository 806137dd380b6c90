"""Which backend compiles for which target, and what compiles, by name."""

from __future__ import annotations

import importlib

from mctune.backends.protocol import Backend
from mctune.core.errors import UsageError
from mctune.core.problem import RECURRENCES, Problem
from mctune.core.target import Target
from mctune.runtime.kernels.support import BACKENDS, Support, served

_MAKERS = {
    "tvm": "mctune.backends.tvm:TvmBackend",
    "tvm.gpu": "mctune.backends.tvm.gpu.backend:TvmGpuBackend",
    "triton": "mctune.backends.triton.backend:TritonBackend",
}
"""What compiles, by ``Served.maker``."""
_WITHOUT_MATRIX_UNITS = ("sm_70", "sm_75")
"""GPUs that Triton has given up: it no longer uses their matrix units, and a kernel takes it up to 109 s."""
_TITLES = {"tvm": "TVM", "triton": "Triton"}
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "hip": "cuda"}
"""The kinds of targets in torch's words."""


def device_of(target: Target) -> str:
    """torch's name of the target's device: ``cpu``, or ``cuda``, which is AMD's GPUs too."""
    return _DEVICES[target.kind]


def support(backend: str, target: Target) -> Support:
    """Whether a backend, ``tvm`` or ``triton``, compiles for a target."""
    title = _TITLES.get(backend, backend)
    if not served(device_of(target), backend=backend):
        devices = " and ".join(dict.fromkeys(row.device for row in served(backend=backend)))
        return Support.no(f"{target.name} is a {target.kind} device, and {title}'s templates are for {devices}")
    if backend == "triton" and target.arch in _WITHOUT_MATRIX_UNITS:
        return Support.no(
            f"{target.title} ({target.arch}) is not served by Triton: 3.6 and later use no matrix units there and take "
            "up to 109 s a kernel; take --backend tvm"
        )
    if backend == "tvm" and target.kind == "hip":
        return Support.no(f"{target.name} is AMD's, and TVM's templates are for NVIDIA's GPUs; take --backend triton")
    return Support()


def makers(target: Target, backend: str = "auto") -> tuple[str, ...]:
    """What compiles for a target, the preferred first: of one backend, or of all that serve it.

    Raises:
        UsageError: if nothing does, or for an unknown backend.
    """
    if backend not in ("auto", *BACKENDS):
        raise UsageError(f"backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    wanted = BACKENDS if backend == "auto" else (backend,)
    answers = {name: support(name, target) for name in wanted}
    rows = served(device_of(target))
    found = tuple(dict.fromkeys(row.maker for row in rows if answers.get(row.backend, Support.no(""))))
    if found:
        return found
    reasons = [str(answers[row.backend].reason) for row in rows if row.backend in answers]
    reasons += [str(answer.reason) for answer in answers.values()]
    raise UsageError((reasons or [f"{target.name} is a {target.kind} device, which no backend serves"])[0])


def maker_of(target: Target, problem: Problem, backend: str) -> str | None:
    """What compiles a problem for a target under the name of a backend: a name for :func:`get_backend`, if anything."""
    rows = served(device_of(target), problem.writes.family, backend)
    return rows[0].maker if rows else None


def backend_for(target: Target) -> str:
    """What compiles for a target first of all: a name for :func:`get_backend`.

    Raises:
        UsageError: if nothing does.
    """
    return makers(target)[0]


def computes(backend: str, problem: Problem, device: str | None = None) -> Support:
    """Whether a backend has templates for the memories and the pass of a problem, on a kind of device."""
    rows = served(device=device, family=problem.writes.family, backend=backend)
    title = _TITLES.get(backend, backend)
    if not rows:
        families = {row.family for row in served(device=device, backend=backend)}
        have = ", ".join(name for name, row in RECURRENCES.items() if row.family in families)
        return Support.no(f"recurrence={problem.recurrence!r} has no {title} template; there are {have}")
    if not any(problem.pass_ in row.passes for row in rows):
        have = ", ".join(dict.fromkeys(pass_ for row in rows for pass_ in row.passes))
        return Support.no(f"pass={problem.pass_!r} has no {title} template; there are {have}")
    return Support()


def get_backend(name: str) -> Backend:
    """What compiles under a name of :func:`makers`; ``module:attribute`` names one that lives elsewhere.

    Raises:
        UsageError: for an unknown name.
    """
    module, colon, attribute = _MAKERS.get(name, name).partition(":")
    if not colon:
        raise UsageError(f"unknown backend {name!r}; there are {', '.join(_MAKERS)}, or give module:attribute")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend


def refuse(answer: Support) -> None:
    """Raise what an answer refuses.

    Raises:
        UsageError: with its reason.
    """
    if answer.reason is not None:
        raise UsageError(answer.reason)
