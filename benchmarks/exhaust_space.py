"""Measure every configuration of a part of mctune's own forward space on this CPU, to judge searches by.

    python benchmarks/exhaust_space.py --out results/search_replay/forward-grm-cpu.json.gz

Each one goes through what a search does to a candidate (build, verify, time, in a process that can be killed); the
builds run ahead on every core, the timings one at a time. The result has the schema that ``search_replay.py`` reads:
``tune_params_keys``, ``tune_params`` and ``cache`` (values joined by commas -> milliseconds, or why there are none).
"""

from __future__ import annotations

import argparse
import gzip
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from mctune.backends import get_backend
from mctune.core.config import Config
from mctune.core.environment import environment
from mctune.core.host import usable_cores
from mctune.core.outcome import Timed, from_json, kind
from mctune.core.problem import Problem
from mctune.core.space import SearchSpace
from mctune.core.target import resolve
from mctune.workers.worker import Worker, WorkerDied

PROBLEM = Problem(T=4096, H=4, Dk=64, Dv=64, segment_length=256, aggregation="grm")


EXHAUSTED = {
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


def valid_points(space: SearchSpace) -> list[Config]:
    """Every configuration that meets the constraints."""
    target, _ = resolve("cpu")
    return [config for config in space.points() if space.valid(config, PROBLEM, target)]


def build(config: Config, folder: Path) -> None:
    """Compile ahead; what fails here fails again, and is recorded, when it is evaluated."""
    target, _ = resolve("cpu")
    get_backend("tvm").build(PROBLEM, config, target, folder)


def measure(configs: list[Config], folder: Path) -> dict[Config, float | str]:
    """Median milliseconds of each configuration, or the kind of its failure."""
    measured: dict[Config, float | str] = {}
    setup = {"backend": "tvm", "target": "cpu", "folder": str(folder), "seed": 0, "threads": usable_cores()}
    with Worker("mctune.workers.evaluate:start", setup) as worker:
        for config in configs:
            payload = {"evaluate": {"problem": PROBLEM.to_dict(), "config": config.to_dict()}}
            reply = worker.call(payload, 60.0)
            if isinstance(reply, dict):
                outcome = from_json(reply["outcome"])
                measured[config] = outcome.ms if isinstance(outcome, Timed) else kind(outcome)
            else:
                measured[config] = "crashed" if isinstance(reply, WorkerDied) else "timed_out"
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/exhausted"), help="where kernels are built")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    space = get_backend("tvm").space(PROBLEM).fixed(**EXHAUSTED)
    configs = valid_points(space)
    with ProcessPoolExecutor(usable_cores()) as pool:
        builds = [pool.submit(build, config, arguments.folder) for config in configs]
        for number, done in enumerate(as_completed(builds), 1):
            if done.exception() is not None or number % 50 == 0:
                print(f"built {number} of {len(configs)}", done.exception() or "", flush=True)
    measured = measure(configs, arguments.folder)
    names = [param.name for param in space.params]
    document = {
        "kernel_name": str(PROBLEM),
        "environment": environment(resolve("cpu")[0]),
        "tune_params_keys": names,
        "tune_params": {param.name: list(param.values) for param in space.params},
        "cache": {",".join(str(config[name]) for name in names): {"time": value} for config, value in measured.items()},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(arguments.out, "wt") as file:
        json.dump(document, file)
    timed = [value for value in measured.values() if isinstance(value, float)]
    print(f"{len(timed)} of {len(configs)} have a time, best {min(timed):.3f} ms, median {np.median(timed):.3f} ms")


if __name__ == "__main__":
    main()
