"""Winners become a package directory that imports without mctune."""

from mctune.emit.package import emit_package

__all__ = ["emit_package"]
