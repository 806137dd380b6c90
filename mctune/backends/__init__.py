"""Backends: render a template with a configuration, build it for a target, load it."""

from __future__ import annotations

import importlib

from mctune.backends.protocol import Backend
from mctune.core.errors import UsageError


def get_backend(name: str) -> Backend:
    """The backend of that name; ``module:attribute`` names one that lives elsewhere.

    Raises:
        UsageError: for an unknown name.
    """
    module, colon, attribute = ("mctune.backends.tvm:TvmBackend" if name == "tvm" else name).partition(":")
    if not colon:
        raise UsageError(f"unknown backend {name!r}; there is tvm, or give module:attribute")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend
