"""How many trials a search needs with and without a warm start, replayed over spaces that are known whole.

    python benchmarks/warm_start.py record --out results/warm_start/decode-predicted.json
    python benchmarks/warm_start.py replay --out results/warm_start

``record`` compiles every configuration of TVM's decode space for GPUs that are absent, and predicts its time.
``replay`` searches each of those spaces with what did best in each of the others, and the measured space of
``exhaust_space.py`` with the winners of its neighbouring segment lengths in ``results/cpu/tuned.json``; and each of
them with nothing. A trial is a look-up. Counted is the first trial within a factor of 1.02 of the space's best.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exhaust_space import EXHAUSTED, PROBLEM
from measured_spaces import load

from mctune.backends import get_backend
from mctune.core import outcome as outcomes
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.known import Known, Machine
from mctune.core.outcome import Outcome
from mctune.core.problem import Problem
from mctune.core.space import Constraint, SearchSpace
from mctune.core.target import Target, resolve
from mctune.core.workload import Case
from mctune.report.known import read_known
from mctune.study.feasible import Feasible
from mctune.study.known import Home, seeds
from mctune.study.rules import Rule
from mctune.study.study import run_study
from mctune.workers.predicted import _Predictor

WITHIN = 1.02
MAKER = "tvm.gpu"
TARGETS = ("h100-sxm", "a100-80g")
DECODE = Problem(pass_="decode", T=16384, H=16, Dk=128, Dv=128, segment_length=256, dtype="bfloat16")
PROBLEMS = (
    DECODE,
    DECODE.replace(Dk=64, Dv=64),
    DECODE.replace(T=65536, segment_length=512),
    DECODE.replace(B=8),
    DECODE.replace(aggregation="ssc", top_k=4),
)


@dataclass(frozen=True)
class Whole:
    """A space of which everything is known; ``measured`` or predicted."""

    name: str
    problem: Problem
    machine: Machine
    backend: str
    measured: bool
    space: SearchSpace
    rules: tuple[Rule, ...]
    outcomes: Mapping[Config, Outcome]

    @property
    def best(self) -> float:
        """The shortest time, in milliseconds."""
        return min(ms for one in self.outcomes.values() if (ms := outcomes.cost(one)) is not None)

    def known(self) -> tuple[Known, ...]:
        """Every configuration that has a time."""
        timed = ((config, outcomes.cost(one)) for config, one in self.outcomes.items())
        return tuple(
            Known(config, ms, self.measured, self.name, self.problem, self.machine, self.backend)
            for config, ms in timed
            if ms is not None
        )

    def trials(self, known: tuple[Known, ...], seed: int) -> tuple[int, int]:
        """The first trial within :data:`WITHIN` of the best, counted from 1, and how many configurations seeded it."""
        home = Home(Case(self.problem, ()), self.machine, self.backend, self.measured, self.space, self.rules)
        first = [seed.config for seed in seeds(home, known)]
        found = run_study(
            self.space,
            self.rules,
            self.outcomes.__getitem__,
            trials=len(self.outcomes),
            seed=seed,
            first=first,
            start=8,
        )
        enough = self.best * WITHIN
        return next(n for n, one in enumerate(found.trials, 1) if one.ms is not None and one.ms <= enough), len(first)


def rules_of(constraints: tuple[Constraint, ...], problem: Problem, target: Target) -> tuple[Rule, ...]:
    """The constraints of a space, as the study asks them."""

    def rule(constraint: Constraint) -> Rule:
        return lambda config: constraint.holds(config, problem, target)

    return tuple(rule(constraint) for constraint in constraints)


def record(out: Path, folder: Path) -> None:
    """Compile and predict every configuration; what is in ``out`` already is not done again."""
    done: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    backend = get_backend(MAKER)
    for name in TARGETS:
        target, _ = resolve(name)
        predictor = _Predictor(backend, target, folder, 0)
        for problem in PROBLEMS:
            if any(one["target"] == name and one["problem"] == problem.to_dict() for one in done):
                continue
            space = backend.space(problem)
            feasible = Feasible(space, rules_of(space.constraints, problem, target))
            tried = [space.at(point) for point in feasible.ordered()]
            found = [(config, predictor.evaluate(problem, config, lambda _: None)) for config in tried]
            told = [{"config": c.to_dict(), "outcome": json.loads(outcomes.to_json(one))} for c, one in found]
            done.append({"target": name, "problem": problem.to_dict(), "trials": told})
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(done, separators=(",", ":")) + "\n")
            print(f"{name} {problem}: {len(found)} configurations", flush=True)


def predicted(path: Path) -> Iterator[Whole]:
    """What :func:`record` has written."""
    for one in json.loads(path.read_text()):
        target, _ = resolve(one["target"])
        problem = Problem.from_dict(one["problem"])
        space = get_backend(MAKER).space(problem)
        found = {Config.of(t["config"]): outcomes.from_dict(t["outcome"]) for t in one["trials"]}
        if not all(config in space for config in found):
            raise UsageError(f"{path} was recorded with another version of the space; remove it and record it again")
        rules = rules_of(space.constraints, problem, target)
        name = f"{one['target']}, {problem}"
        yield Whole(name, problem, Machine.of(target), "tvm", False, space, rules, found)


def measured(path: Path) -> Whole:
    """The part of the forward space that :mod:`exhaust_space` has measured, on the CPU of ``results/cpu``."""
    found = load(path)
    (about, *_) = read_known(path.parents[1] / "cpu" / "tuned.json")
    space = get_backend("tvm").space(PROBLEM).fixed(**EXHAUSTED)
    default = max(found.outcomes, key=lambda one: sum(one[name] == space.default[name] for name in one))
    space = replace(space, default=default, fallbacks=())
    assert about.machine is not None
    return Whole(
        f"cpu, {PROBLEM}", PROBLEM, about.machine, "tvm", True, space, (found.outcomes.__contains__,), found.outcomes
    )


def pairs(results: Path) -> Iterator[tuple[str, str, Whole, tuple[Known, ...]]]:
    """What is searched, what seeds it, and the spaces."""
    whole = measured(results / "search_replay" / "forward-grm-cpu.json.gz")
    table = [known for known in read_known(results / "cpu" / "tuned.json") if known.problem != PROBLEM]
    yield whole.name, "its segment lengths 64, 128, 512, measured", whole, tuple(table)
    spaces = list(predicted(results / "warm_start" / "decode-predicted.json"))
    for there in spaces:
        for source in spaces:
            if source is not there:
                yield there.name, source.name, there, source.known()


def replay(results: Path, out: Path, count: int) -> None:
    """Write ``README.md`` and ``replay.json`` from searches of every pair with ``count`` seeds each."""
    cold: dict[str, list[int]] = {}
    rows: list[dict[str, Any]] = []
    for searched, source, whole, known in pairs(results):
        if searched not in cold:
            cold[searched] = [whole.trials((), seed)[0] for seed in range(count)]
        ran = [whole.trials(known, seed) for seed in range(count)]
        rows.append(
            {
                "searched": searched, "from": source, "configurations": len(whole.outcomes), "seeded": ran[0][1],
                "cold": cold[searched], "warm": [trials for trials, _ in ran],
            }
        )  # fmt: skip
        print(f"{searched} <- {source}: {_mean(rows[-1]['cold'])} cold, {_mean(rows[-1]['warm'])} warm", flush=True)
    if not rows:
        raise UsageError(f"{results} has no space to replay")
    out.mkdir(parents=True, exist_ok=True)
    (out / "replay.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "README.md").write_text(_page(rows, count))


def _mean(trials: list[int]) -> str:
    return f"{statistics.mean(trials):.1f}"


def _page(rows: list[dict[str, Any]], count: int) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_kind(row["searched"], row["from"]), []).append(row)
    return "\n".join(
        [
            "# Warm starts replayed",
            "",
            f"The first trial within {WITHIN} of the best of the whole space, mean over pairs and {count} seeds: with "
            "nothing known (cold), and with what did best in another space (warm).",
            "Made by `python benchmarks/warm_start.py replay --out results/warm_start`; do not edit. `replay.json` has "
            "every pair.",
            "",
            "Only the CPU's space was measured. Those of GPUs are predicted by the cost model, no GPU took part, and",
            "they are small: 21 to 28 configurations of TVM's decode step, on an H100 and an A100, for five problems.",
            "Where the space's default is that good already, a search needs one trial either way.",
            "",
            "| what is known | pairs | default is enough | cold | warm | fewer | more |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(_line(kind, group) for kind, group in groups.items()),
            "",
        ]
    )


def _kind(searched: str, source: str) -> str:
    (here, problem), (there, other) = searched.split(", ", 1), source.split(", ", 1)
    if here == "cpu":
        return "CPU, 120 configurations, measured: winners of its other segment lengths"
    if problem == other:
        return "GPU, predicted: the same problem on the other GPU"
    return f"GPU, predicted: another problem on the {'same' if here == there else 'other'} GPU"


def _line(kind: str, rows: list[dict[str, Any]]) -> str:
    means = [(statistics.mean(row["cold"]), statistics.mean(row["warm"])) for row in rows]
    enough = sum(cold == 1 for cold, _ in means)
    cold, warm = (statistics.mean(mean[side] for mean in means) for side in (0, 1))
    fewer, more = sum(b < a for a, b in means), sum(b > a for a, b in means)
    return f"| {kind} | {len(rows)} | {enough} | {cold:.1f} | {warm:.1f} | {fewer} | {more} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "replay"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--folder", type=Path, default=Path("build/warm_start"), help="where kernels are built")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.what == "record":
        record(arguments.out, arguments.folder)
    else:
        replay(arguments.results, arguments.out, arguments.seeds)


if __name__ == "__main__":
    main()
