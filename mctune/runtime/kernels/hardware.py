"""Which device a kernel was tuned on: what decides between the tables of several targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Hardware(NamedTuple):
    """A device by what its driver tells of it: an architecture (``sm_90``, ``gfx942``; a CPU's model name instead), and
    the number of multiprocessors or compute units, 0 on a CPU."""

    arch: str
    cores: int = 0

    @classmethod
    def of(cls, target: Mapping[str, Any]) -> Hardware:
        """The one that a tuned table names."""
        if target.get("kind") == "cpu":
            return cls(str(target.get("title")))
        cores = target.get("cores")
        return cls(str(target.get("arch")), cores if isinstance(cores, int) else 0)


def foreign(tuned: Hardware, here: Hardware) -> float:
    """How far the device that a kernel was tuned on is from another one: 0 the same, from 100 on another architecture.

    Examples:
        >>> h100, pcie, l4 = Hardware("sm_90", 132), Hardware("sm_90", 114), Hardware("sm_89", 58)
        >>> foreign(h100, h100) < foreign(h100, pcie) < foreign(h100, l4)
        True
    """
    sizes = abs(math.log(tuned.cores) - math.log(here.cores)) if tuned.cores > 0 < here.cores else 0.0
    return sizes if tuned.arch == here.arch else 100.0 + sizes
