"""What nvidia-smi tells of a GPU's state."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mctune.measure import clocks
from mctune.measure.clocks import Clocks, clock_and_heat, read_clocks


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    clocks._read.cache_clear()
    return tmp_path / "nvidia-smi"


def tells(tool: Path, *lines: str) -> None:
    tool.write_text("\n".join(("#!/bin/sh", f"echo asked >> {tool.parent}/log", *lines)) + "\n")
    tool.chmod(0o755)


def test_one_field_that_is_missing_is_not_all(tool: Path) -> None:
    tells(tool, "echo '1980, 2619, [N/A], 121.52'")
    assert read_clocks() == Clocks(1980.0, 2619.0, None, 121.52)
    assert clock_and_heat("cuda") == (1980.0, None) and clock_and_heat("cpu") == (None, None)


def test_it_is_not_asked_all_the_time(tool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tells(tool, "echo '1980, 2619, 35, 121.52'")
    now = 1000.0
    monkeypatch.setattr(clocks.time, "monotonic", lambda: now)
    for _ in range(5):
        assert clock_and_heat("cuda") == (1980.0, 35.0)
    assert (tool.parent / "log").read_text().splitlines() == ["asked"]
    now += clocks._FRESH_S
    read_clocks()
    assert (tool.parent / "log").read_text().splitlines() == ["asked"] * 2


@pytest.mark.parametrize("line", ["exit 9", "echo 'no devices were found'", "echo '1, 2'"])
def test_where_it_fails_nothing_is_known(tool: Path, line: str) -> None:
    tells(tool, line)
    assert read_clocks() is None
