"""What a candidate costs a search beside its evaluation: propose, claim and record it, in studies of growing length.

    python benchmarks/search_overhead.py [--postgresql URL] [--trials 10,100,1000,5000] [--out FILE.json]

The studies are filled with random valid points at once, and then go on for some candidates whose evaluation takes no
time. Prints the median milliseconds a candidate, over SQLite in a temporary directory and over the PostgreSQL database
of --postgresql, and how many statements the storage sees for each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna.trial import TrialState, create_trial
from sqlalchemy.engine import Engine

from mctune.core.config import Config
from mctune.core.outcome import Outcome, Timed, to_json
from mctune.core.space import Choice, Int, Pow2, SearchSpace
from mctune.study.record import ATTRS, Trial, about
from mctune.study.samplers import sampler_of
from mctune.study.samplers.points import Points
from mctune.study.storage import opened
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
    study.set_user_attr(ATTRS, about(SPACE, {}))
    points = Points(SPACE, [valid]).random(np.random.default_rng(0), set(), None, count, 1 << 16)
    sampler = sampler_of("mix", SPACE, [valid], seed=0)
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


def candidate(url: str, name: str, count: int) -> dict[str, float]:
    """Milliseconds and statements a candidate; and what a run costs before its first one."""
    statements, moments, counts = 0, [], []

    def count_one(*_: object) -> None:
        nonlocal statements
        statements += 1

    def evaluate(config: Config) -> Outcome:
        moments.append(time.perf_counter())
        counts.append(statements)
        return timed(config)

    sqlalchemy.event.listen(Engine, "before_cursor_execute", count_one)
    began = time.perf_counter()
    run_study(
        SPACE, [valid], evaluate, trials=count + CANDIDATES, storage=url, study_name=name, balance="segment_length"
    )
    sqlalchemy.event.remove(Engine, "before_cursor_execute", count_one)
    each = [1e3 * (after - before) for before, after in pairwise(moments[1:])]
    return {
        "trials": count,
        "ms": round(statistics.median(each), 2),
        "ms_most": round(max(each), 2),
        "statements": (counts[-1] - counts[1]) / (len(counts) - 2),
        "begin_ms": round(1e3 * (moments[0] - began), 1),
    }


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
    found["with"] = {
        "python": platform.python_version(), "optuna": version("optuna"), "sqlalchemy": version("sqlalchemy"),
        "cores": os.cpu_count(), "sampler": "mix", "candidates": CANDIDATES,
    }  # fmt: skip
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
