"""Memory Caching (arXiv:2602.24281) on a GPU beside what people use today: attention, linear attention, torch.compile.

GRM (Eq. 8-10), SSC (Eq. 16-17) and the recurrence alone by mctune's Triton kernels, against torch's causal attention,
flash-linear-attention's chunked kernels (fla-core), log-linear attention as it ships it, and torch.compile of mctune's
PyTorch path; in bfloat16, 16 heads, 16K and 64K tokens in sequences of 2K to 64K, widths 64 and 128, segments of 64 to
512: forward, forward and backward, and one decoded token.

One process, the same tensors for all, rotated order, a cold L2, clocks brought up first; medians of device time. What
mctune computes, and what is the same recurrence, is held to mctune's PyTorch path in float32 beforehand. The decisive
shapes come first. Rows are written as they come: the same command goes on where an earlier one ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from gpu_contenders import KINDS, Contender, Data, Results, Shape, contenders, eager
from gpu_report import HEADS, Rates, Timing, goals, rows, table

from mctune.backends import get_backend
from mctune.cli._output import say
from mctune.cli.bench import write
from mctune.core.environment import environment, version
from mctune.core.errors import DeviceError, MctuneError
from mctune.core.host import usable_cores
from mctune.core.outcome import Timed
from mctune.core.target import Target, resolve
from mctune.reference import error_ratio
from mctune.runtime.triton_tables import DEVICE
from mctune.search.clocks import clock_and_heat, read_clocks
from mctune.search.presence import here, seen
from mctune.search.timing import host_ms, summary, time_rotated
from mctune.search.verify import tolerance

CHECKED = 2048
"""Tokens of the first sequence that results are held to float32 on."""
UNDECIDED = 1e-3
"""Of ssc's tokens: two logits may be closer than rounding, and a right result may come from the other segment."""
WARM_S = 300
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


# --- measuring


def measured(shape: Shape, target: Target, package: Path | None, folder: Path, rounds: int) -> list[Timing]:
    """Check and time every contender that runs here; what does not is left out, with a note."""
    data, calls, errors = Data.of(shape), {}, {}
    for contender in contenders(shape, target, package, folder):
        try:
            call = contender.make(shape, data)
            results = call()
            errors[contender.name] = checked(contender, shape, data, results)
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0][:200]
            say(f"  {contender.name} left out: {type(error).__name__}: {reason}")
            if "CUDA error" in str(error):
                raise  # nothing works in this process any more
            continue
        calls[contender] = call
        del results
    times = time_rotated(list(calls.values()), rounds=rounds, limit_s=30.0, device=DEVICE)
    state = clock_and_heat(DEVICE)
    found = []
    for (contender, call), samples in zip(calls.items(), times, strict=True):
        timed = Timed(*summary(samples), len(samples), errors[contender.name], *state)
        config = contender.config(shape).to_dict() if contender.config else {}
        found.append(Timing(contender.name, contender.computes, timed, host_ms(call), config))
    return found


def checked(contender: Contender, shape: Shape, data: Data, results: Results) -> float:
    """The error of a contender; 0 of one that has nothing to be held to.

    Raises:
        MctuneError: if it is wrong, or not finite.
    """
    if not all(bool(x.isfinite().all()) for x in results.values()):
        raise MctuneError("the result is not finite")
    if not contender.computes:
        return 0.0
    # The gradients of a token depend on later ones, y does not: the first are held to the path over them alone.
    prefix = min(shape.T, max(CHECKED, 4 * shape.C))
    if shape.kind == "decode":
        whole = replace(shape, kind="forward", B=1)
        y = eager(whole, data.prefix(shape.T), contender.computes)()["y"][:, -1:]
        found, wanted = {"y": results["y"][:1]}, {"y": y}
    elif shape.kind == "forward":
        wanted = eager(replace(shape, B=1, T=prefix), data.prefix(prefix), contender.computes)()
        found = {"y": results["y"][:1, :prefix]}
    else:
        short = replace(shape, B=1, T=prefix)
        wanted = eager(short, data.prefix(prefix), contender.computes)()
        found = dict(contender.make(short, data.prefix(prefix))())
    if set(found) != set(wanted):
        raise MctuneError(f"it has {', '.join(found)}, wanted are {', '.join(wanted)}")
    error = max(error_ratio(*_decided(found[name], wanted[name], contender.computes)) for name in wanted)
    limit = tolerance(shape.problem(contender.computes))
    if not error <= limit:
        raise MctuneError(f"wrong: error {error:.2e} over {limit:.0e}")
    return error


def _decided(found: torch.Tensor, wanted: torch.Tensor, aggregation: str) -> tuple[torch.Tensor, torch.Tensor]:
    found, wanted = found.float().flatten(0, 2), wanted.float().flatten(0, 2)
    if aggregation != "ssc":
        return found, wanted
    off = (found - wanted).square().sum(-1)
    kept = off.argsort()[: off.numel() - int(UNDECIDED * off.numel())]
    return found[kept], wanted[kept]


def rates(small: bool) -> Rates:
    """The medians of a few."""
    size, count = (256, 1 << 20) if small else (8192, 1 << 28)
    dtype = torch.float32 if small else torch.bfloat16
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    source, target = (torch.zeros(count, device=DEVICE) for _ in range(2))
    product, copy = (
        summary(one)[0] / 1e3
        for one in time_rotated([lambda: a @ b, lambda: target.copy_(source)], rounds=11, device=DEVICE)
    )
    return Rates(2.0 * size**3 / product, 8.0 * count / copy)


# --- compiling beforehand, in other processes


def warm(chosen: Sequence[Shape], options: argparse.Namespace) -> None:
    """Run every contender once at every width and segment length, each in a process: what it compiles is on disk."""
    jobs: dict[tuple[Any, ...], tuple[Shape, str]] = {}
    for shape in chosen:
        for name in names(shape, options.package):
            ours = name.startswith("mctune")
            exact = shape.T if "torch.compile" in name else 0
            jobs[name, shape.kind, shape.D, shape.C if ours or exact else 0, exact] = (shape, name)

    def run(job: tuple[Shape, str]) -> None:
        shape, name = job
        if "torch.compile" not in name and shape.kind != "decode":
            shape = replace(shape, B=1, T=min(shape.T, max(4 * shape.C, 2048)))
        one = ["--one", json.dumps([asdict(shape), name])]
        package = ["--package", str(options.package)] if options.package else []
        command = [sys.executable, __file__, *one, *package, *(["--small"] if options.small else [])]
        try:
            subprocess.run(command, capture_output=True, timeout=WARM_S, check=False)
        except subprocess.TimeoutExpired:
            say(f"  {name} takes longer than {WARM_S} s to compile at {shape}")

    with ThreadPoolExecutor(max(usable_cores() - 1, 1)) as pool:
        list(pool.map(run, jobs.values()))


def names(shape: Shape, package: Path | None) -> list[str]:
    """The contenders' names at a shape."""
    return [contender.name for contender in contenders(shape, _target(), package, Path())]


def run_one(shape: Shape, name: str, package: Path | None) -> None:
    """What a process of :func:`warm` does."""
    with tempfile.TemporaryDirectory() as folder:
        contender = next(c for c in contenders(shape, _target(), package, Path(folder)) if c.name == name)
        contender.make(shape, Data.of(shape))()


def _target() -> Target:
    """This machine's GPU; for a rehearsal without one, any."""
    found = here(seen())
    if found is not None:
        return found
    if os.environ.get("TRITON_INTERPRET") == "1":
        return resolve("h200")[0]
    raise DeviceError(
        "there is no GPU here that mctune knows (`mctune targets`); TRITON_INTERPRET=1 with --small rehearses without"
    )


# --- rows, and what is said of them


def identity(package: Path | None) -> dict[str, Any]:
    """What rows depend on besides their shape: of another identity they are measured again."""
    gpu = seen()
    return {
        "gpu": gpu.name if gpu else "none: Triton's interpreter, a rehearsal",
        "backend": get_backend("triton").identity(),
        "versions": {name: version(name) for name in ("torch", "fla-core")},
        "package": json.loads((package / "manifest.json").read_text())["files"]["tuned.json"] if package else None,
    }


def read_rows(path: Path, made_by: dict[str, Any], decisive: Sequence[Shape]) -> dict[Shape, list[Timing]]:
    """The rows of an earlier run; of the decisive shapes only those with the same package, which a search improves."""
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        shape, was = Shape(**values["shape"]), values["identity"]
        if was == made_by or (shape not in decisive and {**was, "package": made_by["package"]} == made_by):
            timings = [Timing(**{**t, "timed": Timed(**t["timed"])}) for t in values["timings"]]
            found[shape] = timings
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="repeats of each contender (default 15)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no further shape after this time")
    parser.add_argument("--package", type=Path, metavar="DIR", help="take the kernels from this tuned package too")
    parser.add_argument("--out", type=Path, default=Path("build/gpu/benchmark.json"), metavar="JSON",
                        help="rows for `mctune report`; beside it .jsonl, from where it goes on")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="tiny shapes: a rehearsal, whose times mean nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        shape, name = json.loads(options.one)
        return run_one(Shape(**shape), name, options.package)
    try:
        run(options)
    except MctuneError as error:
        raise SystemExit(f"gpu.py: error: {error}") from error


def run(options: argparse.Namespace) -> None:
    """Measure what an earlier run has not, then say and write everything."""
    started, target, record = time.monotonic(), _target(), options.out.with_suffix(".jsonl")
    made_by = identity(options.package)
    wanted = list(shapes(options.small))
    found = read_rows(record, made_by, wanted[:DECISIVE])
    known = len(found)
    left = [shape for shape in wanted if shape not in found]
    say(f"{made_by['gpu']}: {len(wanted) - len(left)} of {len(wanted)} shapes are measured already")
    reached = rates(options.small)
    say(f"bfloat16 products {reached.matrix / 1e12:.0f} TFLOP/s, copy {reached.copy / 1e9:.0f} GB/s")

    def over() -> bool:
        return options.budget is not None and time.monotonic() - started > options.budget

    with tempfile.TemporaryDirectory() as folder:
        # The decisive shapes first. A group has its kernels in common, which are compiled before it.
        first = [shape for shape in left if shape in wanted[:DECISIVE]]
        rest = groupby(left[len(first) :], lambda shape: (shape.D, shape.C))
        groups = [first, *(list(group) for _, group in rest)]
        for group in groups:
            if over() and len(found) > known:
                break
            if group:
                say(f"compiling for {len(group)} shapes, {usable_cores()} cores")
                warm(group, options)
            for shape in group:
                # One at least, whatever compiling took: the same command again gets further.
                if over() and len(found) > known:
                    break
                say(str(shape))
                timings = measured(shape, target, options.package, Path(folder), options.rounds)
                found[shape] = timings
                record.parent.mkdir(parents=True, exist_ok=True)
                line = {"shape": asdict(shape), "timings": [asdict(t) for t in timings], "identity": made_by}
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    if len(found) < len(wanted):
        say(f"the time is over with {len(found)} of {len(wanted)} shapes; the same command goes on")
    for shape in wanted:
        if shape in found:
            print(table(shape, found[shape], reached))
    judged = goals(found, reached)
    for goal in judged:
        print(f"{'met   ' if goal['met'] else 'MISSED'} {goal['figure']:.2f} {goal['name']}, {goal['wanted']:g} wanted")
    made = [row.to_dict() for shape in wanted for row in rows(shape, found.get(shape, []), target, reached)]
    clocks = read_clocks() if DEVICE == "cuda" else None
    about = {**environment(target), "gpu": made_by["gpu"], "clocks": asdict(clocks) if clocks else None}
    if options.small:
        about["rehearsal"] = "times of an interpreter: they say nothing of the GPU"
    data = {
        "rows": made, "goals": judged, "environment": about,
        "rates": [{"matrix_gflops": reached.matrix / 1e9, "copy_gbs": reached.copy / 1e9}],
    }  # fmt: skip
    write(options.out, data)


if __name__ == "__main__":
    main()
