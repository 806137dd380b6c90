"""Random cases for a bounded time: in the suite, which fails at the first fault, and for hours from a shell.

The seed is printed; ``MCTUNE_FUZZ_SEED`` sets it, ``MCTUNE_FUZZ_SECONDS`` how long the suite's form takes.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import secrets
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from mctune.runtime.kernels import dispatch
from tests import compiled_before
from tests.fuzz.kernels import table

SECONDS = 10.0
Case = Callable[[random.Random], str]
"""Draws a case, checks it, and says of which kind it was; what it raises is a fault."""


@dataclass
class Report:
    """How many cases of which kind there were, and the faults: what was raised, and the number of its case."""

    kinds: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """A few lines."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        lines = [f"{sum(self.kinds.values())} cases: {kinds}", f"{len(self.faults)} kinds of faults"]
        return "\n".join([*lines, *(f"{told}\n{what}" for what, told in self.faults.items())])


def fuzz(module: str, case: Case, seconds: float, seed: int, only: int | None = None, stop: bool = True) -> Report:
    """Run cases for so long, or the one numbered ``only``; the first fault ends it if ``stop``."""
    report, number, end = Report(), 0 if only is None else only, time.monotonic() + seconds
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report.kinds[case(random.Random(f"{seed} {number}"))] += 1
        except Exception as error:
            report.kinds["faulty"] += 1
            where = f"--- python -m tests.fuzz.{module} --seed {seed} --case {number}"
            report.faults.setdefault(_short(error), f"{where}\n{error}")
            if only is not None:
                raise
            if stop or len(report.faults) >= 20:
                return report
        number += 1
        if only is not None or time.monotonic() > end:
            return report


def _short(error: Exception) -> str:
    """The same text for the same fault: where it was raised, and what."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = re.sub(r"[0-9.]+", "#", str(error))[:60]
    return f"{type(error).__name__} at {os.path.basename(frame.filename)}:{frame.lineno}: {said}"


def in_suite(module: str, case: Case) -> None:
    """A test's form: some seconds, a seed of its own, and the first fault with how to see it again."""
    seed = int(os.environ.get("MCTUNE_FUZZ_SEED") or secrets.randbelow(2**31))
    seconds = float(os.environ.get("MCTUNE_FUZZ_SECONDS") or SECONDS)
    print(f"seed {seed}")
    report = fuzz(module, case, seconds, seed)
    print(report.text)
    assert not report.faults, f"seed {seed}\n{report.text}"


def main(module: str, case: Case, on_kernels: Case) -> None:
    """The shell's form: every fault, once each, and how many cases there were."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.fuzz.{module}")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--kernels", action="store_true", help="on kernels of this CPU, compiled first")
    given = parser.parse_args()
    if given.kernels:
        dispatch.TABLE = table(compiled_before.kernels())
        case = on_kernels
    print(f"seed {given.seed}", flush=True)
    report = fuzz(module, case, 60 * given.minutes, given.seed, given.case, stop=False)
    print(report.text)
    raise SystemExit(bool(report.faults))
