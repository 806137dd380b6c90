"""Which known faults of Triton a compiled kernel may be exposed to, read off its PTX: patterns, not proof."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mctune.backends.protocol import Launch
from mctune.backends.triton.hazards import Hazard, hazards

_PRODUCT = re.compile(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*(\{|%rd)")
_WAIT = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)")
_TRANSPOSING = ("cached_kernel", "piece_kernel", "chosen_kernel")
"""Kernels whose gated rows are transposed in registers: their assembly does it in several ways."""


@dataclass(frozen=True)
class Wgmma:
    """The products of a kernel by a group of warps of sm_90.

    Attributes:
        products: how many there are; ``registers``: of them, those whose left operand is in registers.
        in_flight: most that may be unfinished where the kernel goes on.
        fences: between what ordinary instructions wrote to shared memory and what products read there.
        copies: whether shared memory is filled by copies that go along.
    """

    products: int
    registers: int
    in_flight: int
    fences: int
    copies: bool


def wgmma_of(ptx: str) -> Wgmma:
    """The products in a kernel's PTX."""
    left = _PRODUCT.findall(ptx)
    return Wgmma(
        products=len(left),
        registers=left.count("{"),
        in_flight=max((int(count) for count in _WAIT.findall(ptx)), default=0),
        fences=len(re.findall(r"fence\.proxy\.async", ptx)),
        copies="cp.async.c" in ptx,
    )


def exposed(launch: Launch) -> tuple[str, ...]:
    """Names of the hazards whose pattern a kernel has, whatever Triton compiled it."""
    found = wgmma_of(launch.asm)
    early = _early(launch)
    patterns: Mapping[str, bool] = {
        "wgmma wait": any(one.waited for one in early),
        "wgmma buffers": any(not one.waited for one in early),
        "wgmma fence": found.products > 0 and found.copies and found.fences == 0,
        "wgmma registers": found.registers > 0 and found.in_flight > 0 and not launch.serialized,
        "transposed registers": found.registers > 0 and launch.name in _TRANSPOSING,
        "ptxas": found.registers > 0,
    }
    return tuple(name for name, has in patterns.items() if has)


def _early(launch: Launch) -> tuple[Hazard, ...]:
    """Writes to what a product may still read; none for a kernel whose control flow is too complex to tell."""
    try:
        return hazards(launch.asm, launch.num_warps, launch.serialized)
    except ValueError:
        return ()
