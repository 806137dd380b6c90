"""Replay searches over measured spaces: the study code of mctune, with a look-up in place of build, verify and time.

    python benchmarks/search_replay.py SPACE.json[.gz] ... [--samplers mix,gp@100x5] [--seeds 30] [--out DIR] [--json]

A sampler is a name or module:Class; with @EVALUATIONS or @EVALUATIONSxSEEDS it gets no more of either than that, for
those that think for long. With --out every search is appended to DIR/runs.jsonl when it is done, and not run again: the
same command goes on where it was interrupted.

A file is one space: {"tune_params_keys": [names], "tune_params": {name: [values]}, "cache": {"v1,v2,...": {"time": ms
or the name of a failure, "times": [ms, ...]}}}, plain or gzipped. A configuration that is not in the cache breaks the
space's constraints. One whose time is a string is a recorded failure and counts as an evaluation. Prints best found /
optimum (1 = optimum) at several budgets of unique evaluations, over seeds.

A file with {"blocks": {name: {"operations": [names], "params": [names]}}}, whose records have "parts" by operation, is
a pass whose operations were measured, and the space is all that their values make together: a configuration's time is
the sum of what its blocks took, and of what none did. FILE#BLOCK is the space of one block alone.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate, product
from pathlib import Path
from typing import Any

from measured_spaces import Measured, load

from mctune.core.errors import MctuneError, UsageError
from mctune.study.events import SAMPLERS, check_sampler
from mctune.study.samplers import start_of
from mctune.study.study import run_study


@dataclass(frozen=True)
class Entrant:
    """A sampler, and the evaluations and seeds that it gets."""

    sampler: str
    trials: int
    seeds: range

    @classmethod
    def of(cls, text: str, trials: int, seeds: range) -> Entrant:
        """``text`` is NAME, NAME@EVALUATIONS or NAME@EVALUATIONSxSEEDS."""
        name, _, limits = text.partition("@")
        check_sampler(name)
        most, _, count = limits.partition("x")
        if not all(part.isdigit() and int(part) for part in (most or "1", count or "1")):
            raise UsageError(f"{text!r}: write NAME, NAME@EVALUATIONS or NAME@EVALUATIONSxSEEDS")
        return cls(name, min(int(most or trials), trials), seeds[: int(count)] if count else seeds)


@dataclass(frozen=True)
class Replay:
    """One search: best found / optimum after each evaluation (infinite before the first time), what it did.

    ``seconds`` are the processor's, so that other work on the machine does not show; 0 where they were not taken.
    """

    curve: tuple[float, ...]
    failures: int
    stopped: str
    seconds: float

    def to_json(self, about: Mapping[str, Any]) -> str:
        """One line: what it is ``about``, and where the curve falls."""
        falls = [(n, ratio) for n, ratio in enumerate(self.curve) if n == 0 or ratio < self.curve[n - 1]]
        told = {"falls": falls, "length": len(self.curve), "failures": self.failures}
        return json.dumps({**about, **told, "stopped": self.stopped, "seconds": round(self.seconds, 3)})

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Replay:
        """The inverse."""
        falls = dict(told["falls"])
        curve = tuple(accumulate((falls.get(n, math.inf) for n in range(told["length"])), min))
        return cls(curve, told["failures"], told["stopped"], told["seconds"])


def replay(measured: Measured, sampler: str, seed: int, trials: int) -> Replay:
    """Search ``measured`` with ``trials`` unique evaluations."""
    started = time.process_time()
    result = run_study(
        measured.space,
        measured.rules,
        measured.outcomes.__getitem__,
        trials=trials,
        sampler=sampler,
        seed=seed,
        start=start_of(trials),
    )
    seconds = time.process_time() - started
    if len({trial.config for trial in result.trials}) != len(result.trials):
        raise AssertionError(f"{measured.name}, {sampler}, seed {seed}: a configuration was evaluated twice")
    curve, lowest = [], math.inf
    for trial in result.trials:
        lowest = min(lowest, math.inf if trial.ms is None else trial.ms)
        curve.append(lowest / measured.optimum)
    return Replay(tuple(curve), sum(trial.ms is None for trial in result.trials), result.stopped, seconds)


def replays(
    spaces: Sequence[Measured], entrants: Sequence[Entrant], kept: Path | None, only_kept: bool = False
) -> dict[tuple[str, str], list[Replay]]:
    """Every search, seed by seed, by space and sampler; those in the file ``kept`` are not run again.

    With ``only_kept`` no other is run at all.
    """
    known = {}
    if kept is not None and kept.exists():
        for line in kept.read_text().splitlines():
            told = json.loads(line)
            known[told["space"], told["sampler"], told["seed"], told["trials"]] = Replay.from_json(told)
    done: dict[tuple[str, str], list[Replay]] = {}
    for seed in sorted({seed for entrant in entrants for seed in entrant.seeds}):
        for measured, entrant in product(spaces, entrants):
            if seed not in entrant.seeds:
                continue
            about = {"space": measured.name, "sampler": entrant.sampler, "seed": seed, "trials": entrant.trials}
            run = known.get(tuple(about.values()))  # type: ignore[arg-type]
            if run is None and only_kept:
                continue
            if run is None:
                run = replay(measured, entrant.sampler, seed, entrant.trials)
                print(f"{about} {run.curve[-1]:.4f} of the optimum in {run.seconds:.1f} s", file=sys.stderr, flush=True)
                if kept is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    with kept.open("a") as file:
                        file.write(run.to_json(about) + "\n")
            done.setdefault((measured.name, entrant.sampler), []).append(run)
    return done


def summary(space: str, sampler: str, runs: Sequence[Replay], budgets: Sequence[int]) -> list[dict[str, Any]]:
    """One row a budget that the sampler got, over the seeds; a search that exhausted its space keeps its last value."""
    rows = []
    timed = [run for run in runs if run.seconds]
    for budget in budgets:
        if not any(len(run.curve) >= budget or run.stopped == "exhausted" for run in runs):
            continue
        ratios = sorted(run.curve[min(budget, len(run.curve)) - 1] for run in runs)
        rows.append(
            {
                "space": space,
                "sampler": sampler,
                "budget": budget,
                "seeds": len(ratios),
                "mean": statistics.fmean(ratios),
                "deviation": statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
                "median": statistics.median(ratios),
                "p95": ratios[math.ceil(0.95 * len(ratios)) - 1],
                "worst": ratios[-1],
                "optimum_found": sum(ratio == 1.0 for ratio in ratios),
                "ms_per_proposal": 1e3
                * sum(run.seconds for run in timed)
                / max(1, sum(len(run.curve) for run in timed)),
                "failures": statistics.fmean(run.failures for run in runs),
                "finished": sum(len(run.curve) >= budget or run.stopped == "exhausted" for run in runs),
            }
        )
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table. What a sampler is above the first one is the difference of the means, with its 95% interval."""
    first = {(r["space"], r["budget"]): r for r in reversed(rows)}
    lines = [
        "| space | sampler | evaluations | mean | deviation | above the first | median | 95% | worst | optimum found | "
        "seeds finished |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['space']} | {r['sampler']} | {r['budget']} | {r['mean']:.4f} | {r['deviation']:.4f} | "
            f"{above(r, first[r['space'], r['budget']])} | {r['median']:.4f} | {r['p95']:.4f} | "
            f"{r['worst']:.4f} | {r['optimum_found']} of {r['seeds']} | {r['finished']} of {r['seeds']} |"
        )
    return "\n".join(lines)


def above(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """By how much a mean is above another: the difference, and half of its 95% interval if both have several seeds."""
    if row is first:
        return ""
    gap = row["mean"] - first["mean"]
    if min(row["seeds"], first["seeds"]) < 2:
        return f"{gap:+.4f}"
    free = min(row["seeds"], first["seeds"]) - 1
    student = 1.96 + 2.37 / free + 2.82 / free**2  # its 97.5% quantile; 3% short with three degrees of freedom
    half = student * math.hypot(*(r["deviation"] / math.sqrt(r["seeds"]) for r in (row, first)))
    return f"{gap:+.4f} ± {half:.4f}"


def document(rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """The rows and what made them."""
    names = [Path(file).name for file in arguments.files]
    again = ["python", "benchmarks/search_replay.py", *names, "--samplers", ",".join(arguments.samplers)]
    again += ["--seeds", str(arguments.seeds), "--first-seed", str(arguments.first_seed)]
    again += ["--budgets", ",".join(map(str, arguments.budgets))]
    used = ("optuna", "numpy", *(("torch", "scipy") if "gp" in _names(rows) else ()))
    used += ("cmaes",) if "cmaes" in _names(rows) else ()
    again += ["--kept"] if arguments.kept else []
    return {
        "command": shlex.join(again),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in used}},
        "rows": list(rows),
    }


def _names(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    return {row["sampler"] for row in rows}


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """``replay.json`` and ``README.md`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "replay.json").write_text(json.dumps(content, indent=1) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    shown = folder.name if folder.is_absolute() else folder
    spent = sorted({(r["sampler"], r["space"], r["ms_per_proposal"]) for r in content["rows"] if r["ms_per_proposal"]})
    cost = "; ".join(f"{sampler} on {space} {ms:.1f}" for sampler, space, ms in spent)
    (folder / "README.md").write_text(
        "# Search replayed over measured spaces\n\n"
        "Best found / optimum (1 = the space's optimum) after so many unique evaluations, failures included, over "
        "seeds. Made by the command below; do not edit.\n\n"
        f"    {content['command']} --out {shown}\n\n{versions}\n\n{markdown(content['rows'])}\n"
        + (
            f"\nMilliseconds of one processor a candidate, proposal and bookkeeping in memory together: {cost}.\n"
            if cost
            else ""
        )
    )


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="measured spaces, .json or .json.gz")
    parser.add_argument("--samplers", type=_list, default=list(SAMPLERS), help=f"of {', '.join(SAMPLERS)}")
    parser.add_argument("--budgets", type=lambda s: sorted(map(int, _list(s))), default=[50, 100, 150, 200])
    parser.add_argument("--seeds", type=int, default=30, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write runs.jsonl, replay.json and README.md into this folder")
    parser.add_argument("--kept", action="store_true", help="the table of the searches in DIR/runs.jsonl; run no more")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table on stdout")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _arguments(argv)
    if arguments.seeds < 1 or not arguments.budgets or arguments.budgets[0] < 1:
        print("--seeds and --budgets must be at least 1", file=sys.stderr)
        return 2
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    kept = None if arguments.out is None else arguments.out / "runs.jsonl"
    try:
        entrants = [Entrant.of(text, arguments.budgets[-1], seeds) for text in arguments.samplers]
        done = replays([load(file) for file in arguments.files], entrants, kept, arguments.kept)
    except MctuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    rows = [row for (space, sampler), runs in done.items() for row in summary(space, sampler, runs, arguments.budgets)]
    content = document(rows, arguments)
    print(json.dumps(content, indent=1) if arguments.json else markdown(rows))
    if arguments.out is not None:
        write(arguments.out, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
