"""Single arguments held to their types, in one line that names the argument; nothing is converted in silence."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .errors import ArgumentError

LARGEST = 2**31 - 1
"""Sizes and counts are 32-bit integers where kernels read them."""


def shown(value: Any) -> str:
    """A value as a message shows it: short, on one line, and whatever its own repr does."""
    if value is None or isinstance(value, bool | int | float | str):
        try:
            text = repr(value)
        except ValueError:  # an integer of more digits than Python prints
            return f"{type(value).__name__} of {value.bit_length()} bits"  # type: ignore[union-attr]
        return text if len(text) <= 60 else f"{text[:57]}..."
    return type(value).__name__


def known(name: str, value: Any, allowed: Collection[str]) -> None:
    """Refuse what is not one of the names in ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise ArgumentError(f"{name}={shown(value)} is not one of {', '.join(allowed)}")


def positive(name: str, size: Any) -> None:
    """Refuse what is no integer from 1 to :data:`LARGEST`."""
    whole(name, size, 1)


def whole(name: str, size: Any, least: int, remedy: str = "") -> None:
    """Refuse what is no integer from ``least`` to :data:`LARGEST`."""
    if not isinstance(size, int) or isinstance(size, bool) or size < least:
        raise ArgumentError(f"{name}={shown(size)}: must be an integer of at least {least}{remedy}")
    if size > LARGEST:
        raise ArgumentError(f"{name}={shown(size)}: must be at most {LARGEST}{remedy}")


def flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name}={shown(value)}: must be True or False")
