"""Triton chooses its interpreter when it is imported: `make test` runs these tests in a process of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """benchmarks/gpu.py, and what it imports in ``sys.modules``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
        import gpu

        yield gpu
        for name in [name for name in sys.modules if name == "gpu" or name.startswith("gpu_")]:
            del sys.modules[name]
