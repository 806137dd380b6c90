"""flashinfer-bench's own data models and builders, without what its top module imports (agents, GPUs)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest


def module(name: str) -> Any:
    """A module of it, ``data`` for example; the test is skipped where it is not installed."""
    spec = importlib.util.find_spec("flashinfer_bench")
    if spec is None:
        pytest.skip("flashinfer-bench is not installed")
    if "flashinfer_bench" not in sys.modules:
        top = ModuleType("flashinfer_bench")
        top.__path__ = list(spec.submodule_search_locations or ())
        top.__spec__ = spec
        sys.modules["flashinfer_bench"] = top
    return importlib.import_module(f"flashinfer_bench.{name}")
