"""Measure every configuration of a space on this CPU, or of each operation of a pass, to judge searches by.

    python benchmarks/exhaust_space.py backward --out results/search_replay/backward-grm-cpu.json.gz

Each one goes through what a search does to a candidate (build, verify, time, in a process that can be killed); the
builds run ahead on every core, the timings one at a time, twice in different orders: the lower median counts. The
result has the schema that ``search_replay.py`` reads: ``tune_params_keys``, ``tune_params`` and ``cache`` (values
joined by commas -> milliseconds, or why there are none). A backward's operations are measured side by side, with the
shared parameters at their defaults: each candidate has other values of every one, its record has their ``parts``, and
``blocks`` says whose parameters are whose.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mctune.backends import get_backend
from mctune.core.config import Config, Scalar
from mctune.core.environment import environment
from mctune.core.host import usable_cores
from mctune.core.outcome import Outcome, Timed, from_json, kind
from mctune.core.problem import Problem
from mctune.core.space import SearchSpace
from mctune.core.target import resolve
from mctune.workers.worker import Worker, WorkerDied

PROBLEM = Problem(T=4096, H=4, Dk=64, Dv=64, segment_length=256, aggregation="grm")


EXHAUSTED: dict[str, tuple[Scalar, ...]] = {
    "chunk": (32, 64, 128),
    "rows": (4, 8),
    "cols": (16, 32, 64),
    "unroll": (1,),
    "panel": (1, 2, 4),
    "formulation": ("per_segment", "gated"),
    "loop_order": ("rows_outer",),
    "parallel": ("segment", "head"),
    "score_rows": (8,),
    "score_lanes": (32,),
    "state_chunk": (32,),
    "state_rows": (8,),
    "state_cols": (32,),
}
"""The part of the forward space that is measured whole."""
TIMES = 2


@dataclass(frozen=True)
class Whole:
    """What is measured: a problem, and the values to which its space is cut down."""

    problem: Problem
    values: Mapping[str, Sequence[Scalar]] = field(default_factory=dict)

    def space(self) -> SearchSpace:
        """The space, or its part."""
        return get_backend("tvm").space(self.problem).fixed(**self.values)

    def configs(self) -> list[Config]:
        """Every valid configuration; of a space in blocks so many that each block's every valid values are there."""
        target, _ = resolve("cpu")
        space = self.space()
        if not self.chain:
            return [config for config in space.points() if space.valid(config, self.problem, target)]
        default = next(one for one in (space.default, *space.fallbacks) if space.valid(one, self.problem, target))
        found = []
        for block in space.chain(default):
            values = [space.param(name).values for name in block.params]
            changed = (
                default.replace(**dict(zip(block.params, own, strict=True))) for own in itertools.product(*values)
            )
            own = [config for config in changed if space.valid(config, self.problem, target)]
            random.Random(block.name).shuffle(own)
            found.append([{name: config[name] for name in block.params} for config in own])
        count = max(map(len, found))
        rows = (itertools.islice(itertools.cycle(own), count) for own in found)
        composed = [default.replace(**dict(itertools.chain(*map(dict.items, row)))) for row in zip(*rows, strict=True)]
        return [default, *(config for config in composed if space.valid(config, self.problem, target))]

    @property
    def chain(self) -> bool:
        """Whether its operations are measured side by side."""
        return self.problem.pass_ == "backward"


SPACES = {
    "forward": Whole(PROBLEM, EXHAUSTED),
    "decode": Whole(PROBLEM.replace(pass_="decode", T=16384)),
    "backward": Whole(PROBLEM.replace(pass_="backward")),
}


def build(problem: Problem, config: Config, folder: Path) -> None:
    """Compile ahead; what fails here fails again, and is recorded, when it is evaluated."""
    target, _ = resolve("cpu")
    get_backend("tvm").build(problem, config, target, folder)


def measure(problem: Problem, configs: list[Config], folder: Path) -> dict[Config, list[Outcome | str]]:
    """What became of each configuration, each time."""
    measured: dict[Config, list[Outcome | str]] = {config: [] for config in configs}
    setup = {"backend": "tvm", "target": "cpu", "folder": str(folder), "seed": 0, "threads": usable_cores()}
    with Worker("mctune.workers.evaluate:start", setup) as worker:
        for time in range(TIMES):
            for number, config in enumerate(random.Random(time).sample(configs, len(configs))):
                payload = {"evaluate": {"problem": problem.to_dict(), "config": config.to_dict()}}
                reply = worker.call(payload, 60.0)
                died = "crashed" if isinstance(reply, WorkerDied) else "timed_out"
                measured[config].append(from_json(reply["outcome"]) if isinstance(reply, dict) else died)
                if number % 50 == 0:
                    print(f"timed {number} of {len(configs)}, time {time + 1} of {TIMES}", flush=True)
    return measured


def record(outcomes: Sequence[Outcome | str]) -> dict[str, Any]:
    """The lowest median of the times, and of the operations; the first failure if there is one."""
    timed = [outcome for outcome in outcomes if isinstance(outcome, Timed)]
    if len(timed) < len(outcomes):
        failed = next(one for one in outcomes if not isinstance(one, Timed))
        return {"time": failed if isinstance(failed, str) else kind(failed)}
    medians = [outcome.ms for outcome in timed]
    told = {"time": min(medians), "times": medians}
    parts = {name: min(dict(one.parts)[name] for one in timed) for name, _ in timed[0].parts}
    return told | ({"parts": parts} if len(parts) > 1 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", choices=SPACES)
    parser.add_argument("--folder", type=Path, default=Path("build/exhausted"), help="where kernels are built")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    whole = SPACES[arguments.space]
    space, configs = whole.space(), whole.configs()
    with ProcessPoolExecutor(usable_cores()) as pool:
        builds = [pool.submit(build, whole.problem, config, arguments.folder) for config in configs]
        for number, done in enumerate(as_completed(builds), 1):
            if done.exception() is not None or number % 50 == 0:
                print(f"built {number} of {len(configs)}", done.exception() or "", flush=True)
    measured = {one: record(each) for one, each in measure(whole.problem, configs, arguments.folder).items()}
    names = [param.name for param in space.params]
    document = {
        "kernel_name": str(whole.problem),
        "environment": environment(resolve("cpu")[0]),
        "tune_params_keys": names,
        "tune_params": {param.name: list(param.values) for param in space.params},
        "cache": {",".join(str(config[name]) for name in names): told for config, told in measured.items()},
    }
    if whole.chain:
        document["blocks"] = {
            block.name: {"operations": block.operations, "params": block.params} for block in space.chain(configs[0])
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(arguments.out, "wt") as file:
        json.dump(document, file)
    timed = [told["time"] for told in measured.values() if isinstance(told["time"], float)]
    print(f"{len(timed)} of {len(configs)} have a time, best {min(timed):.3f} ms, median {np.median(timed):.3f} ms")


if __name__ == "__main__":
    main()
