"""Plant faults on a right kernel and count those that a search would have taken for right.

Candidates run in the worker of a search, in random order, right ones among them; what is recorded as right is held as
finalists are, and what then still stands is counted as a wrong winner. Ends with status 1 if there is one, if a right
candidate was refused, or if a process was left behind::

    python benchmarks/planted_faults.py --evaluations 10000 --workers 2 --out build/planted.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLANTED = ROOT / "tests" / "planted"
sys.path.insert(0, str(PLANTED))

from faults import HARMFUL, SLOW, WRONG  # noqa: E402
from planted_backend import problem  # noqa: E402

from mctune.core.outcome import Predicted, Timed, from_json, kind  # noqa: E402
from mctune.workers.worker import Worker  # noqa: E402

LIMIT_S, SLOW_LIMIT_S = 120.0, 3.0
MEMORY = 512 << 20
RIGHT_SHARE, SLOW_SHARE = 0.2, 0.01
MARK = "mctune-planted"


class Tally:
    """What became of every kind of candidate."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.seconds = 0.0
        self.lock = threading.Lock()

    def add(self, fault: str, *what: str) -> None:
        with self.lock:
            self.outcomes[fault].update(what)

    @property
    def evaluations(self) -> int:
        return sum(counts["evaluated"] for counts in self.outcomes.values())

    def wrong(self, what: str) -> int:
        return sum(counts[what] for fault, counts in self.outcomes.items() if fault in WRONG)

    @property
    def refused(self) -> int:
        counts = self.outcomes["none"]
        return counts["evaluated"] - counts["kept"]

    def to_dict(self) -> dict[str, Any]:
        return {
            "evaluations": self.evaluations,
            "seconds": round(self.seconds, 1),
            "wrong_candidates": self.wrong("accepted"),
            "wrong_winners": self.wrong("kept"),
            "right_refused": self.refused,
            "kinds": {fault: dict(sorted(counts.items())) for fault, counts in sorted(self.outcomes.items())},
        }


def draw(rng: random.Random, kinds: Sequence[str]) -> str:
    """A fault of ``kinds``: mostly one that must be found out, sometimes none."""
    chance = rng.random()
    if chance < RIGHT_SHARE:
        return "none"
    slow = [fault for fault in SLOW if fault in kinds]
    if slow and chance < RIGHT_SHARE + SLOW_SHARE:
        return rng.choice(slow)
    return rng.choice([fault for fault in kinds if fault not in SLOW and fault != "none"])


def one(worker: Worker, fault: str, seed: int, tally: Tally) -> None:
    """Evaluate one candidate, and hold it as a finalist if it has a time."""
    candidate = {"problem": problem().to_dict(), "config": {"fault": fault, "draw": seed}}
    limit_s = SLOW_LIMIT_S if fault in ("hang", "hang_at_size") else LIMIT_S
    reply = worker.call({"evaluate": candidate}, limit_s)
    outcome = from_json(reply["outcome"]) if isinstance(reply, dict) else None
    tally.add(fault, "evaluated", kind(outcome) if outcome else type(reply).__name__)
    if isinstance(outcome, Timed):
        tally.add(fault, "accepted")
        reply = worker.call({"check": candidate}, limit_s)
        outcome = from_json(reply["outcome"]) if isinstance(reply, dict) else None
        if isinstance(outcome, Predicted):
            tally.add(fault, "kept")
    if fault == "none" and not isinstance(outcome, Predicted):
        print(f"a right candidate was refused: seed {seed}: {outcome or reply}", flush=True)
    elif fault in WRONG and isinstance(outcome, Predicted):
        print(f"a wrong candidate was kept: {fault}, seed {seed}: {outcome}", flush=True)


def left_behind() -> int:
    """Processes that planted candidates have started and that still run."""
    found = 0
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += MARK in file.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
    return found


def worker_for(number: int, folder: Path) -> Worker:
    setup = {
        "backend": "planted_backend:PlantedBackend", "target": "cpu", "folder": str(folder), "seed": number,
        "threads": 1, "memory_bytes": MEMORY,
    }  # fmt: skip
    return Worker("mctune.workers.evaluate:start", setup, env={"OMP_NUM_THREADS": "1"})


def run(evaluations: int, seconds: float, workers: int, seed: int, folder: Path, kinds: Sequence[str]) -> Tally:
    """So many evaluations, or so many seconds of them, in so many workers."""
    tally, started = Tally(), time.monotonic()

    def loop(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        with worker_for(number, folder) as worker:
            while tally.evaluations < evaluations and time.monotonic() - started < seconds:
                one(worker, draw(rng, kinds), rng.randrange(1 << 31), tally)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(60.0)
            tally.seconds = time.monotonic() - started
            counts = f"{tally.wrong('accepted')} wrong candidates, {tally.wrong('kept')} wrong winners"
            print(f"{tally.seconds:.0f} s: {tally.evaluations} evaluations, {counts}", flush=True)
    return tally


def once(seed: int, folder: Path) -> Tally:
    """Every kind once, in random order, and a right one after each that harms others."""
    rng, tally = random.Random(seed), Tally()
    kinds = [fault for fault in (*WRONG, *HARMFUL) if fault != "hang"]
    rng.shuffle(kinds)
    with worker_for(0, folder) as worker:
        for fault in kinds:
            one(worker, fault, rng.randrange(1 << 31), tally)
            if fault in HARMFUL:
                one(worker, "none", rng.randrange(1 << 31), tally)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no evaluation after so long")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 20))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kinds", nargs="+", default=(*WRONG, *HARMFUL), help="of faults, by default all")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tally = run(args.evaluations, args.seconds, args.workers, args.seed, Path(folder), args.kinds)
    report = tally.to_dict() | {"seed": args.seed, "left_behind": left_behind(), "workers": args.workers}
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    return int(bool(report["wrong_winners"] or report["right_refused"] or report["left_behind"]))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    sys.exit(main())
