"""What `make gpu` runs: from a checkout on a machine with an NVIDIA GPU to verified kernels, a comparison and a search.

    faults      kernels that are wrong, touch what is not theirs or never end: recorded, and the GPU usable after each
    verify      every template against the float64 oracle, in bfloat16 first
    benchmark   benchmarks/gpu.py, the decisive shapes first, with the kernels that an earlier search has found too
    search      a measured search of the `paper` workload in the time that is left
    report      tables, and the cost model fitted to what was measured

Each stage goes on where an earlier run was ended, by the time or by Ctrl-C. It runs with the python and the torch that
the machine has, and needs no network: what they lack is unpacked from build/wheelhouse (`make wheelhouse`, on a machine
that has one). Everything is left in build/gpu, log.txt included.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {
    "click": "click", "rich": "rich", "markdown_it": "markdown_it_py", "mdurl": "mdurl", "pygments": "pygments",
    "numpy": "", "torch": "", "triton": "", "libcst": "libcst", "yaml": "pyyaml", "optuna": "optuna",
    "sqlalchemy": "sqlalchemy", "greenlet": "greenlet", "alembic": "alembic", "mako": "mako",
    "markupsafe": "markupsafe", "colorlog": "colorlog", "tqdm": "tqdm", "packaging": "packaging",
    "typing_extensions": "typing_extensions", "pytest": "pytest", "pluggy": "pluggy", "iniconfig": "iniconfig",
    "hypothesis": "hypothesis", "sortedcontainers": "sortedcontainers",
    "einops": "einops", "fla": "fla_core",
}  # fmt: skip
"""Modules, and the wheels that have them; "" for what is the machine's own."""
FAULTS_S, FINISH_S = 150.0, 45.0
"""Most seconds for the faults; seconds kept for what a search does after its last candidate, and for the report."""


def unpack_missing(wheels: Path, site: Path) -> None:
    """Unpack the wheels of what this python lacks into ``site``, and put that on the path.

    Raises:
        SystemExit: naming what is missing, and how to get it.
    """
    sys.path.append(str(site))
    for module, wheel in NEEDED.items():
        if importlib.util.find_spec(module) is not None:
            continue
        files = sorted(wheels.glob(f"{wheel}-*.whl")) if wheel else []
        usable = [file for file in files if _runs_here(file)]
        if not usable:
            there = f" ({', '.join(file.name for file in files)} is for another python)" if files else ""
            how = f"`make wheelhouse PYTHON_OF_GPU={sys.version_info.major}.{sys.version_info.minor}` fetches it, there"
            raise SystemExit(f"on_gpu.py: error: {module} is missing and {wheels} has no wheel of it{there}; "
                             f"{how if wheel else 'install it'}")  # fmt: skip
        zipfile.ZipFile(usable[-1]).extractall(site)
        importlib.invalidate_caches()


def _runs_here(wheel: Path) -> bool:
    python, abi, _ = wheel.stem.split("-")[-3:]
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return abi == "none" or (python == own and abi == own) or abi == "abi3"


class Run:
    """The stages of one run, its deadline and its log."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.deadline = out, time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.txt").open("a", encoding="utf-8")
        paths = [str(ROOT), *(path for path in sys.path if path)]
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        self.failed: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return max(self.deadline - time.monotonic(), 0.0)

    def say(self, text: str) -> None:
        """To the terminal and to the log."""
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def stage(self, name: str, *command: str, limit_s: float | None = None) -> int:
        """Run a command, its output to the terminal and to the log; killed after ``limit_s``."""
        self.say(f"== {name}, {self.left:.0f} s left: {' '.join(command)}")
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=limit_s is not None,
        )  # fmt: skip
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        try:
            while True:
                line = process.stdout.readline()
                if line:
                    self.say(line.rstrip("\n"))
                elif process.poll() is not None:
                    break
                elif limit_s is not None and time.monotonic() - began > limit_s:
                    os.killpg(process.pid, 9)
                    self.say(f"killed after {limit_s:.0f} s")
                else:
                    time.sleep(0.1)
        except KeyboardInterrupt:
            process.wait()
            raise
        code = process.wait()
        self.say(f"== {name}: exit {code} after {time.monotonic() - began:.0f} s")
        if code:
            self.failed.append(name)
        return code


def stages(run: Run, rehearse: bool) -> None:
    """All of them, each within its share of the time."""
    from mctune.backends import get_backend
    from mctune.core.environment import versions
    from mctune.core.target import resolve
    from mctune.search.presence import here, seen

    gpu, target = seen(), resolve("h200")[0] if rehearse else here(seen())
    if target is None:
        raise SystemExit("on_gpu.py: error: there is no GPU here that `mctune targets` lists; --rehearse needs none")
    run.say(f"{gpu.name if gpu else 'no GPU: a rehearsal'} as {target.name}; {json.dumps(versions())}")
    out, package = run.out, run.out / f"mctune_{target.name.replace('-', '_')}"
    passed, identity = out / "faults.json", json.dumps(get_backend("triton").identity())
    if not passed.is_file() or passed.read_text() != identity:
        if run.stage("faults", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton/test_faults.py",
                     limit_s=FAULTS_S) == 0:  # fmt: skip
            passed.write_text(identity)
    held = ("--record", str(out / "held.jsonl"), "--timeout", f"{0.35 * run.left:.0f}")
    run.stage("verify", "-m", "mctune", "verify", "--gpu", target.name, *held)
    tuned = ("--package", str(package)) if (package / "manifest.json").is_file() else ()
    budget = ("--budget", f"{0.5 * run.left:.0f}")
    small = ("--small", "--rounds", "3") if rehearse else ()
    run.stage("benchmark", "benchmarks/gpu.py", "--out", str(out / "benchmark.json"), *budget, *tuned, *small)
    tiny = ("--problem", "T=512,H=2,Dk=32,Dv=32,aggregation=mean", "--segment-lengths", "64,128", "--trials", "4")
    what = tiny if rehearse else ("--workload", "paper", "--measure")
    limit = ("--timeout", f"{max(run.left - FINISH_S, 20.0):.0f}")
    run.stage("search", "-m", "mctune", "search", "--gpu", target.name, *what, *limit, "--out", str(package))
    found = [str(path) for path in (out / "benchmark.json", package / "tuned.json") if path.is_file()]
    if found:
        run.stage("report", "-m", "mctune", "report", *found, "--out", str(out / "results"))
    if not rehearse:
        # The candidates that were searched are compiled already.
        run.env["TRITON_CACHE_DIR"] = str(package / "search" / "triton")
        run.stage("calibrate", "-m", "mctune", "calibrate", "--gpu", target.name, str(package / "search" / "study.db"),
                  "--out", str(out / "results"), limit_s=max(run.left, 60.0))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default 9.5)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="DIR", help="default build/gpu")
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "wheelhouse", metavar="DIR",
                        help="default build/wheelhouse")  # fmt: skip
    rehearse = "no GPU: Triton's interpreter, tiny sizes, a predicted search; no time means anything"
    parser.add_argument("--rehearse", action="store_true", help=rehearse)
    options = parser.parse_args()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    unpack_missing(options.wheels, options.out / "site")
    sys.path.insert(0, str(ROOT))
    run = Run(options.out, options.minutes)
    try:
        stages(run, options.rehearse)
    except KeyboardInterrupt:
        run.say("interrupted; the same command goes on from here")
        raise SystemExit(130) from None
    run.say(f"everything is in {options.out}" + (f"; not right: {', '.join(run.failed)}" if run.failed else ""))
    raise SystemExit(1 if run.failed else 0)


if __name__ == "__main__":
    main()
