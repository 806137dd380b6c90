"""A training step of Memory Caching (arXiv:2602.24281) on this CPU, forward and backward, against the best of torch.

Dense GRM (Eq. 8-10) and sparse SSC (Eq. 16-17, top 4) at B1 H4 D64 T4096 and segments of 256, two threads, float32: the
tuned kernels through autograd as a model runs them, beside mctune's eager path under autograd, torch.compile of it, and
a loop over segments written in torch, as it is and compiled. The gradients of all are held to the float64 oracle first.
One process, rotated order, cold caches; times are medians. Then the peak of what each allocates during one step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forward import DENSE, SPARSE, Goal, fitting, loop

from mctune.backends.tvm import TvmBackend
from mctune.cli._output import say, text_table
from mctune.core.config import Config
from mctune.core.errors import MctuneError
from mctune.core.outcome import Timed
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.core.winner import Winner
from mctune.emit import emit_package
from mctune.measure.bench import Contender, Result, measure, threads
from mctune.measure.documents import document, write
from mctune.runtime.api.functional import memory_caching
from mctune.verify.inputs import Inputs, make_inputs
from mctune.verify.judge import Run
from mctune.verify.package import load_package
from mctune.verify.passes import Results

GRM = Problem(aggregation="grm", pass_="backward", T=4096, H=4, Dk=64, Dv=64, segment_length=256)
SSC = GRM.replace(aggregation="ssc", top_k=4)
FASTER_THAN_TORCH = 1.5

Tensor = torch.Tensor
Operation = Callable[[Problem, Mapping[str, Tensor]], Tensor]
"""y of q, k, v, u."""


@dataclass(frozen=True)
class Step:
    """One problem: the times of a step, and the most bytes that each contender had allocated at once."""

    result: Result
    peaks: dict[str, int]

    def goals(self) -> list[Goal]:
        """What is wanted of the figures, and what they are."""
        name = self.result.problem.aggregation
        baselines = {other: timed for other, timed in self.result.baselines.items() if not other.startswith("loop")}
        best = min(baselines, key=lambda other: baselines[other].ms)
        leanest = min((other for other in self.peaks if other in baselines), key=lambda other: self.peaks[other])
        ours = self.peaks["tvm"]
        return [
            Goal(
                f"times as fast a {name} step as the best of autograd and torch.compile",
                FASTER_THAN_TORCH,
                baselines[best].ms / self.result.timed.ms,
                f"{best} {baselines[best].ms:.1f} ms, kernels {self.result.timed.ms:.1f} ms",
            ),
            Goal(
                f"times the peak memory of the {name} kernels, the leaner of the two",
                1.0,
                self.peaks[leanest] / ours,
                f"{leanest} {self.peaks[leanest] / 2**20:.1f} MiB, kernels {ours / 2**20:.1f} MiB",
            ),
        ]


def step(operation: Operation) -> Run:
    """A forward and a backward; the gradients of q, k, v and u."""

    def run(problem: Problem, inputs: Inputs) -> Results:
        leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in "qkvu"}
        with torch.enable_grad():
            operation(problem, leaves).backward(inputs.dy)
        return {f"d{name}": leaf.grad for name, leaf in leaves.items()}

    return run


def whole(function: Callable[..., Tensor], backend: str) -> Operation:
    """``memory_caching`` with every option of the problem."""

    def run(problem: Problem, leaves: Mapping[str, Tensor]) -> Tensor:
        top_k = {"top_k": problem.top_k} if problem.top_k else {}
        return function(
            **leaves, aggregation=problem.aggregation, segment_length=problem.segment_length, backend=backend, **top_k
        )

    return run


def baselines(problem: Problem) -> list[Contender]:
    """What torch can do: eager autograd, torch.compile, and for dense GRM the hand-written loop."""
    found = [
        Contender("eager", problem, step(whole(memory_caching, "eager"))),
        Contender("torch.compile", problem, step(whole(torch.compile(memory_caching), "eager")), optional=True),
    ]
    if problem.aggregation == "grm":
        for name, form in (("loop", loop), ("loop, torch.compile", torch.compile(loop))):

            def run(case: Problem, x: Mapping[str, Tensor], form: Callable[..., Tensor] = form) -> Tensor:
                return form(x["q"], x["k"], x["v"], x["u"], case.segment_length)

            found.append(Contender(name, problem, step(run), optional=True))
    return found


def kernels(problem: Problem, target: Target, folder: Path) -> Path:
    """A package with a forward and a backward kernel of good configurations, for where there is no tuned one."""
    backend = TvmBackend()
    forward = problem.replace(pass_="forward")
    winners = []
    for case, config in (
        (forward, fitting(SPARSE if problem.aggregation == "ssc" else DENSE, target)),
        (problem, _valid(backend, problem, target)),
    ):
        built = backend.build(case, config, target, folder / "work")
        unmeasured = Timed(1.0, 1.0, 1.0, 0, 0.0)
        winners.append(Winner(case, config, unmeasured, "tvm", "cpu", built.library, built.source, None, (), True, {}))
    return emit_package(folder / f"bench_{problem.aggregation}", target, winners)


def _valid(backend: TvmBackend, problem: Problem, target: Target) -> Config:
    space = backend.space(problem)
    config = space.first_valid(lambda candidate: space.valid(candidate, problem, target))
    assert config is not None
    return config


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had given out at once during a second run."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def bench(problem: Problem, package: Path | None, rounds: int) -> Step:
    """Build or load the kernels, then measure."""
    target, _ = resolve("cpu")
    with tempfile.TemporaryDirectory() as scratch, threads(target.cores):
        module = load_package(package or kernels(problem, target, Path(scratch)))
        contenders = [Contender("tvm", problem, step(whole(module.memory_caching, "tvm"))), *baselines(problem)]
        say(f"{problem}: compiling the torch forms")
        measured = measure(contenders, rounds=rounds, note=say)
        times = dict(measured.times)
        inputs = make_inputs(problem, 0)
        peaks = {c.name: peak_bytes(lambda c=c: c.run(problem, inputs)) for c in contenders if c.name in times}
        entry = module.runtime.kernels.dispatch.TABLE.entries[-1] if package is None else None
        config = Config.of(entry.record["config"]) if entry is not None else Config.of({})
    return Step(Result(problem, "tvm step", config, times.pop("tvm"), times, measured.rates), peaks)


def table(found: Step) -> str:
    """One line a contender."""
    result = found.result
    lines = [
        (
            name,
            f"{timed.ms:.1f}",
            f"{timed.low:.1f} to {timed.high:.1f}",
            f"{timed.ms / result.timed.ms:.2f}",
            f"{found.peaks.get(label, 0) / 2**20:.1f}",
            f"{timed.error:.1e}",
        )
        for name, label, timed in [
            ("mctune, tvm kernels", "tvm", result.timed),
            *sorted(((n, n, t) for n, t in result.baselines.items()), key=lambda item: item[2].ms),
        ]
    ]
    title = str(result.problem).replace("backward", "forward + backward", 1)
    return text_table((title, "ms", "20% to 80%", "of kernels", "peak MiB", "error"), lines)


def said(steps: Sequence[Step]) -> str:
    """Everything for a person to read."""
    parts = [table(found) for found in steps]
    goals = [goal for found in steps for goal in found.goals()]
    lines = [
        f"{'met   ' if goal.met else 'MISSED'} {goal.figure:.2f} {goal.name}, {goal.wanted:g} wanted ({goal.explained})"
        for goal in goals
    ]
    return "\n\n".join(parts) + "\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="repeats of each contender (default 15)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the figures here; `mctune report` reads it")
    parser.add_argument("--package", type=Path, metavar="DIR", help="take the kernels from this tuned package")
    options = parser.parse_args()
    try:
        steps = [bench(problem, options.package, options.rounds) for problem in (GRM, SSC)]
    except MctuneError as error:
        raise SystemExit(f"training.py: error: {error}") from error
    print(said(steps))
    if options.out is not None:
        data: dict[str, Any] = document(resolve("cpu")[0], [found.result for found in steps])
        peaks = [{"problem": str(found.result.problem), "bytes": found.peaks} for found in steps]
        goals = [goal.to_dict() for found in steps for goal in found.goals()]
        write(options.out, {**data, "peaks": peaks, "goals": goals})


if __name__ == "__main__":
    main()
