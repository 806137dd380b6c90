"""Winners become a package directory that imports without mctune."""

from mctune.emit.package import Winner, emit_package

__all__ = ["Winner", "emit_package"]
