"""The ``mctune`` command: one module a command, found by its file name."""

from __future__ import annotations

from mctune.cli._main import main

__all__ = ["main"]
