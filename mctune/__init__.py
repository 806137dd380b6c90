"""mctune: Memory Caching kernels (arXiv:2602.24281), searched for the machine they run on.

Its names are loaded on first use, so ``import mctune`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mctune.core.problem import Problem
    from mctune.runtime.api.attach import attach_memory_caching
    from mctune.runtime.api.functional import memory_caching
    from mctune.runtime.api.module import MemoryCaching
    from mctune.runtime.cache import MemoryCache

__all__ = ["MemoryCache", "MemoryCaching", "Problem", "__version__", "attach_memory_caching", "memory_caching"]
__version__ = "0.1.0"

_HOME = {
    "attach_memory_caching": "mctune.runtime.api.attach",
    "memory_caching": "mctune.runtime.api.functional",
    "MemoryCache": "mctune.runtime.cache",
    "MemoryCaching": "mctune.runtime.api.module",
    "Problem": "mctune.core.problem",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mctune' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
