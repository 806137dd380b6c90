"""The problem that the emitted kernels are for, and ways to run an emitted package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mctune.core.problem import Problem

GRM = Problem(T=150, H=2, Dk=16, Dv=16, segment_length=32)


def forget(name: str) -> None:
    """Make Python import the package afresh."""
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def run_bare(python: Path, code: str, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run ``code`` with the bare interpreter in ``folder``: no compiler, no cache, no path of ours."""
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "LC_ALL", "LD_LIBRARY_PATH")}
    return subprocess.run(
        [python, "-c", code, *arguments],
        cwd=folder,
        env=kept | {"PATH": "/nowhere", "HOME": "/nowhere", "XDG_CACHE_HOME": "/nowhere"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
