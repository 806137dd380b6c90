"""The TVM that the templates are written for, checked before it is imported."""

from __future__ import annotations

from importlib import metadata

from mctune.core.environment import TVM_PAIR
from mctune.core.errors import DeviceError

TVM, FFI = TVM_PAIR
_REMEDY = f"pip install apache-tvm=={TVM} apache-tvm-ffi=={FFI}"


def check_versions() -> None:
    """Refuse a pair of apache-tvm and apache-tvm-ffi that is known to crash, or a missing one.

    apache-tvm does not pin its ffi (apache/tvm#20094, #20390), and 0.1.15 kills the process in ``tensorize``.

    Raises:
        DeviceError: naming what is installed and what to install.
    """
    found = {}
    for name in ("apache-tvm", "apache-tvm-ffi"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise DeviceError(f"{name} is not installed; {_REMEDY}") from error
    if not found["apache-tvm"].startswith("0.27.") or not found["apache-tvm-ffi"].startswith("0.1.14"):
        pair = " with ".join(f"{name} {version}" for name, version in found.items())
        raise DeviceError(f"{pair} is not a pair that mctune supports; {_REMEDY}")
