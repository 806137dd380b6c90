"""Winners become a package directory that imports without mctune, or a repository of such packages."""

from mctune.emit.hub import check_repository, emit_repository, place_of
from mctune.emit.merge import merge, package_before
from mctune.emit.package import emit_package
from mctune.emit.place import check_out
from mctune.emit.sign import Signer

__all__ = [
    "Signer",
    "check_out",
    "check_repository",
    "emit_package",
    "emit_repository",
    "merge",
    "package_before",
    "place_of",
]
