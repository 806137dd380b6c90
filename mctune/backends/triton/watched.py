"""The modules of a kernel with their host functions watched."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any

from mctune.backends.protocol import Watch


class Watched:
    """A module of an operation: its functions, what launches kernels, go through ``watch``; the rest is as it is."""

    def __init__(self, module: ModuleType, operation: str, watch: Watch) -> None:
        self._module, self._operation, self._watch = module, operation, watch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return self._watch(self._operation, found) if isinstance(found, FunctionType) else found


def watched(parts: Mapping[str, ModuleType], watch: Watch) -> dict[str, Any]:
    """The modules by operation, watched."""
    return {operation: Watched(module, operation, watch) for operation, module in parts.items()}
