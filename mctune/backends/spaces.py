"""Find the search space of a backend's pass."""

from __future__ import annotations

import importlib.util
from functools import cache

from mctune.core.paths import search_spaces_dir
from mctune.core.space import SearchSpace


@cache
def load_space(backend: str, pass_: str, measured: bool = False) -> SearchSpace:
    """``SPACE`` of ``search_spaces/<backend>/<pass>.py``; of measured candidates ``MEASURED``, where it has one."""
    path = search_spaces_dir() / backend / f"{pass_}.py"
    spec = importlib.util.spec_from_file_location(f"mctune_space_{backend}_{pass_}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    space: SearchSpace = getattr(module, "MEASURED", module.SPACE) if measured else module.SPACE
    return space
