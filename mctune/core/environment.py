"""What a measurement was made with: versions and hardware, without importing any of it."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

from mctune.core.target import Target

PACKAGES = (
    "mctune", "torch", "apache-tvm", "apache-tvm-ffi", "triton", "optuna", "numpy", "libcst", "click", "rich",
    "nvidia-cuda-nvrtc-cu12",
)  # fmt: skip
"""Distributions whose versions matter to a result, or to a command."""

TVM_PAIR = ("0.27.0.post1", "0.1.14.post1")
"""The apache-tvm and apache-tvm-ffi that go together; a later ffi crashes this compiler in ``tensorize``."""


def version(package: str) -> str | None:
    """The installed version of a distribution, or ``None``.

    Examples:
        >>> version("no-such-distribution") is None
        True
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Version of Python and of every distribution of :data:`PACKAGES` that is installed, by name."""
    found = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text}}


def today() -> str:
    """The day of a measurement, in UTC, as rows have it: ``2026-11-29``."""
    return datetime.now(timezone.utc).date().isoformat()


def environment(target: Target) -> dict[str, Any]:
    """A JSON-able account of where a row was measured; it names neither the user nor the machine.

    Args:
        target: what the row was measured on.

    Returns:
        ``target``, ``system``, ``machine`` and ``versions``; clocks in GHz, caches in MiB.
    """
    return {
        "target": {
            "name": target.name,
            "title": target.title,
            "kind": target.kind,
            "arch": target.arch,
            "cores": target.cores,
            "clock_ghz": target.clock_ghz,
            "cache_mb": target.cache_mb,
        },
        "system": platform.system(),
        "machine": platform.machine(),
        "versions": versions(),
    }
