"""Python processes of our own: they import what this one imports, whatever lies about in the working directory.

``python -c`` and ``python -m`` put the working directory first, before Python's own library, and Python 3.10 has no
option against it. So a child gets this process's path, without the working directory in front, and this very mctune.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_FIRST = """
import sys
sys.path[:] = sys.argv.pop(1).split(":")
import importlib.util
spec = importlib.util.spec_from_file_location("mctune", sys.argv.pop(1) + "/__init__.py")
sys.modules["mctune"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["mctune"])
"""
_FUNCTION = """
module, _, function = sys.argv.pop(1).partition(":")
getattr(importlib.import_module(module), function)()
"""
_MODULE = """
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def command(what: str, *arguments: str) -> list[str]:
    """The command of a child that calls ``module:function``, or runs ``module`` as ``python -m`` does."""
    code = _FIRST + (_FUNCTION if ":" in what else _MODULE)
    return [sys.executable, "-c", code, os.pathsep.join(search_path()), str(_PACKAGE), what, *arguments]


def search_path() -> list[str]:
    """This process's ``sys.path``, absolute; the working directory, if it is part of it, comes last."""
    paths = [path for path in sys.path if path]
    try:
        here = os.getcwd()
    except OSError:  # it is gone
        return [path for path in paths if os.path.isabs(path)]
    absolute = [os.path.abspath(path) for path in paths]
    last = [here] if "" in sys.path or here in absolute else []
    return [path for path in absolute if path != here] + last
