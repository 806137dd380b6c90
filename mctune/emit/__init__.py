"""Winners become a package directory that imports without mctune."""

from mctune.emit.merge import merge, package_before
from mctune.emit.package import emit_package
from mctune.emit.place import check_out
from mctune.emit.sign import Signer

__all__ = ["Signer", "check_out", "emit_package", "merge", "package_before"]
