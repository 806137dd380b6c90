"""Backends: render a template with a configuration, build it for a target, load it."""

from __future__ import annotations

import importlib

from mctune.backends.protocol import Backend
from mctune.core.errors import UsageError
from mctune.core.target import Target

_BACKENDS = {"tvm": "mctune.backends.tvm:TvmBackend", "triton": "mctune.backends.triton.backend:TritonBackend"}
_WITHOUT_MATRIX_UNITS = ("sm_70", "sm_75")
"""GPUs that Triton has given up: it no longer uses their matrix units, and a kernel takes it up to 109 s."""


def backend_for(target: Target) -> str:
    """The name of the backend that compiles for a target.

    Raises:
        UsageError: if none does.
    """
    if target.arch in _WITHOUT_MATRIX_UNITS:
        raise UsageError(
            f"{target.title} ({target.arch}) has no backend: Triton 3.6 and later use no matrix units there and take "
            "up to 109 s a kernel, and TVM's templates are for CPUs; take a GPU of sm_80 or later"
        )
    return "tvm" if target.on_cpu else "triton"


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
