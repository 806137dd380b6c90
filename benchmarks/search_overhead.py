"""What a candidate costs a search beside its evaluation: propose, claim and record it, in studies of growing length.

    python benchmarks/search_overhead.py [--postgresql URL] [--trials 10,100,1000,5000] [--out FILE.json]

The studies are filled with random valid points at once, and then go on for some candidates whose evaluation takes no
time; and what the workload `quick` searches on a CPU is searched from its beginning, to its own number of trials, two
candidates a round. Prints milliseconds a candidate (the median, and the mean of the processor's own, which other
programs on the machine lengthen less), over SQLite in a temporary directory and over the PostgreSQL database of
--postgresql, and how many statements the storage sees for each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna.trial import TrialState, create_trial
from sqlalchemy.engine import Engine
from warm_start import rules_of

from mctune.backends import get_backend
from mctune.core.config import Config
from mctune.core.outcome import Outcome, Timed, to_json
from mctune.core.space import Choice, Int, Pow2, SearchSpace
from mctune.core.target import resolve
from mctune.core.workload import load_workload
from mctune.study.record import Trial, about
from mctune.study.samplers import sampler_of, start_of
from mctune.study.samplers.points import Points
from mctune.study.storage import ABOUT, opened
from mctune.study.study import run_study

SPACE = SearchSpace(
    (
        Pow2("BT", 8, 256), Pow2("BK", 8, 128), Pow2("unroll", 1, 16), Choice("form", ("gemm", "loop", "gather")),
        Int("stages", range(1, 6)), Int("warps", (1, 2, 4, 8)), Choice("fuse", (False, True)),
        Int("segment_length", (64, 128, 256)),
    )
)  # fmt: skip
"""54,000 points, two of three of them valid."""
CANDIDATES = 12
ROUND = 2


def valid(config: Config) -> bool:
    """A tile that fits."""
    return config.integer("BT") * config.integer("BK") <= 8192


def timed(config: Config) -> Outcome:
    """A time that has something to be learned."""
    ms = 1.0 + abs(config.integer("BT") - 64) / 64 + config.integer("stages") / 8 + config.integer("unroll") / 32
    return Timed(ms, ms, ms, 1, 0.0)


def fill(url: str, name: str, count: int) -> None:
    """A study of so many evaluated candidates, written as a search writes them."""
    study = optuna.create_study(storage=opened(url, 60.0), study_name=name)
    if url.startswith("sqlite"):  # five thousand transactions need not reach the disk one by one
        sqlalchemy.event.listen(study._storage._backend.engine, "connect", _hurried)
        study._storage._backend.engine.dispose()
    study.set_user_attr(ABOUT, about(SPACE, {}))
    points = Points(SPACE, [valid]).random(np.random.default_rng(0), set(), None, count, 1 << 16)
    sampler = sampler_of("chain", SPACE, [valid], seed=0)
    for point in points:
        config = SPACE.at(point)
        outcome = timed(config)
        running = sampler.trial(study, (), point, {"config": config.to_json(), "run": "filled"})
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE, value=Trial(0, config, outcome, 1.0).ms, params=running.params,
                distributions=running.distributions, constraints={"failed": 0.0},
                user_attrs={**running.user_attrs, "seconds": 1.0, "outcome": to_json(outcome)},
            )
        )  # fmt: skip


def _hurried(connection: Any, _: object) -> None:
    connection.execute("pragma synchronous=off")


@dataclass
class Watched:
    """An evaluation that takes no time, and what the process does between one and the next."""

    outcome: Callable[[Config], Outcome]
    at_once: int = 1
    began: float = field(default_factory=time.perf_counter)
    moments: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    statements: list[int] = field(default_factory=list)
    _seen: int = 0

    def __enter__(self) -> Watched:
        sqlalchemy.event.listen(Engine, "before_cursor_execute", self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sqlalchemy.event.remove(Engine, "before_cursor_execute", self._count)

    def _count(self, *_: object) -> None:
        self._seen += 1

    def evaluate(self, config: Config) -> Outcome:
        """One outcome."""
        self.moments.append(time.perf_counter())
        self.busy.append(time.process_time())
        self.statements.append(self._seen)
        return self.outcome(config)

    def row(self) -> dict[str, float]:
        """Of all rounds but the first."""
        moments, busy, statements = (kept[:: self.at_once] for kept in (self.moments, self.busy, self.statements))
        each = [1e3 * (after - before) / self.at_once for before, after in pairwise(moments[1:])]
        count = self.at_once * len(each)
        return {
            "ms": round(statistics.median(each), 2),
            "ms_most": round(max(each), 2),
            "cpu_ms": round(1e3 * (busy[-1] - busy[1]) / count, 2),
            "statements": round((statements[-1] - statements[1]) / count, 1),
            "begin_ms": round(1e3 * (self.moments[0] - self.began), 1),
        }


def candidate(url: str, name: str, count: int) -> dict[str, float]:
    """Milliseconds and statements a candidate; and what a run costs before its first one."""
    with Watched(timed) as watched:
        run_study(
            SPACE, [valid], watched.evaluate, trials=count + CANDIDATES, storage=url, study_name=name,
            balance="segment_length",
        )  # fmt: skip
    return {"trials": count, **watched.row()}


def quick(url: str) -> Iterator[dict[str, Any]]:
    """One row for each pass of the workload at one segment length."""
    workload, (target, _), backend = load_workload("quick"), resolve("cpu"), get_backend("tvm")
    for case in workload.cases:
        if len(case.segment_lengths) > 1:
            continue
        space, trials = backend.space(case.problem), case.trials or workload.trials
        rules = rules_of(space.constraints, case.problem, target)

        def outcome(config: Config, space: SearchSpace = space) -> Outcome:
            # Times that depend on a block's values in a way that no model can learn: proposing is as dear as it gets.
            told = [(block, str([config[name] for name in block.params]).encode()) for block in space.chain(config)]
            parts = [(name, 1.0 + zlib.crc32(values) / 2**32) for block, values in told for name in block.operations]
            ms = 0.1 + sum(ms for _, ms in parts)
            return Timed(ms, ms, ms, 1, 0.0, parts=tuple(parts))

        with Watched(outcome, ROUND) as watched:
            run_study(
                space, rules, watched.evaluate, trials=trials, storage=url, study_name=str(case.problem),
                start=start_of(trials), at_once=ROUND,
            )  # fmt: skip
        yield {"problem": str(case.problem), "parameters": len(space.params), "trials": trials, **watched.row()}


def rows(url: str, lengths: list[int]) -> list[dict[str, float]]:
    """One row for each length of a study."""
    found = []
    for count in lengths:
        name = f"overhead-{count}-{os.getpid()}"
        fill(url, name, count)
        found.append(candidate(url, name, count))
        print(f"{url.partition(':')[0]:12} {found[-1]}", flush=True)
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgresql", metavar="URL")
    parser.add_argument("--trials", default="10,100,1000,5000")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lengths = [int(number) for number in arguments.trials.split(",")]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        urls = {"sqlite": f"sqlite:///{folder}/search.db"}
        if arguments.postgresql:
            urls["postgresql"] = arguments.postgresql
        found: dict[str, Any] = {name: rows(url, lengths) for name, url in urls.items()}
        found["quick"] = {name: [] for name in urls}
        for name, url in urls.items():
            for row in quick(url):
                print(f"{name:12} {row}", flush=True)
                found["quick"][name].append(row)
    found["with"] = {
        "python": platform.python_version(), "optuna": version("optuna"), "sqlalchemy": version("sqlalchemy"),
        "cores": os.cpu_count(), "sampler": "chain", "candidates": CANDIDATES,
    }  # fmt: skip
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
