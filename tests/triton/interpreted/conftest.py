"""Triton chooses its interpreter when it is imported: `make test` runs these tests in a process of their own."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest

from mctune.backends.triton.interpreter import quicken

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
quicken()


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """What `mctune bench` runs on a GPU."""
    return importlib.import_module("mctune.measure.gpu.run")
