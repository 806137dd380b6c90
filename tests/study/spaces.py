"""A small synthetic search: smooth, with a cliff, a failing corner and a constraint."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path

from mctune.core.config import Config
from mctune.core.outcome import Crashed, Outcome, Timed
from mctune.core.space import Choice, Pow2, SearchSpace
from mctune.study.study import run_study

SPACE = SearchSpace(
    (Pow2("BT", 8, 256), Pow2("BK", 8, 128), Pow2("unroll", 1, 16), Choice("form", ("gemm", "loop", "gather")))
)


def valid(config: Config) -> bool:
    return config.integer("BT") * config.integer("BK") <= 8192


def milliseconds(config: Config) -> float:
    bt, bk, unroll = (math.log2(config.integer(name)) for name in ("BT", "BK", "unroll"))
    form = {"gemm": 0.0, "loop": 0.25, "gather": 0.6}[str(config["form"])]
    return math.exp(0.1 * (bt - 6) ** 2 + 0.15 * (bk - 5) ** 2 + 0.05 * (unroll - 2) ** 2 + form)


def timed(ms: float) -> Timed:
    return Timed(ms, ms, ms, 1, 0.0)


def evaluate(config: Config) -> Outcome:
    if config.integer("unroll") == 16 and config["form"] == "loop":
        return Crashed("signal 11")
    return timed(milliseconds(config))


def _logged_run(url: str, log: Path, deaths: int) -> None:
    """Search, noting each evaluation in ``log``; kill this process in the middle of evaluation number ``deaths``."""

    def dying(config: Config) -> Outcome:
        with log.open("a") as file:
            file.write(config.to_json() + "\n")
        if len(log.read_text().splitlines()) == deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(config)

    result = run_study(SPACE, [valid], dying, trials=40, seed=3, storage=url)
    print(len(result.trials))


if __name__ == "__main__":
    _logged_run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
