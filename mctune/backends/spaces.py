"""Find the search space of a backend's pass."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType

from mctune.core.paths import search_spaces_dir
from mctune.core.space import SearchSpace

_PACKAGE = "mctune_spaces"


@cache
def load_space(maker: str, family: str, pass_: str, measured: bool = False) -> SearchSpace:
    """``SPACE`` of ``search_spaces/<maker>/<family>/<pass>.py``; ``measured``: its ``MEASURED``, if it has one.

    ``maker`` is a name of :func:`mctune.backends.registry.makers`; what it has after a dot is a folder within.
    """
    if _PACKAGE not in sys.modules:
        # Loaded as a package, so that its files can import each other.
        sys.modules[_PACKAGE] = ModuleType(_PACKAGE)
        sys.modules[_PACKAGE].__path__ = [str(search_spaces_dir())]
    module = importlib.import_module(f"{_PACKAGE}.{maker}.{family}.{pass_}")
    space: SearchSpace = getattr(module, "MEASURED", module.SPACE) if measured else module.SPACE
    return space
