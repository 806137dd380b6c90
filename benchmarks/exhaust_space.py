"""Measure every configuration of a space on this CPU, or of each operation of a pass, to judge searches by.

    python benchmarks/exhaust_space.py backward --out results/search_replay/backward-grm-cpu.json.gz

Each one goes through what a search does to a candidate (build, verify, time, in a process that can be killed); the
builds run ahead on every core, the timings one at a time, twice in different orders: the lower median counts. The best
of so many are the luckiest, so the best seventh is timed five times more, and then those times count alone; where the
file is there already, that is all that is done.

The result has the schema that ``search_replay.py`` reads: ``tune_params_keys``, ``tune_params`` and ``cache`` (values
joined by commas -> milliseconds, or why there are none). A backward's operations are measured side by side, with the
shared parameters at their defaults: each candidate has other values of every one, its record has their ``parts``, and
``blocks`` says whose parameters are whose.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
TIMES, AGAIN = 2, 5
BEST = 7
"""One in so many is timed again."""


def side_by_side(default: Config, found: Sequence[Sequence[Mapping[str, Scalar]]]) -> list[Config]:
    """As few configurations as have all values of each block, which begin again where others have more."""
    count = max(map(len, found))
    rows = (itertools.islice(itertools.cycle(own), count) for own in found)
    return [default.replace(**{name: own[name] for own in row for name in own}) for row in zip(*rows, strict=True)]


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
        composed = side_by_side(default, found)
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


def measure(problem: Problem, configs: Sequence[Config], folder: Path, times: int) -> dict[Config, list[Outcome | str]]:
    """What became of each configuration, each time."""
    measured: dict[Config, list[Outcome | str]] = {config: [] for config in configs}
    setup = {"backend": "tvm", "target": "cpu", "folder": str(folder), "seed": 0, "threads": usable_cores()}
    with Worker("mctune.workers.evaluate:start", setup) as worker:
        for time in range(times):
            for number, config in enumerate(random.Random(time).sample(configs, len(configs))):
                payload = {"evaluate": {"problem": problem.to_dict(), "config": config.to_dict()}}
                reply = worker.call(payload, 60.0)
                died = "crashed" if isinstance(reply, WorkerDied) else "timed_out"
                measured[config].append(from_json(reply["outcome"]) if isinstance(reply, dict) else died)
                if number % 50 == 0:
                    print(f"timed {number} of {len(configs)}, time {time + 1} of {times}", flush=True)
    return measured


def record(outcomes: Sequence[Outcome | str], again: bool) -> dict[str, Any]:
    """The lowest median of the times, and of the operations; of those ``again`` their medians; or the first failure."""
    timed = [outcome for outcome in outcomes if isinstance(outcome, Timed)]
    if len(timed) < len(outcomes):
        failed = next(one for one in outcomes if not isinstance(one, Timed))
        return {"time": failed if isinstance(failed, str) else kind(failed)}
    typical = statistics.median if again else min
    medians = [outcome.ms for outcome in timed]
    told = {"time": typical(medians), "times": medians} | ({"again": True} if again else {})
    parts = {name: typical(dict(one.parts)[name] for one in timed) for name, _ in timed[0].parts}
    return told | ({"parts": parts} if len(parts) > 1 else {})


def best(space: SearchSpace, records: Mapping[Config, Mapping[str, Any]]) -> list[Config]:
    """What is timed again: the best of the configurations, or the best of each block, put together by rank."""
    timed = {config: told for config, told in records.items() if isinstance(told["time"], float)}
    default = next(iter(records))
    blocks = space.chain(default) if "parts" in timed[default] else ()
    if not blocks:
        return sorted(timed, key=lambda config: float(timed[config]["time"]))[: -(-len(timed) // BEST)]
    found = []
    for block in blocks:
        times: dict[tuple[Scalar, ...], float] = {}
        for config, told in timed.items():
            own = tuple(config[name] for name in block.params)
            taken = sum(told["parts"].get(operation, 0.0) for operation in block.operations)
            times[own] = min(taken, times.get(own, math.inf))
        ranked = sorted(times, key=lambda own: times[own])[: -(-len(times) // BEST)]
        found.append([dict(zip(block.params, own, strict=True)) for own in ranked])
    return side_by_side(default, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", choices=SPACES)
    parser.add_argument("--folder", type=Path, default=Path("build/exhausted"), help="where kernels are built")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    whole = SPACES[arguments.space]
    space, folder = whole.space(), arguments.folder
    names = [param.name for param in space.params]
    if arguments.out.exists():
        known = json.loads(gzip.decompress(arguments.out.read_bytes()))["cache"]
        records = {config: known[_key(config, names)] for config in whole.configs()}
    else:
        configs = whole.configs()
        build_all(whole.problem, configs, folder)
        records = {one: record(each, False) for one, each in measure(whole.problem, configs, folder, TIMES).items()}
        write(arguments.out, whole, records, names)
    chosen = best(space, records)
    build_all(whole.problem, chosen, folder)
    again = {one: record(each, True) for one, each in measure(whole.problem, chosen, folder, AGAIN).items()}
    write(arguments.out, whole, records | again, names)
    timed = [told["time"] for told in again.values() if isinstance(told["time"], float)]
    print(f"{len(records)} measured; of the best {len(timed)} the best takes {min(timed):.3f} ms")


def build_all(problem: Problem, configs: Sequence[Config], folder: Path) -> None:
    """Compile on every core."""
    with ProcessPoolExecutor(usable_cores()) as pool:
        builds = [pool.submit(build, problem, config, folder) for config in configs]
        for number, done in enumerate(as_completed(builds), 1):
            if done.exception() is not None or number % 50 == 0:
                print(f"built {number} of {len(configs)}", done.exception() or "", flush=True)


def write(out: Path, whole: Whole, records: Mapping[Config, Mapping[str, Any]], names: Sequence[str]) -> None:
    """The document, gzipped."""
    space = whole.space()
    document = {
        "kernel_name": str(whole.problem),
        "environment": environment(resolve("cpu")[0]),
        "tune_params_keys": names,
        "tune_params": {param.name: list(param.values) for param in space.params},
        "cache": {_key(config, names): told for config, told in records.items()},
    }
    if whole.chain:
        blocks = space.chain(next(iter(records)))
        document["blocks"] = {one.name: {"operations": one.operations, "params": one.params} for one in blocks}
    out.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(out, "wt") as file:
        json.dump(document, file)


def _key(config: Config, names: Sequence[str]) -> str:
    return ",".join(str(config[name]) for name in names)


if __name__ == "__main__":
    main()
