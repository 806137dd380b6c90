"""What `mctune bench` says of its figures: tables, fractions of the bound, what was wanted of them, rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mctune.core.config import Config
from mctune.core.environment import environment, today, version
from mctune.core.outcome import Timed
from mctune.core.target import Target
from mctune.core.work import bound, work
from mctune.measure.gpu.contenders import NARROW, TORCH_ATTENTION
from mctune.measure.gpu.others import DISTRIBUTIONS
from mctune.measure.gpu.shapes import BASE_SEGMENT, Shape
from mctune.report.rows import Row

HEADS = 16


def base(segment: int) -> str:
    """What stands beside every figure of the recurrence alone."""
    return (
        f"base: plain linear attention, as residual over segments of {segment}, whose backward has its states; "
        "one long segment would compute them again, and flatter ssc"
    )


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
    problem = shape.meaning(timing.computes)
    parts = [problem.replace(pass_="forward"), problem] if shape.kind == "training" else [problem]
    counted = [work(part) for part in parts]
    if timing.name.endswith(NARROW):
        # The cached states that a step reads have half the bytes.
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
    if any(t.computes == "base" for t in timings):
        lines += ["", base(shape.problem("base").segment_length or 0)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Goal:
    """A figure, and what is wanted of it: so much at least, or, with ``most``, at most."""

    name: str
    figure: float
    wanted: float
    most: bool = False

    @property
    def met(self) -> bool:
        return self.figure <= self.wanted if self.most else self.figure >= self.wanted

    def __str__(self) -> str:
        sense = "at most" if self.most else "at least"
        return f"{'met   ' if self.met else 'MISSED'} {self.figure:.2f} {self.name}, {sense} {self.wanted:g} wanted"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "met": self.met}


def goals(found: Mapping[Shape, Sequence[Timing]], reached: Rates) -> list[Goal]:
    """What is wanted of the figures, and what they are; those whose contenders were not measured are left out."""
    training, long = (Shape("training", 1, T, HEADS, 128, 256) for T in (16384, 65536))
    forward, decode = Shape("forward", 1, 16384, HEADS, 128, 256), Shape("decode", 1, 64 * 256 + 1, HEADS, 128, 256)

    def best(shape: Shape, *starts: str, end: str = "") -> Timing | None:
        """The fastest of those whose names begin with one of ``starts``."""
        fit = [t for t in found.get(shape, []) if t.name.startswith(starts) and t.name.endswith(end)]
        return min(fit, key=lambda t: t.timed.ms, default=None)

    def ratio(name: str, over: Timing | None, under: Timing | None, wanted: float, most: bool = False) -> list[Goal]:
        if not (over and under):
            return []
        return [Goal(name.format(over=over.name), over.timed.ms / under.timed.ms, wanted, most)]

    ssc, base = best(long, "mctune ssc"), best(long, "mctune base")
    name = "GRM forward and backward, times as fast as flash attention, T 16384"
    made = ratio(name, best(training, "sdpa, flash"), best(training, "mctune grm"), 2.5)
    name = "base forward and backward, times as fast as fla's chunk kernels ({over}), T 16384"
    made += ratio(name, best(training, "fla chunk_linear", "fla chunk_simple"), best(training, "mctune base"), 1.0)
    bounds = [part for t in found.get(forward, []) if t.computes == "grm" and (part := fraction(forward, t, reached))]
    made += [Goal("GRM forward, of the bound, T 16384", max(bounds), 0.6)] if bounds else []
    name = f"GRM decode with 64 {NARROW}, times as fast as the best of torch's attention ({{over}})"
    made += ratio(name, best(decode, *TORCH_ATTENTION), best(decode, "mctune grm", end=NARROW), 2.0)
    for most in (1.8, 1.5):
        made += ratio("SSC top 4 forward and backward, its time over base's, T 65536", ssc, base, most, most=True)
    return made


def surroundings(target: Target) -> dict[str, Any]:
    """What the figures were made with, the kernels that mctune's are compared with included."""
    found = environment(target)
    others = {name: text for name in DISTRIBUTIONS if (text := version(name))}
    return {**found, "versions": {**found["versions"], **others}, "base": base(BASE_SEGMENT)}


def rows(shape: Shape, timings: Sequence[Timing], target: Target, reached: Rates) -> Iterator[Row]:
    """One for each of mctune's, all that is not mctune's beside it."""
    others = {t.name: t.timed.ms for t in timings if not t.name.startswith("mctune")}
    for t in timings:
        if t.name.startswith("mctune"):
            backend = "triton" + (" step" if shape.kind == "training" else "") + t.name.partition(t.computes)[2]
            yield Row.of(
                target.name, shape.problem(t.computes), backend, Config.of(t.config), t.timed, baselines=others,
                fraction_of_bound=fraction(shape, t, reached), versions=surroundings(target)["versions"],
                date=today(),
            )  # fmt: skip
