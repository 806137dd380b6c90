"""TOML, on every Python that mctune supports."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

# The standard library has it from 3.11 on; tomli is the same code for 3.10.
_PARSER = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def read_toml(path: Path) -> dict[str, Any]:
    """The document in ``path`` (UTF-8).

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not TOML.
    """
    values: dict[str, Any] = _PARSER.loads(path.read_text(encoding="utf-8"))
    return values
