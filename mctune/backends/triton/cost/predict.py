"""The cost model: predicted time of compiled launches on an absent GPU (docs/cost-model.md).

For every launch: what a block executes (:mod:`.mix`), times how often its loops run (:mod:`.trips`), against what a
multiprocessor and the whole GPU do a second. A model, not a measurement: it ranks candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from mctune.backends.protocol import Launch
from mctune.backends.triton.cost.calibrated import calibration
from mctune.backends.triton.cost.footprint import footprint
from mctune.backends.triton.cost.marks import marked, source_of_marks
from mctune.backends.triton.cost.mix import Loop, loops_of, sum_of
from mctune.backends.triton.cost.opcodes import Mix
from mctune.backends.triton.cost.parameters import Parameters
from mctune.backends.triton.cost.trips import UNCOUNTED, source_of
from mctune.backends.triton.cost.walk import Source, Walk
from mctune.backends.triton.resources import CORES, Core, resources
from mctune.core.config import Config
from mctune.core.errors import MctuneError
from mctune.core.outcome import Predicted
from mctune.core.problem import Problem
from mctune.core.target import Target


class Uncounted(MctuneError):
    """The cost model does not count a kernel."""


@dataclass(frozen=True)
class Demand:
    """What a launch asks of the target, whatever the target's efficiency.

    Attributes:
        name: the kernel's.
        mean, heaviest: of one block, loops included: of the mean one, and of the one with the most work.
        chain, longest: of the same two: (issued instructions of one warp, barriers, waits for global memory).
        blocks: of the grid; uniform: whether all do about the same work.
        resident: blocks that a multiprocessor holds at once; warps: of one block.
        footprint: bytes of global arrays, each touched once.
        extra: launches of other libraries that come with this one.
        serialized: whether a warpgroup waits for each of its products before it asks for the next.
    """

    name: str
    mean: Mix
    heaviest: Mix
    chain: tuple[float, float, float]
    longest: tuple[float, float, float]
    blocks: int
    uniform: bool
    resident: int
    warps: int
    footprint: float
    extra: int = 0
    serialized: bool = False


@dataclass(frozen=True)
class Part:
    """The time of one launch in microseconds, overhead included, and the unit that bounds it."""

    name: str
    us: float
    bound: str


def predict(launches: Sequence[Launch], problem: Problem, config: Config, target: Target) -> Predicted:
    """The time of one call and, in words, its parts; with the target's calibration, if there is one.

    Infinite, and why, for launches that the model does not count: only measured searches have them.
    """
    parameters, calibrated = calibration(target)
    try:
        asked = demands(launches, problem, config, target, parameters)
    except Uncounted as error:
        return Predicted(math.inf, str(error))
    parts = estimate(asked, target, parameters)
    notes = dict.fromkeys(f"{launch.name}: {note}" for launch in launches for note in launch.notes)
    apart: dict[str, float] = {}
    for launch, part in zip(launches, parts, strict=True):
        apart[launch.operation] = apart.get(launch.operation, 0.0) + part.us / 1e3
    return Predicted(sum(apart.values()), _in_words(parts, calibrated), notes=tuple(notes), parts=tuple(apart.items()))


def demands(
    launches: Sequence[Launch], problem: Problem, config: Config, target: Target, parameters: Parameters
) -> tuple[Demand, ...]:
    """What each launch asks; of ``parameters``, only those for spills and for unknown loops matter here.

    Raises:
        Uncounted: for a kernel whose warps do different work.
    """
    for launch in launches:
        if launch.name in UNCOUNTED:
            raise Uncounted(f"{launch.name} is not predicted: the cost model takes all warps of a block to do the same")
    return tuple(_demand(launch, problem, config, target, parameters) for launch in launches)


def estimate(asked: Sequence[Demand], target: Target, parameters: Parameters) -> tuple[Part, ...]:
    """The time of each launch."""
    return tuple(_time(demand, target, parameters) for demand in asked)


def _in_words(parts: Sequence[Part], calibrated: bool) -> str:
    total = sum(part.us for part in parts)
    longest = sorted(parts, key=lambda part: -part.us)[:2]
    shares = ", ".join(f"{part.name.strip('_')} {part.us / total:.0%} by {part.bound}" for part in longest)
    return f"cost model, {'calibrated' if calibrated else 'not calibrated'}: {shares}"


# --- demand


def _demand(launch: Launch, problem: Problem, config: Config, target: Target, parameters: Parameters) -> Demand:
    compiled = loops_of(launch.asm, launch.num_warps, launch.warp_size)
    cost = _matrix_cost(problem, config, target)
    told = [_walked(launch, compiled, source_for(launch, problem, config, target, heaviest), parameters, cost)
            for heaviest in (False, True)]  # fmt: skip
    (mean, chain), (heaviest, longest) = told
    # Count on half of the cache: other arrays pass through it too.
    touched = footprint(launch, problem, config, (target.cache_mb or 1.0) * 2**19)
    if launch.name in _STREAMING:
        share = min(1.0, touched / max(launch.blocks * (mean.loaded + mean.stored), 1.0))
        mean, heaviest = (
            replace(mix, loaded=mix.loaded * share, stored=mix.stored * share) for mix in (mean, heaviest)
        )
    # If some program has a quarter more to do than the mean, the order of the grid matters, not whole waves.
    uniform = all(most <= 1.25 * value for most, value in zip(astuple(heaviest), astuple(mean), strict=True))
    return Demand(
        name=launch.name,
        mean=mean,
        heaviest=heaviest,
        chain=chain,
        longest=longest,
        blocks=launch.blocks,
        uniform=uniform,
        resident=max(resources(launch, target).blocks_per_core, 1),
        warps=launch.num_warps,
        footprint=touched,
        extra=_EXTRA.get(launch.name, 0),
        serialized=launch.serialized and any(loop.matrix for loop in compiled.inner),
    )


def source_for(
    launch: Launch, problem: Problem, config: Config, target: Target, heaviest: bool = False
) -> Source | None:
    """How often a launch's loops run: as its assembly says, or else as is known of kernels of its name."""
    compiled = loops_of(launch.asm, launch.num_warps, launch.warp_size)
    if marked(compiled):
        return source_of_marks(compiled, Walk(problem, config, dict(launch.values), heaviest))
    return source_of(launch, problem, config, target, heaviest)


_EXTRA = {"place_kernel": 3}
"""Kernels of torch that a launcher runs beside ours: zeros, and sums over counts of pairs."""


_STREAMING = ("step_kernel",)
"""Kernels that touch every element once, and whose programs take one of several branches: not all of their code."""


def _walked(
    launch: Launch, compiled: Loop, source: Source | None, parameters: Parameters, cost: float
) -> tuple[Mix, tuple[float, float, float]]:
    """What a block executes, and its chain, with its loops walked as often as ``source`` says."""
    mix, chain, trips = _walk(compiled, 1.0, 0.0, source, launch, parameters, cost)
    if launch.spills:
        moved = 2.0 * launch.spills * launch.num_warps * launch.warp_size * (1 + parameters.spill_passes * (trips - 1))
        per_warp = moved / (4 * launch.warp_size * launch.num_warps)
        mix = sum_of((mix, Mix(shared=moved, issue=per_warp * launch.num_warps)))
        chain = (chain[0] + per_warp * parameters.spill_cycles / parameters.dependent_cycles, *chain[1:])
    return mix, chain


def _matrix_cost(problem: Problem, config: Config, target: Target) -> float:
    """Time of a product's operation over that of 16 bits."""
    if problem.dtype != "float32":
        return 1.0
    precision = config["precision"] if "precision" in config else ""
    return {"tf32x3": 6.0, "tf32": 2.0}.get(str(precision), 1.0) if target.kind == "cuda" else 8.0


def _walk(
    loop: Loop,
    passes: float,
    entries: float,
    source: Source | None,
    launch: Launch,
    parameters: Parameters,
    cost: float,
) -> tuple[Mix, tuple[float, float, float], float]:
    """Everything in ``loop``, entered so many times and run ``passes`` times in all; and its busiest loop's passes.

    ``cost``: time of an operation of a product over that of one with 16-bit inputs.
    """
    total = _scaled(loop.mix, passes)
    stages = max(int(dict(launch.values).get("STAGES", launch.num_stages)), 1)
    # What a pass waits for. The loads of a pass are issued together, in a pipeline several passes ahead.
    waits = passes * min(loop.mix.loads, 1.0)
    if entries and loop.mix.ahead and (launch.warp_size == 32 or loop.mix.matrix):
        # The first passes' loads are issued before the loop; the last passes issue loads that nothing uses.
        early = min(stages - 1, passes / entries) * entries
        total = replace(total, loaded=max(total.loaded - loop.mix.ahead * early, 0.0))
        waits /= stages
    outside = 0.0
    if source is not None:
        outside = loop.mix.matrix - (source.matrix + source.conditional) * cost
        total = _fewer(total, passes * source.conditional * cost)
    matched = _matched(loop.inner, source)
    peeled = _peeled([inner.mix.matrix if told else 0.0 for inner, told in matched], outside, stages)
    chain = (total.issue / launch.num_warps, total.barriers, waits)
    busiest = passes
    for (inner, told), gone in zip(matched, peeled, strict=True):
        trips = parameters.unknown_trips if told is None else max(told.trips - gone, 0.0)
        part, links, most = _walk(inner, passes * trips, passes, told, launch, parameters, cost)
        total = sum_of((total, part))
        chain = (chain[0] + links[0], chain[1] + links[1], chain[2] + links[2])
        busiest = max(busiest, most)
    return total, chain, busiest


def _peeled(matrix: Sequence[float], outside: float, stages: int) -> list[int]:
    """Passes that a pipeline took out of each loop: whose products stand ``outside`` the loops, and in no source."""
    gone = [0] * len(matrix)
    for _ in range(max(stages - 1, 1)):
        for i, own in enumerate(matrix):
            if 0 < own <= 1.1 * outside:
                outside -= own
                gone[i] += 1
    return gone


def _matched(compiled: tuple[Loop, ...], source: Source | None) -> list[tuple[Loop, Source | None]]:
    """Each compiled loop with the source's: in order, or where counts differ, in order among those with products."""
    told = () if source is None else source.inner
    if len(told) == len(compiled):
        return list(zip(compiled, told, strict=True))
    with_matrix = iter([loop for loop in told if loop.total > 0])
    without = iter([loop for loop in told if not loop.total > 0])
    return [(loop, next(with_matrix if loop.matrix else without, None)) for loop in compiled]


def _fewer(mix: Mix, operations: float) -> Mix:
    """``mix`` without so many operations of its products, nor the other work that belongs to them."""
    share = max(1 - operations / mix.matrix, 0.0) if mix.matrix else 1.0
    return replace(mix, matrix=mix.matrix * share, groups=mix.groups * share, operands=mix.operands * share)


def _scaled(mix: Mix, factor: float) -> Mix:
    return Mix(*(value * factor for value in astuple(mix)))


# --- time


def _time(demand: Demand, target: Target, p: Parameters) -> Part:
    core, clock = CORES[target.arch], (target.clock_ghz or 1.0) * 1e3  # cycles per microsecond
    share = demand.blocks / target.cores
    if demand.uniform:
        us, unit = _rounds(demand, demand.mean, demand.chain, math.ceil(share), core, clock, target, p)
    else:
        # The longest programs start first: multiprocessors finish together, but not before the longest program.
        us, unit = _rounds(demand, demand.mean, demand.chain, max(share, 1e-9), core, clock, target, p)
        alone = _rounds(demand, demand.heaviest, demand.longest, 1, core, clock, target, p)
        us, unit = max((us, unit), alone)
    traffic = demand.blocks * (demand.mean.loaded + demand.mean.stored)
    cache = (target.cache_mb or 1.0) * 2**20
    once = min(demand.footprint, traffic) if demand.footprint else traffic
    again = traffic - once
    missed = p.reread * max(0.0, 1 - cache / demand.footprint) if demand.footprint else 0.0
    dram = (once + missed * again) / ((target.dram_gbs or 100.0) * 1e3 * p.dram)
    l2 = traffic / ((target.cache_tbs or 2 * (target.dram_gbs or 100.0) / 1e3) * 1e6 * p.cache)
    times = {unit: us, "DRAM": dram, "L2": l2}
    bound = max(times, key=lambda name: times[name])
    # Traffic and arithmetic overlap, except at a kernel's beginning and end.
    total = times[bound] + p.exposed * (sum(times.values()) - times[bound])
    overhead = p.launch_us * (1 + demand.extra)
    return Part(demand.name, total + overhead, "its launch" if overhead > total else bound)


def _rounds(
    demand: Demand,
    mix: Mix,
    chain: tuple[float, float, float],
    blocks: float,
    core: Core,
    clock: float,
    target: Target,
    p: Parameters,
) -> tuple[float, str]:
    """Microseconds in which a multiprocessor runs ``blocks``, as many at once as it holds; and what bounds it."""
    full, rest = divmod(blocks, demand.resident) if blocks > demand.resident else (0, blocks)
    us, unit = 0.0, ""
    if full:
        once, unit = _together(demand, mix, chain, demand.resident, core, clock, target, p)
        us += full * once
    if rest:
        once, last = _together(demand, mix, chain, rest, core, clock, target, p)
        # In an uneven grid the last round has blocks of other lengths beside it.
        us += once if demand.uniform or not full else once * rest / demand.resident
        unit = unit or last
    return us, unit


def _together(
    demand: Demand,
    mix: Mix,
    chain: tuple[float, float, float],
    blocks: float,
    core: Core,
    clock: float,
    target: Target,
    p: Parameters,
) -> tuple[float, str]:
    """Microseconds of ``blocks`` that share a multiprocessor, and the unit that bounds them."""
    nvidia = target.kind == "cuda"
    issued = core.parts if nvidia else 1.0  # a 64-lane instruction occupies one SIMD of CDNA for 4 cycles
    rate = (target.matrix_tflops or 1.0) * 1e6 / target.cores  # operations per microsecond
    issue = max(mix.issue / (issued * p.issue), mix.fp32 / (core.fp32_lanes * p.fp32)) / clock
    # A product is no faster than its operands arrive from shared memory; it reads them without bank conflicts.
    operands = blocks * mix.operands / p.shared_bytes / clock
    times = {
        "matrix units": max(blocks * mix.matrix / rate, operands) / p.matrix,
        "instruction issue": blocks * issue,
        "special functions": blocks * mix.special / (core.special_lanes * p.special) / clock,
        "shared memory": blocks * mix.shared / (p.shared_bytes * p.shared) / clock,
        "L2 port": blocks * (mix.loaded + mix.stored) / (p.port_bytes * p.port) / clock,
    }
    total = sum(times.values())  # operands are read while their product runs, so its time includes them
    times["shared memory"] += operands
    bound = max(times, key=lambda name: times[name])
    warps = blocks * demand.warps
    # With few warps, units do not overlap completely: part of the other units' time shows.
    shown = p.half_warps / (p.half_warps + warps)
    alone = (chain[0] * p.dependent_cycles + chain[1] * p.barrier_cycles) / clock + chain[2] * p.memory_us
    if demand.serialized:
        # A warpgroup waits while its own product runs; only other warpgroups overlap it.
        shown = max(shown, min(4 / warps, 1.0))
        alone += 4 / demand.warps * mix.matrix / (rate * p.matrix) + mix.groups * p.serialized_cycles / clock
    busy = times[bound] + shown * max(total - times[bound], 0.0)
    return (busy, bound) if busy >= alone else (alone, "latency")
