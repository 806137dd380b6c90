"""What `benchmarks/gpu.py` says of its figures: tables, fractions of the bound, what was wanted of them, rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpu_contenders import NARROW, Shape

from mctune.core.config import Config
from mctune.core.environment import environment
from mctune.core.outcome import Timed
from mctune.core.target import Target
from mctune.core.work import bound, work
from mctune.report.rows import Row

HEADS = 16


@dataclass(frozen=True)
class Rates:
    """What the GPU itself reached: bfloat16 products of 8192 x 8192 in operations/s, a copy of 1 GiB in bytes/s."""

    matrix: float
    copy: float


@dataclass(frozen=True)
class Timing:
    """One contender at one shape: device time, with its error against float32 where it has something to be held to
    (``computes``), and the milliseconds that the host takes to launch it."""

    name: str
    computes: str
    timed: Timed
    host_ms: float
    config: dict[str, Any]


def fraction(shape: Shape, timing: Timing, reached: Rates) -> float | None:
    """The shortest possible time of what it computes at the measured rates, over its own."""
    if not timing.computes:
        return None
    problem = shape.problem(timing.computes)
    parts = [problem.replace(pass_="forward"), problem] if shape.kind == "training" else [problem]
    counted = [work(part) for part in parts]
    if timing.name.endswith(NARROW):
        # Of the cached states that a step reads, half of the bytes.
        read = min(problem.top_k or problem.T, (problem.T - 1) // shape.C)
        counted = [replace(counted[0], bytes=counted[0].bytes - 2 * read * shape.B * shape.H * shape.D**2)]
    shortest = sum(bound(one, reached.matrix, reached.copy) for one in counted)
    return shortest * 1e3 / timing.timed.ms


def table(shape: Shape, timings: Sequence[Timing], reached: Rates) -> str:
    """Markdown, the fastest first."""
    ours = next((t for t in timings if t.computes == "grm"), None)
    lines = [
        f"**{shape}**",
        "",
        "| | ms (20% to 80%) | of grm | of the bound | host ms | error |",
        "|---|---|---|---|---|---|",
    ]
    for t in sorted(timings, key=lambda t: t.timed.ms):
        part = fraction(shape, t, reached)
        ratio = f"{t.timed.ms / ours.timed.ms:.2f}" if ours else ""
        held = f"{t.timed.error:.1e}" if t.computes else ""
        lines.append(
            f"| {t.name} | {t.timed.ms:.3f} ({t.timed.low:.3f} to {t.timed.high:.3f}) | {ratio} | "
            f"{f'{part:.0%}' if part else ''} | {t.host_ms:.3f} | {held} |"
        )
    return "\n".join(lines) + "\n"


def goals(found: dict[Shape, list[Timing]], reached: Rates) -> list[dict[str, Any]]:
    """What is wanted of the figures, and what they are; those whose shapes were not measured are left out."""

    def best(kind: str, T: int, *starts: str) -> float | None:
        timings = found.get(Shape(kind, 1, T, HEADS, 128, 256), [])
        return min((t.timed.ms for t in timings if t.name.startswith(starts)), default=None)

    def ratio(name: str, wanted: float, over: float | None, under: float | None) -> None:
        if over and under:
            figure = over / under
            made.append({"name": name, "wanted": wanted, "figure": figure, "met": figure >= wanted})

    made: list[dict[str, Any]] = []
    grm, flash = best("training", 16384, "mctune grm"), best("training", 16384, "sdpa, flash")
    ratio("GRM forward and backward, times as fast as flash attention, T 16384", 2.5, flash, grm)
    base, fla = best("training", 16384, "mctune base"), best("training", 16384, "fla chunk_linear", "fla chunk_simple")
    ratio("recurrence forward and backward, times as fast as fla's chunk kernels, T 16384", 1.0, fla, base)
    ssc, long = best("training", 65536, "mctune ssc"), best("training", 65536, "mctune base")
    ratio("SSC top 4 forward and backward at T 65536: 1.5 times the recurrence's time over its own", 1.0,
          1.5 * long if long else None, ssc)  # fmt: skip
    step, attention = best("decode", 64 * 256 + 1, "mctune grm"), best("decode", 64 * 256 + 1, "sdpa")
    ratio("GRM decode with 64 states, times as fast as attention's", 2.0, attention, step)
    shape = Shape("forward", 1, 16384, HEADS, 128, 256)
    parts = [fraction(shape, t, reached) or 0.0 for t in found.get(shape, []) if t.computes == "grm"]
    if parts:
        made.append({"name": "GRM forward, of the bound", "wanted": 0.6, "figure": max(parts),
                     "met": max(parts) >= 0.6})  # fmt: skip
    return made


def rows(shape: Shape, timings: Sequence[Timing], target: Target, reached: Rates) -> Iterator[Row]:
    """One for each of mctune's, all that is not mctune's beside it."""
    others = {t.name: t.timed.ms for t in timings if not t.name.startswith("mctune")}
    for t in timings:
        if t.name.startswith("mctune"):
            backend = "triton" + (" step" if shape.kind == "training" else "") + t.name.partition(t.computes)[2]
            yield Row.of(
                target.name, shape.problem(t.computes), backend, Config.of(t.config), t.timed, baselines=others,
                fraction_of_bound=fraction(shape, t, reached), versions=environment(target)["versions"],
            )  # fmt: skip
