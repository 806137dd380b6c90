"""The CPU that this runs on, as the operating system describes it: flags, cores, cache, a safe LLVM name."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from mctune.core.errors import UsageError

CPU_ARCH = "MCTUNE_CPU_ARCH"
"""The environment variable that names a lower level than the CPU's own to tune for."""

# The levels of the x86-64 psABI, as the flags of /proc/cpuinfo, highest first. LLVM knows each by this name. The CPU's
# LLVM name is not safe: a hypervisor may mask AVX-512 on a CPU whose name implies it (illegal instruction).
_V2 = frozenset({"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"})
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_LEVELS = (("x86-64-v4", _V4, 16), ("x86-64-v3", _V3, 8), ("x86-64-v2", _V2, 4))


@dataclass(frozen=True)
class Host:
    """The CPU as the operating system describes it.

    Attributes:
        model: its name.
        arch: an LLVM ``mcpu``: the highest level that the CPU supports, or the one that ``MCTUNE_CPU_ARCH`` asks for.
        vector_floats: float32 lanes of the widest registers of that level.
        cores: logical CPUs that this process may run on.
        clock_ghz: clock in GHz; ``None`` where the system does not say.
        cache_mb: last-level cache in MiB; ``None`` where the system does not say.
    """

    model: str
    arch: str
    vector_floats: int
    cores: int
    clock_ghz: float | None
    cache_mb: float | None


_CPUINFO = Path("/proc/cpuinfo")


def read_host(cpuinfo: Path = _CPUINFO, caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> Host:
    """Read the host; every file may be absent (macOS), which leaves the baseline architecture and ``None``.

    Raises:
        UsageError: if ``MCTUNE_CPU_ARCH`` names a level that this CPU does not support.
    """
    fields = _cpuinfo(cpuinfo)
    arch, vector_floats = _chosen(archs(cpuinfo))
    mhz = fields.get("cpu MHz")
    return Host(
        model=fields.get("model name") or platform.processor() or platform.machine() or "unknown",
        arch=arch,
        vector_floats=vector_floats,
        cores=usable_cores(),
        clock_ghz=round(float(mhz) / 1e3, 3) if mhz else None,
        cache_mb=_last_level_mb(caches),
    )


def archs(cpuinfo: Path = _CPUINFO) -> tuple[tuple[str, int], ...]:
    """The levels that this CPU supports, the highest first: LLVM ``mcpu`` and float32 lanes."""
    return llvm_archs(platform.machine(), frozenset(_cpuinfo(cpuinfo).get("flags", "").split()))


def llvm_archs(machine: str, flags: frozenset[str]) -> tuple[tuple[str, int], ...]:
    """Every LLVM ``mcpu`` all of whose features are in ``flags``, with its float32 lanes, the highest first.

    Args:
        machine: as ``platform.machine()`` says it.
        flags: as /proc/cpuinfo names them.

    Examples:
        >>> llvm_archs("aarch64", frozenset())
        (('generic', 4),)
    """
    if machine.lower() not in ("x86_64", "amd64"):
        return (("generic", 4),)
    return (*((name, lanes) for name, needed, lanes in _LEVELS if needed <= flags), ("x86-64", 4))


def _chosen(possible: tuple[tuple[str, int], ...]) -> tuple[str, int]:
    """The level that the environment asks for, else the highest."""
    wanted = os.environ.get(CPU_ARCH)
    for arch, lanes in possible:
        if not wanted or arch == wanted:
            return arch, lanes
    raise UsageError(f"{CPU_ARCH}={wanted}: this CPU can be {', '.join(arch for arch, _ in possible)}")


def needed_flags(arch: str) -> tuple[str, ...]:
    """The flags of /proc/cpuinfo that code compiled for ``arch`` (one of the x86-64 levels) relies on."""
    return next((tuple(sorted(needed)) for name, needed, _ in _LEVELS if name == arch), ())


def usable_cores() -> int:
    """Logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo(path: Path) -> dict[str, str]:
    """The first processor's fields."""
    fields: dict[str, str] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return fields
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            break
        fields[name.strip()] = value.strip()
    return fields


def _last_level_mb(caches: Path) -> float | None:
    """Size of the cache of the highest level, in MiB."""
    found: dict[int, float] = {}
    for index in sorted(caches.glob("index*")):
        try:
            level, size = int((index / "level").read_text()), (index / "size").read_text().strip()
            found[level] = int(size.removesuffix("K")) / 1024
        except (OSError, ValueError):
            continue
    return found[max(found)] if found else None
