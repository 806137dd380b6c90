"""Deep memories (arXiv:2602.24281, Eq. 30-31 and 34-36) on this CPU: a forward pass and a training step, beside torch.

dla and titans with dense GRM (Eq. 8-10), sparse SSC (Eq. 16-17, top 4) and soup (Eq. 14-15) at B1 H4 D64 E256 T4096,
segments of 256, inner chunks of 16 and of 64, float32: the kernels, and mctune's eager path. At a quarter of the tokens
also what one writes with `vmap(grad)` of torch.func, which forms the state of every token. Each is held to a float64
reference first. One process, rotated order, cold caches, as many threads as cores; times are medians. Counted are the
operations that the problem needs (`mctune.core.work`; a step is three forwards), and torch's sgemm in the same rounds.
Then the peak of what each allocates during one step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from training import peak_bytes

from mctune.backends.registry import computes
from mctune.backends.tvm import TvmBackend
from mctune.cli._output import say, text_table
from mctune.core.config import Config
from mctune.core.errors import MctuneError
from mctune.core.outcome import Timed
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.core.winner import Winner
from mctune.core.work import work
from mctune.emit import emit_package
from mctune.measure.bench import Contender, Result, baselines, eager, fraction_of_bound, measure, run_of, threads
from mctune.measure.documents import document, write
from mctune.verify.inputs import make_inputs
from mctune.verify.package import find_entry, load_package

GRM = Problem(recurrence="dla", aggregation="grm", T=4096, H=4, Dk=64, Dv=64, segment_length=256)
READS = (GRM, GRM.replace(aggregation="ssc", top_k=4), GRM.replace(aggregation="soup"))
ALL = tuple(read.replace(recurrence=recurrence) for recurrence in ("dla", "titans") for read in READS)
FORWARDS = tuple(problem.replace(inner_chunk=b) for problem in ALL for b in (16, 64))
STEPS = tuple(problem.replace(pass_="backward") for problem in ALL)
BESIDE = tuple(one.replace(pass_=pass_, T=1024) for one in (ALL[0], ALL[4]) for pass_ in ("forward", "backward"))
"""What is set against `vmap(grad)` too."""
KERNEL = "tvm"


@dataclass(frozen=True)
class Found:
    """One problem: times, and the most bytes that each contender of a step had allocated at once."""

    result: Result
    peaks: dict[str, int]


def kernels(problem: Problem, target: Target, package: Path | None, folder: Path) -> ModuleType | None:
    """The package whose kernels serve the problem, else one with the space's first valid ones; ``None`` without any."""
    passes = ("forward", "backward") if problem.pass_ == "backward" else ("forward",)
    cases = [problem.replace(pass_=pass_) for pass_ in passes]
    if package is not None:
        module = load_package(package)
        if all(find_entry(module, case, "cpu", KERNEL) for case in cases):
            return module
        say(f"{package} has no kernel for {problem}; one is built")
    for case in cases:
        if not computes(KERNEL, case):
            say(f"no kernel: {computes(KERNEL, case).reason}")
            return None
    winners = [_built(case, target, folder / "work") for case in cases]
    return load_package(emit_package(folder / f"bench_{problem.key}", target, winners))


def _built(problem: Problem, target: Target, folder: Path) -> Winner:
    backend = TvmBackend()
    space = backend.space(problem)
    config = space.first_valid(lambda candidate: space.valid(candidate, problem, target))
    assert config is not None
    built, unmeasured = backend.build(problem, config, target, folder), Timed(1.0, 1.0, 1.0, 0, 0.0)
    return Winner(problem, config, unmeasured, KERNEL, "cpu", built.library, built.source, None, (), True, {})


def bench(problem: Problem, package: Path | None, rounds: int, folder: Path, beside: bool) -> Found:
    """Build or load the kernels, then measure."""
    target, _ = resolve("cpu")
    say(str(problem))
    with threads(target.cores):
        module, config = kernels(problem, target, package, folder), Config.of({})
        contenders = baselines(problem) if beside else [eager(problem)]
        if module is not None:
            contenders.insert(0, Contender(KERNEL, problem, run_of(module.memory_caching, KERNEL)))
            entry = find_entry(module, problem, "cpu", KERNEL)
            config = Config.of(entry.record["config"]) if entry is not None else config
        measured = measure(contenders, rounds=rounds, note=say)
        times, peaks, step = dict(measured.times), dict[str, int](), ""
        if problem.pass_ == "backward":
            inputs, step = make_inputs(problem, 0), " step"
            peaks = {c.name: peak_bytes(lambda c=c: c.run(problem, inputs)) for c in contenders if c.name in times}
    first = contenders[0].name
    return Found(Result(problem, first + step, config, times.pop(first), times, measured.rates), peaks)


def table(found: Found) -> str:
    """One line a contender."""
    result, problem = found.result, found.result.problem
    counted, first = work(problem).operations, result.backend.removesuffix(" step")
    lines = [
        (
            name,
            f"{timed.ms:.1f}",
            f"{timed.low:.1f} to {timed.high:.1f}",
            f"{timed.ms / result.timed.ms:.2f}",
            f"{counted / timed.ms / 1e6:.1f}",
            f"{counted / timed.ms * 1e3 / result.rates.sgemm:.1%}",
            f"{fraction_of_bound(problem, timed.ms, result.rates):.1%}",
            f"{found.peaks[name] / 2**20:.1f}" if name in found.peaks else "",
            f"{timed.error:.1e}",
        )
        for name, timed in [(first, result.timed), *sorted(result.baselines.items(), key=lambda item: item[1].ms)]
    ]
    title = str(problem).replace("backward", "forward + backward", 1)
    header = (title, "ms", "20% to 80%", f"of {first}", "GFLOP/s", "of sgemm", "of the bound", "peak MiB", "error")
    return text_table(header, lines)


def said(all_: Sequence[Found]) -> str:
    """What all were measured beside."""
    rates = [found.result.rates for found in all_]
    reached = ", ".join(f"{rate.sgemm / 1e9:.0f}" for rate in rates)
    return f"torch's sgemm in the same rounds: {reached} GFLOP/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="repeats of each contender (default 9)")
    parser.add_argument("--tokens", type=int, help="of every problem, instead of 4096 and 1024")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the figures here; `mctune report` reads it")
    parser.add_argument("--package", type=Path, metavar="DIR", help="take the kernels from this tuned package")
    options = parser.parse_args()
    tokens = {"T": options.tokens} if options.tokens else {}
    found = []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for one in (*FORWARDS, *STEPS, *BESIDE):
                beside = one in BESIDE
                problem = one.replace(**tokens)
                found.append(bench(problem, options.package, options.rounds, Path(scratch), beside))
                print(table(found[-1]), end="\n\n", flush=True)
    except MctuneError as error:
        raise SystemExit(f"deep.py: error: {error}") from error
    print(said(found))
    if options.out is not None:
        data: dict[str, Any] = document(resolve("cpu")[0], [one.result for one in found])
        peaks = [{"problem": str(one.result.problem), "bytes": one.peaks} for one in found if one.peaks]
        write(options.out, {**data, "peaks": peaks})


if __name__ == "__main__":
    main()
