"""Templates and search spaces are found in a checkout and in a wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from mctune.core import paths
from mctune.core.errors import DeviceError


def test_in_this_installation() -> None:
    assert (paths.search_spaces_dir() / "targets" / "cpu.toml").is_file()
    assert (paths.templates_dir() / "tvm").is_dir()


def test_a_wheel_holds_them_inside_a_checkout_beside(tmp_path: Path) -> None:
    package = tmp_path / "mctune"
    with pytest.raises(DeviceError, match="install mctune again"):
        paths._data_dir("templates", package)
    (tmp_path / "templates").mkdir()
    assert paths._data_dir("templates", package) == tmp_path / "templates"
    (package / "_data" / "templates").mkdir(parents=True)
    assert paths._data_dir("templates", package) == package / "_data" / "templates"
