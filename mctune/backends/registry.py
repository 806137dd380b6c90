"""Which backend compiles for which target, and the backends by name."""

from __future__ import annotations

import importlib

from mctune.backends.protocol import Backend
from mctune.core.errors import UsageError
from mctune.core.problem import RECURRENCES, Problem
from mctune.core.target import Target
from mctune.runtime.kernels.support import SERVED, Support, served

_BACKENDS = {"tvm": "mctune.backends.tvm:TvmBackend", "triton": "mctune.backends.triton.backend:TritonBackend"}
_WITHOUT_MATRIX_UNITS = ("sm_70", "sm_75")
"""GPUs that Triton has given up: it no longer uses their matrix units, and a kernel takes it up to 109 s."""
_TITLES = {"tvm": "TVM", "triton": "Triton"}
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "hip": "cuda"}
"""The kinds of targets in torch's words."""


def device_of(target: Target) -> str:
    """torch's name of the target's device: ``cpu``, or ``cuda``, which is AMD's GPUs too."""
    return _DEVICES[target.kind]


def support(backend: str, target: Target) -> Support:
    """Whether a backend compiles for a target."""
    if backend == "triton" and target.arch in _WITHOUT_MATRIX_UNITS:
        return Support.no(
            f"{target.title} ({target.arch}) has no backend: Triton 3.6 and later use no matrix units there and take "
            "up to 109 s a kernel, and TVM's templates are for CPUs; take a GPU of sm_80 or later"
        )
    if not served(device_of(target), backend=backend):
        title, devices = _TITLES.get(backend, backend), " and ".join(row.device for row in served(backend=backend))
        return Support.no(f"{target.name} is a {target.kind} device, and {title}'s templates are for {devices}")
    return Support()


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


def backend_for(target: Target) -> str:
    """The name of the backend that compiles for a target: the first that serves it.

    Raises:
        UsageError: if none does.
    """
    answers = {row.backend: support(row.backend, target) for row in SERVED}
    for name, answer in answers.items():
        if answer:
            return name
    reasons = [str(answer.reason) for name, answer in answers.items() if served(device_of(target), backend=name)]
    raise UsageError((reasons or [f"{target.name} is a {target.kind} device, which no backend serves"])[0])


def get_backend(name: str) -> Backend:
    """The backend of that name; ``module:attribute`` names one that lives elsewhere.

    Raises:
        UsageError: for an unknown name.
    """
    module, colon, attribute = _BACKENDS.get(name, name).partition(":")
    if not colon:
        raise UsageError(f"unknown backend {name!r}; there are {', '.join(_BACKENDS)}, or give module:attribute")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend


def refuse(answer: Support) -> None:
    """Raise what an answer refuses.

    Raises:
        UsageError: with its reason.
    """
    if answer.reason is not None:
        raise UsageError(answer.reason)
