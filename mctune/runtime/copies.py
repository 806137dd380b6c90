"""Objects of another copy of this runtime: mctune and emitted packages each bring one, all loaded side by side."""

from __future__ import annotations

from typing import Any, TypeVar

from .errors import ArgumentError
from .manifest import PACKAGE

_Kind = TypeVar("_Kind")


def package_of(kind: type, value: Any) -> str | None:
    """The package whose copy of ``kind`` the value is an instance of: ``mctune``, an emitted one; ``None``: of none."""
    if isinstance(value, kind):
        return PACKAGE
    for base in type(value).__mro__:
        package, runtime, _ = base.__module__.partition(".runtime.")
        if runtime and base.__qualname__ == kind.__qualname__:
            return package
    return None


def own(name: str, value: Any, kind: type[_Kind], remedy: str = "") -> _Kind:
    """The value, if it is an instance of this copy's ``kind``; ``remedy`` says what to pass instead.

    Raises:
        ArgumentError: naming the argument and, for one of another copy, both packages: their kernels and their layouts
            may differ.
    """
    if isinstance(value, kind):
        return value
    other = package_of(kind, value)
    if other is None:
        raise ArgumentError(f"{name} is a {type(value).__name__}; it must be a {kind.__name__}{remedy}")
    raise ArgumentError(
        f"{name} is a {kind.__name__} of {other}, and this is {PACKAGE}: take both from one of the two packages, "
        f"`from {PACKAGE} import {kind.__name__}`"
    )
