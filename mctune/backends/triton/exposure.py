"""Which known hazards of Triton's a compiled kernel may be exposed to, read off its PTX: patterns, no proof."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mctune.backends.protocol import Launch

_PRODUCT = re.compile(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*(\{|%rd)")
_BARRIER = re.compile(r"\b(?:bar|barrier\.cta|barrier)\.sync\b")
_WRITE = re.compile(r"cp\.async\.c[ag]|\bst\.shared|\bstmatrix\b")
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
        open_waits: waits for products after which shared memory is written before all warps have met.
    """

    products: int
    registers: int
    in_flight: int
    fences: int
    copies: bool
    open_waits: int


def wgmma_of(ptx: str) -> Wgmma:
    """Of a kernel's PTX."""
    left = _PRODUCT.findall(ptx)
    return Wgmma(
        products=len(left),
        registers=left.count("{"),
        in_flight=max((int(count) for count in _WAIT.findall(ptx)), default=0),
        fences=len(re.findall(r"fence\.proxy\.async", ptx)),
        copies="cp.async.c" in ptx,
        open_waits=_open_waits(ptx),
    )


def _open_waits(ptx: str) -> int:
    """In the order of the text, in which a loop's end and its beginning are apart."""
    found, waited = 0, False
    for line in ptx.splitlines():
        if _WAIT.search(line):
            waited = True
        elif _BARRIER.search(line):
            waited = False
        elif waited and _WRITE.search(line):
            found, waited = found + 1, False
    return found


def exposed(launch: Launch) -> tuple[str, ...]:
    """Names of the hazards whose pattern a kernel has, whatever Triton compiled it."""
    found = wgmma_of(launch.asm)
    patterns: Mapping[str, bool] = {
        "wgmma wait": found.open_waits > 0 and launch.num_warps > 4,
        "wgmma fence": found.products > 0 and found.copies and found.fences == 0,
        "wgmma registers": found.registers > 0 and found.in_flight > 0,
        "transposed registers": found.registers > 0 and launch.name in _TRANSPOSING,
        "ptxas": found.registers > 0,
    }
    return tuple(name for name, has in patterns.items() if has)
