"""Memory Caching (arXiv:2602.24281) on a GPU beside what people use today: attention, linear attention, torch.compile.

GRM (Eq. 8-10), SSC (Eq. 16-17) and the recurrence alone by mctune's Triton kernels, against torch's causal attention,
FlashAttention 3 where the machine has it, flash-linear-attention's chunked kernels (fla-core), log-linear attention as
it ships it, and torch.compile of mctune's PyTorch path; in bfloat16, 16 heads, 16K and 64K tokens in sequences of 2K to
64K, widths 64 and 128, segments of 64 to 512: forward, forward and backward, and one decoded token.

One process, the same tensors for all, rotated order, a cold L2, clocks brought up first; medians of device time. What
mctune computes, and what is the same recurrence, is held to mctune's PyTorch path in float32 beforehand. The decisive
shapes come first, torch.compile after them, beside mctune's once more. Rows are written as they come: the same command
goes on where an earlier one ended. What ends the process is left out, and the others are measured in another one.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

from mctune.core.errors import MctuneError
from mctune.core.host import usable_cores
from mctune.core.remark import say
from mctune.core.target import Target
from mctune.measure.clocks import read_clocks
from mctune.measure.documents import write
from mctune.measure.gpu.contenders import Contender, contenders
from mctune.measure.gpu.goals import HEADS, Rates, goals, rows, surroundings, table
from mctune.measure.gpu.record import ALL, Record, Trying, identity, this_target
from mctune.measure.gpu.shapes import KINDS, Shape
from mctune.measure.gpu.supervise import AGAIN, COMMAND, supervise
from mctune.measure.gpu.timings import Lost, lost, measured, rates, told
from mctune.measure.gpu.tuners import time_briefly
from mctune.measure.gpu.warm import run_one, warm
from mctune.runtime.kernels.triton.tables import DEVICE

WARM_S, FAIR_S, LEAST_S = 300.0, 100.0, 20.0
"""Most seconds that compiling beforehand may take; so many that what takes longer twice is given up; fewest."""
SHARE = 0.6
"""The share of the time left that compiling beforehand may take."""
DECISIVE = 4
"""Shapes that come first, and are measured again with other kernels."""


def shapes(small: bool) -> Iterator[Shape]:
    """Every shape once, those that decide first."""
    if small:
        for kind in KINDS:
            yield Shape(kind, 1, 72 if kind == "decode" else 96, 2, 16, 32, "float16")
        return
    first = [
        Shape("training", 1, 16384, HEADS, 128, 256),
        Shape("forward", 1, 16384, HEADS, 128, 256),
        Shape("training", 1, 65536, HEADS, 128, 256),
        Shape("decode", 1, 64 * 256 + 1, HEADS, 128, 256),
    ]
    rest = [
        Shape(kind, tokens // T, T, HEADS, D, C)
        for D, C, tokens, T, kind in product(
            (128, 64), (256, 512, 128, 64), (16384, 65536), (16384, 8192, 2048, 65536), ("training", "forward")
        )
        if T <= tokens
    ]
    rest += [Shape("decode", B, 64 * 256 + 1, HEADS, D, 256) for D in (128, 64) for B in (1, 8)]
    yield from dict.fromkeys([*first, *rest])


# --- what is measured, in which order


@dataclass(frozen=True)
class Group:
    """Shapes that have their kernels in common; ``late``: what takes longest to compile, and what it is set against."""

    shapes: tuple[Shape, ...]
    late: bool = False

    def chosen(self, shape: Shape, every: Sequence[Contender], bad: Mapping[tuple[Shape, str], str]) -> list[Contender]:
        """Those of every contender that are compared at a shape."""
        late = {contender.computes for contender in every if contender.late}
        of = [one for one in every if (one.late or one.name.startswith("mctune")) and one.computes in late]
        kept = of if self.late else [one for one in every if not one.late]
        return [one for one in kept if (shape, one.name) not in bad and (shape, ALL) not in bad]


def groups(wanted: Sequence[Shape], record: Record) -> Iterator[Group]:
    """What earlier runs have not measured, what decides first."""
    first, rest = wanted[:DECISIVE], wanted[DECISIVE:]
    for of in (first, *(list(group) for _, group in groupby(rest, lambda shape: (shape.D, shape.C)))):
        yield Group(tuple(shape for shape in of if shape not in record.found or shape in record.partial))
        yield Group(tuple(shape for shape in of if shape in record.found and shape not in record.late), late=True)


@dataclass
class Pass:
    """One process's way through the groups."""

    options: argparse.Namespace
    record: Record
    target: Target
    trying: Trying
    deadline: float | None
    added: int = 0

    @property
    def left(self) -> float:
        """Seconds."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    @property
    def over(self) -> bool:
        """One shape at least, whatever compiling took: the same command again gets further."""
        return self.left <= 0 and (self.added > 0 or self.options.again)

    def run(self, wanted: Sequence[Shape]) -> None:
        """Measure what is left to be.

        Raises:
            Lost: by a fault that is recorded, and after which another process must go on.
        """
        with tempfile.TemporaryDirectory() as folder:
            for group in groups(wanted, self.record):
                plan = {shape: self._chosen(group, shape, Path(folder)) for shape in group.shapes}
                plan = {shape: chosen for shape, chosen in plan.items() if chosen}
                if self.over:
                    break
                if plan and not (group.late and SHARE * self.left < FAIR_S / 2):
                    self._measure(group, plan)

    def _chosen(self, group: Group, shape: Shape, folder: Path) -> list[Contender]:
        every = contenders(shape, self.target, self.options.package, folder)
        chosen = group.chosen(shape, every, self.record.bad)
        return chosen if not group.late or any(one.late for one in chosen) else []

    def _measure(self, group: Group, plan: dict[Shape, list[Contender]]) -> None:
        options, limit_s = self.options, min(WARM_S, max(SHARE * self.left, LEAST_S))
        say(f"compiling for {len(plan)} shapes, {usable_cores()} cores, at most {limit_s:.0f} s")
        every = [(shape, one) for shape, chosen in plan.items() for one in chosen]
        cut_off = warm(every, options.package, options.small, limit_s)
        for (shape, name), why in cut_off.items():
            if limit_s >= FAIR_S:
                self.record.leave_out(shape, {name: why}, slow=True)
        for shape, chosen in plan.items():
            if self.over:
                break
            ready = [one for one in chosen if (shape, one.name) not in cut_off]
            if not any(one.late or not group.late for one in ready):
                continue
            say(f"{shape}{', with torch.compile' if group.late else ''}")
            try:
                timings = measured(shape, ready, options.rounds, self.trying)
            except Lost as fault:
                self.record.leave_out(shape, {fault.name: fault.why})
                raise
            except Exception as error:
                self.record.leave_out(shape, {ALL: told(error)})
                if lost(error):
                    raise Lost(ALL, told(error)) from error
                continue
            partial = any((shape, one.name) not in self.record.bad for one in chosen if one not in ready)
            self.record.add(shape, timings, late=group.late, partial=partial)
            self.added += 1


def compare(given: Sequence[str]) -> int:
    """The command with these arguments: an exit status.

    Raises:
        MctuneError: if there is no GPU here, or no package where one was named.
    """
    parser = argparse.ArgumentParser(prog="mctune bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="repeats of each contender (default 15)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no further shape after this time")
    parser.add_argument("--package", type=Path, metavar="DIR", help="take the kernels from this tuned package too")
    parser.add_argument("--out", type=Path, default=Path("build/gpu/benchmark.json"), metavar="JSON",
                        help="rows for `mctune report`; beside it .jsonl, from where it goes on")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="tiny shapes: a rehearsal, whose times mean nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.one:
        shape, name, part, parts = json.loads(options.one)
        run_one(Shape(**shape), name, part, parts, options.package)
        return 0
    if options.inside:
        time_briefly()
        return run(options)
    this_target()
    return supervise([*COMMAND, *given], options.budget, options.out, identity(options.package), options.small)


def main() -> None:
    """The same with the arguments of the process."""
    try:
        raise SystemExit(compare(sys.argv[1:]))
    except MctuneError as error:
        raise SystemExit(f"mctune: error: {error}") from error


def run(options: argparse.Namespace) -> int:
    """Measure what an earlier run has not, then say and write everything: an exit status."""
    started, target, path = time.monotonic(), this_target(), options.out.with_suffix(".jsonl")
    wanted = list(shapes(options.small))
    record = Record.read(path, identity(options.package), wanted[:DECISIVE])
    say(f"{record.made_by['gpu']}: {len(record.found)} of {len(wanted)} shapes are measured already")
    reached = rates(options.small)
    say(f"bfloat16 products {reached.matrix / 1e12:.0f} TFLOP/s, copy {reached.copy / 1e9:.0f} GB/s")
    deadline = None if options.budget is None else started + options.budget
    trying, status = Trying(options.out.with_suffix(".trying")), 0
    try:
        Pass(options, record, target, trying, deadline).run(wanted)
    except Lost:
        trying.end()
        return AGAIN
    except KeyboardInterrupt:
        # Whoever asks once more would only lose what is told now.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        trying.end()
        say("interrupted: what is measured so far")
        status = 130
    if len(record.found) < len(wanted):
        say(f"{len(record.found)} of {len(wanted)} shapes are measured; the same command goes on")
    conclude(options, record, wanted, reached, target)
    return status


def conclude(
    options: argparse.Namespace, record: Record, wanted: Sequence[Shape], reached: Rates, target: Target
) -> None:
    """Tables and goals, and rows for `mctune report`."""
    found = record.everything()
    for shape in wanted:
        if shape in found:
            print(table(shape, found[shape], reached))
    for (shape, name), why in record.bad.items():
        print(f"left out: {'everything' if name == ALL else name} at {shape}: {why}")
    judged = goals(found, reached)
    for goal in judged:
        print(goal)
    made = [row.to_dict() for shape in wanted for row in rows(shape, found.get(shape, []), target, reached)]
    clocks = read_clocks() if DEVICE == "cuda" else None
    about: dict[str, Any] = {**surroundings(target), "gpu": record.made_by["gpu"]}
    about["clocks"] = asdict(clocks) if clocks else None
    if options.small:
        about["rehearsal"] = "times of an interpreter: they say nothing of the GPU"
    data = {
        "rows": made, "goals": [goal.to_dict() for goal in judged], "environment": about,
        "rates": [{"matrix_gflops": reached.matrix / 1e9, "copy_gbs": reached.copy / 1e9}],
    }  # fmt: skip
    write(options.out, data)


if __name__ == "__main__":
    main()
