"""The CPUs that this one can be: what depends on the instruction set is tested on each, or on each by turns."""

from __future__ import annotations

import os
from dataclasses import replace

from mctune.core.host import CPU_ARCH, archs
from mctune.core.target import Target, resolve


def cpus() -> tuple[Target, ...]:
    """This CPU, and those with AVX-512 or AVX2 that it can be too; where ``MCTUNE_CPU_ARCH`` names one, that one."""
    here, _ = resolve("cpu")
    others = [] if os.environ.get(CPU_ARCH) else [one for one in archs() if one[0] in ("x86-64-v4", "x86-64-v3")]
    lesser = (replace(here, arch=arch, vector_floats=lanes) for arch, lanes in others if arch != here.arch)
    return here, *lesser
