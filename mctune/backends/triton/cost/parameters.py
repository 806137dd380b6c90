"""The cost model's parameters: what no data sheet states."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parameters:
    """Efficiencies are what a good kernel reaches of a peak, 0 to 1. ``mctune calibrate`` fits some to measured times.

    Attributes:
        matrix: of the matrix units' peak.
        issue: of the instruction slots.
        fp32: of the float32 lanes.
        special: of the special function units.
        shared: of the shared memory's bandwidth, bank conflicts included.
        port: of a multiprocessor's port to the cache.
        dram, cache: of the bandwidths of the memory and of the last-level cache.
        shared_bytes, port_bytes: bytes a cycle and multiprocessor.
        memory_us: a load that the last-level cache has not, in microseconds.
        dependent_cycles: from one instruction of a warp to the next that needs it, over how many are independent.
        barrier_cycles: what a block loses at a barrier.
        half_warps: with so many warps on a multiprocessor half of what other units do is hidden.
        exposed: share of the lesser of traffic and arithmetic that does not overlap with the greater.
        reread: share of repeated reads that miss a last-level cache far smaller than the arrays.
        launch_us: what a launch costs beside its kernel, in microseconds.
        serialized_cycles: of a product that is waited for before its warpgroup asks for the next: from its end to the
            next one's begin.
        unknown_trips: passes of a loop of which nothing is known.
        spill_passes: share of a loop's passes that load and store what registers did not hold.
        spill_cycles: what a warp waits for each of these.
    """

    matrix: float = 0.75
    issue: float = 0.75
    fp32: float = 0.8
    special: float = 0.8
    shared: float = 0.7
    port: float = 0.7
    dram: float = 0.85
    cache: float = 0.75
    shared_bytes: float = 128.0
    port_bytes: float = 64.0
    memory_us: float = 0.7
    dependent_cycles: float = 2.0
    barrier_cycles: float = 30.0
    half_warps: float = 4.0
    serialized_cycles: float = 60.0
    exposed: float = 0.1
    reread: float = 0.2
    launch_us: float = 3.0
    unknown_trips: float = 8.0
    spill_passes: float = 1.0
    spill_cycles: float = 8.0
