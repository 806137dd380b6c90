"""The Triton that the templates are written for, checked before it is imported."""

from __future__ import annotations

import re

from mctune.core.environment import version
from mctune.core.errors import DeviceError

OLDEST, BEYOND = (3, 6), (3, 10)
_REMEDY = "pip install 'triton>=3.6,<3.10'"


def check_versions() -> None:
    """Refuse a missing or an unknown Triton, and a missing LibCST, which renders the templates.

    Raises:
        DeviceError: naming what is installed and what to install.
    """
    found = version("triton")
    if found is None:
        raise DeviceError(f"triton is not installed; {_REMEDY} (there are wheels for Linux)")
    if not OLDEST <= _numbers(found) < BEYOND:
        raise DeviceError(f"triton {found} is not one that mctune supports; {_REMEDY}")
    if version("libcst") is None:
        raise DeviceError("libcst is not installed; pip install 'libcst>=1.5'")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
