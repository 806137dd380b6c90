"""Tuned kernels, compiled once, for the tests that run the operators on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tables import build_table

from mctune.runtime.kernels import dispatch
from mctune.runtime.kernels.table import Table


@pytest.fixture(scope="session")
def table(kernel_folder: Path) -> Table:
    return build_table(kernel_folder)


@pytest.fixture
def tuned_table(table: Table, monkeypatch: pytest.MonkeyPatch) -> Table:
    """``memory_caching`` finds the kernels of :func:`build_table`."""
    monkeypatch.setattr(dispatch, "TABLE", table)
    monkeypatch.setattr(dispatch, "_warned", set())
    return table
