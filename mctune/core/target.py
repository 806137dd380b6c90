"""The machines that kernels are tuned for: a registry of TOML rows, and the CPU that this runs on."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mctune.core.errors import UsageError
from mctune.core.host import Host, read_host
from mctune.core.paths import search_spaces_dir
from mctune.core.toml import read_toml

KINDS = ("cpu", "cuda", "hip")
FIGURES = (
    "cores",
    "clock_ghz",
    "matrix_tflops",
    "dram_gbs",
    "cache_mb",
    "cache_tbs",
    "shared_bytes",
    "shared_kb_per_core",
    "threads_per_core",
)
"""The numeric fields of a target, in the order in which tables show them."""


@dataclass(frozen=True)
class Target:
    """A CPU or GPU. Rates are peaks; an unknown figure is ``None``.

    Args:
        name, title: the registry's name, and the product's.
        kind: ``cpu``, ``cuda`` or ``hip``.
        arch: LLVM ``mcpu`` (cpu), ``sm_NN`` (cuda) or ``gfxNNN`` (hip).
        cores: logical CPUs, streaming multiprocessors or compute units.
        clock_ghz: boost clock.
        matrix_tflops, matrix_dtype: dense matrix rate in TFLOP/s, and for which input type.
        dram_gbs: memory bandwidth in GB/s.
        cache_mb, cache_tbs: size of the last-level cache in MiB, and its bandwidth in TB/s.
        shared_bytes: shared memory that one block may have; 0 on a CPU.
        shared_kb_per_core: shared memory of one multiprocessor in KiB; 0 on a CPU.
        threads_per_core: resident threads a multiprocessor; 1 on a CPU.
        vector_floats: float32 lanes of a CPU's widest registers; 0 on a GPU.
        aliases: other names that :func:`resolve` accepts.
        unsure: names of the fields without a trusted source.
        sources: (field, where its figure comes from) for every figure.

    Raises:
        UsageError: for an unknown kind.
    """

    name: str
    title: str
    kind: str
    arch: str
    cores: int
    clock_ghz: float | None = None
    matrix_tflops: float | None = None
    matrix_dtype: str = "bfloat16"
    dram_gbs: float | None = None
    cache_mb: float | None = None
    cache_tbs: float | None = None
    shared_bytes: int = 0
    shared_kb_per_core: int = 0
    threads_per_core: int = 1
    vector_floats: int = 0
    aliases: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"target {self.name!r}: kind={self.kind!r} is not one of {', '.join(KINDS)}")

    @property
    def on_cpu(self) -> bool:
        """Whether this is a CPU."""
        return self.kind == "cpu"

    @property
    def products_in_flight(self) -> bool:
        """Whether matrix products read shared memory while a program goes on (``wgmma`` and ``tcgen05`` of CUDA)."""
        return self.arch in ("sm_90", "sm_100")


def resolve(name: str) -> tuple[Target, str]:
    """The target called ``name``, in any case, and a note to print where the name was an alias, else ``""``.

    Raises:
        UsageError: for an unknown name, with the closest known ones.

    Examples:
        >>> target, _ = resolve("h100-sxm")
        >>> target.kind, target.arch
        ('cuda', 'sm_90')
    """
    wanted = name.strip().lower().replace("_", "-")
    known = targets()
    for target in known:
        if wanted == target.name:
            return target, ""
    for target in known:
        if wanted in target.aliases:
            return target, f"{name} means {target.name} ({target.title})"
    names = [n for target in known for n in (target.name, *target.aliases)]
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(t.name for t in known)}"
    raise UsageError(f"unknown target {name!r}; {hint} (mctune targets lists them)")


@lru_cache(maxsize=1)
def targets() -> tuple[Target, ...]:
    """Every target of the registry, the host CPU first, then by name."""
    found = [load_target(path) for path in sorted((search_spaces_dir() / "targets").glob("*.toml"))]
    return tuple(sorted(found, key=lambda target: (not target.on_cpu, target.name)))


def peaks(name: str) -> tuple[float, float] | None:
    """The matrix rate (operations/s) and memory bandwidth (bytes/s) that the data sheet of a GPU of the registry gives;
    ``None`` for a CPU, an unknown name, or where a figure is unknown.

    Examples:
        >>> peaks("h100-sxm")
        (989000000000000.0, 3350000000000.0)
    """
    found = next((target for target in targets() if target.name == name and not target.on_cpu), None)
    if found is None or not found.matrix_tflops or not found.dram_gbs:
        return None
    return found.matrix_tflops * 1e12, found.dram_gbs * 1e9


def load_target(path: Path) -> Target:
    """Read one row of the registry; a row of kind ``cpu`` gets its figures from the machine itself.

    Raises:
        UsageError: if a figure's name is unknown, or it has no source.
    """
    values: dict[str, Any] = read_toml(path)
    figures: dict[str, dict[str, Any]] = values.pop("figures", {})
    values["aliases"] = tuple(values.get("aliases", ()))
    if values["kind"] == "cpu":
        return _host_target(values, read_host())
    for field, figure in figures.items():
        if field not in FIGURES:
            raise UsageError(f"{path.name}: unknown figure {field!r}; the figures are {', '.join(FIGURES)}")
        if not figure.get("source"):
            raise UsageError(f"{path.name}: {field} has no source; say where it comes from, unsure = true if unsure")
    return Target(
        **values,
        **{field: figure["value"] for field, figure in figures.items()},
        unsure=tuple(field for field, figure in figures.items() if figure.get("unsure")),
        sources=tuple((field, figure["source"]) for field, figure in figures.items()),
    )


def _host_target(values: dict[str, Any], host: Host) -> Target:
    sources = (
        ("cores", "the CPUs that this process may run on"),
        ("clock_ghz", "/proc/cpuinfo at the moment of reading"),
        ("cache_mb", "/sys/devices/system/cpu/cpu0/cache, last level"),
    )
    return Target(
        **{**values, "title": host.model},
        arch=host.arch,
        cores=host.cores,
        clock_ghz=host.clock_ghz,
        matrix_dtype="float32",
        cache_mb=host.cache_mb,
        vector_floats=host.vector_floats,
        unsure=("clock_ghz",),
        sources=sources,
    )
