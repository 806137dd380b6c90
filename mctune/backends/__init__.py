"""Backends: render a template with a configuration, build it for a target, load it."""

from __future__ import annotations

import importlib

from mctune.backends.protocol import Backend
from mctune.core.errors import UsageError
from mctune.core.target import Target

_BACKENDS = {"tvm": "mctune.backends.tvm:TvmBackend", "triton": "mctune.backends.triton:TritonBackend"}


def backend_for(target: Target) -> str:
    """The name of the backend that compiles for a target."""
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
