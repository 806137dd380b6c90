"""The machines that kernels are tuned for: a registry of TOML rows, and the CPU that this runs on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A CPU or GPU. Rates are peaks; ``unsure`` names the fields without a trusted source."""

    name: str
    kind: str
    arch: str
    cores: int
    clock_ghz: float
    matrix_tflops: float
    dram_gbs: float
    cache_mb: float
    cache_tbs: float
    shared_bytes: int
    threads_per_core: int
    unsure: tuple[str, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
