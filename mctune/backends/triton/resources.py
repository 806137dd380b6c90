"""The resources of a multiprocessor that a compiled kernel needs, and its occupancy."""

from __future__ import annotations

from dataclasses import dataclass

from mctune.backends.triton.device import Launch
from mctune.core.target import Target


@dataclass(frozen=True)
class Core:
    """One streaming multiprocessor, or compute unit, of an architecture.

    Attributes:
        fp32_lanes: float32 multiply-adds a clock.
        special_lanes: exponentials, reciprocals and the like a clock.
        max_blocks: blocks that may be resident.
        parts: each has its own warp scheduler and register file.
        registers: 32-bit registers of one part, over all lanes.
        register_unit: a warp's registers are rounded up to a multiple of this.
        shared_unit: a block's shared memory is rounded up to a multiple of this many bytes.
        shared_reserved: bytes of a block's shared memory that the system takes.
    """

    fp32_lanes: int
    special_lanes: int
    max_blocks: int
    parts: int = 4
    registers: int = 16384
    register_unit: int = 256
    shared_unit: int = 128
    shared_reserved: int = 1024


# CUDA C++ programming guide, "Arithmetic Instructions" and "Technical Specifications per Compute Capability"; AMD CDNA3
# ISA guide. From memory.
CORES = {
    "sm_70": Core(64, 16, 32, shared_unit=256, shared_reserved=0),
    "sm_75": Core(64, 16, 16, shared_unit=256, shared_reserved=0),
    "sm_80": Core(64, 16, 32),
    "sm_86": Core(128, 16, 16),
    "sm_87": Core(128, 16, 16),
    "sm_89": Core(128, 16, 24),
    "sm_90": Core(128, 16, 32),
    "sm_100": Core(128, 16, 32),
    "sm_120": Core(128, 16, 24),
    # 512 registers for each lane of a SIMD. A wave's 64 lanes take 4 clocks there, and 16 for a special function.
    "gfx942": Core(128, 16, 32, registers=512 * 64, register_unit=8 * 64, shared_unit=512, shared_reserved=0),
}
"""By ``Target.arch``."""


@dataclass(frozen=True)
class Resources:
    """The resources that a launch needs.

    Attributes:
        registers: a thread.
        spills: bytes of stack a thread.
        shared: bytes of shared memory a block.
        occupancy: warps resident on a multiprocessor, of the most it can hold, given enough blocks.
        blocks_per_core: blocks resident on a multiprocessor, given enough of them.
        limited_by: what a further block lacks: ``registers``, ``shared memory``, ``threads`` or ``blocks``.
    """

    registers: int
    spills: int
    shared: int
    occupancy: float
    blocks_per_core: int
    limited_by: str

    def __str__(self) -> str:
        spilt = f", {self.spills} B spilt" if self.spills else ""
        return (
            f"{self.registers} registers{spilt}, {self.shared} B shared, {self.blocks_per_core} blocks per SM "
            f"({self.occupancy:.0%} of its warps, limited by {self.limited_by})"
        )


def resources(launch: Launch, target: Target) -> Resources:
    """The resources that ``launch`` needs on ``target``; a kernel that cannot run there has no blocks per core."""
    core = CORES[target.arch]
    most_warps = target.threads_per_core // launch.warp_size
    room = {
        "threads": most_warps // launch.num_warps,
        "registers": _warps_by_registers(core, launch) // launch.num_warps,
        "shared memory": _blocks_by_shared(core, launch, target),
        "blocks": core.max_blocks,
    }
    limited_by = min(room, key=lambda name: room[name])
    blocks = room[limited_by]
    return Resources(
        registers=launch.registers,
        spills=launch.spills,
        shared=launch.shared,
        occupancy=blocks * launch.num_warps / most_warps,
        blocks_per_core=blocks,
        limited_by=limited_by,
    )


def _warps_by_registers(core: Core, launch: Launch) -> int:
    a_warp = _round_up(max(launch.registers, 1) * launch.warp_size, core.register_unit)
    return core.parts * (core.registers // a_warp)


def _blocks_by_shared(core: Core, launch: Launch, target: Target) -> int:
    a_block = _round_up(launch.shared + core.shared_reserved, core.shared_unit)
    return target.shared_kb_per_core * 1024 // a_block if a_block else core.max_blocks


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
