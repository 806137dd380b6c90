"""What `make gpu` runs: from a checkout on a machine with an NVIDIA GPU to verified kernels, a comparison and a search.

    faults      kernels that are wrong, touch what is not theirs or never end: recorded, and the GPU usable after each
    verify      every template against the float64 oracle, in bfloat16 first
    benchmark   `mctune bench`, the decisive shapes first, with the kernels that an earlier search has found too
    search      a measured search of the shapes that the comparison decides by
    paper       a measured search of the `paper` workload, in the time that is left
    report      tables, and the cost model fitted to what was measured

Each stage goes on where an earlier run was ended, by the time or by Ctrl-C. It runs with the python and the torch that
the machine has, and needs no network: what they lack is unpacked from build/wheelhouse (`make wheelhouse`, on a machine
that has one, for this machine's python). Everything is left in build/gpu, and what must be brought back in one archive
there, from the first stage on. Where only one folder outlasts the run, ``--copy-to`` (by default ``$OUT``, if that is
set) has copies there that are at most ``COPY_S`` seconds old.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {
    "click": "click", "rich": "rich", "markdown_it": "markdown_it_py", "mdurl": "mdurl", "pygments": "pygments",
    "numpy": "numpy", "torch": "", "triton": "", "libcst": "libcst", "yaml": "pyyaml", "optuna": "optuna",
    "sqlalchemy": "sqlalchemy", "alembic": "alembic", "mako": "mako",
    "markupsafe": "markupsafe", "colorlog": "colorlog", "tqdm": "tqdm", "packaging": "packaging",
    "typing_extensions": "typing_extensions", "pytest": "pytest", "pluggy": "pluggy", "iniconfig": "iniconfig",
    "hypothesis": "hypothesis", "sortedcontainers": "sortedcontainers",
    "einops": "einops", "fla": "fla_core",
}  # fmt: skip
"""Modules, and the wheels that have them; "" for what is the machine's own."""
STAGES = ("faults", "verify", "benchmark", "search", "paper", "report")
SHARES = {"verify": 0.25, "benchmark": 0.3, "search": 0.3, "paper": 0.15}
"""Shares of the remaining time, in proportion to the stages to come."""
FAULTS_S, LATE_S = 150.0, 40.0
"""Most seconds for the faults, and that a stage may take beyond its share."""
LEAST_S, SHIP_S, FINISH_S = 60.0, 30.0, 25.0
"""Seconds in which a search gets somewhere; of its share, for what it does after its last candidate; for the report."""
ASKED, ASKED_S = 3, 12.0
"""How often a stage is asked to end, and the seconds that it then has, before it is killed."""
ARCHIVE = "brought-back.tar.gz"
KEPT = ("*.txt", "*.json", "*.jsonl", "study.db*", "results", "mctune_*")
COPY_S = 20.0
COPIED = ("log.txt", "held.jsonl", "benchmark.jsonl", "benchmark.json", "faults.json", ARCHIVE)
"""Besides the database of the searches: seven files in all."""
DATABASE = "study.db"


def unpack_missing(wheels: Path, site: Path) -> None:
    """Unpack the wheels of what this python lacks into ``site``, and put that on the path.

    Raises:
        SystemExit: after all that could be unpacked was, naming what is still missing, and how to get it.
    """
    sys.path.append(str(site))
    lacking, remedies = [], []
    for module, wheel in NEEDED.items():
        if importlib.util.find_spec(module) is not None:
            continue
        files = sorted(wheels.glob(f"{wheel}-*.whl")) if wheel else []
        usable = [file for file in files if _runs_here(file)]
        if usable and _unpacked(usable[-1], site):
            continue
        own = f"{sys.version_info.major}.{sys.version_info.minor}"
        there = f" ({', '.join(f.name for f in files)} is for another python, or broken)" if files else ""
        lacking.append(f"{module} is missing and {wheels} has no wheel of it for python {own}{there}")
        remedies.append(
            f"where there is a network, `make wheelhouse PYTHON_OF_GPU={own}` fetches all for this python"
            if wheel else f"install {module}"
        )  # fmt: skip
    if lacking:
        raise SystemExit(f"on_gpu.py: error: {'; '.join((*lacking, *dict.fromkeys(remedies)))}")


def _unpacked(wheel: Path, site: Path) -> bool:
    """Whether it could be; one that was cut off on its way here cannot."""
    try:
        with zipfile.ZipFile(wheel) as file:
            if file.testzip() is not None:
                return False
            file.extractall(site)
    except (OSError, zipfile.BadZipFile):
        return False
    importlib.invalidate_caches()
    return True


def _runs_here(wheel: Path) -> bool:
    python, abi, _ = wheel.stem.split("-")[-3:]
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return abi == "none" or (python == own and abi == own) or abi == "abi3"


class Run:
    """The stages of one run, its deadline and its log."""

    def __init__(self, out: Path, minutes: float, chosen: Sequence[str] = STAGES, copy_to: Path | None = None) -> None:
        self.out, self.deadline = out, time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.copies = Copies(out, copy_to) if copy_to is not None else None
        self.log = (out / "log.txt").open("a", encoding="utf-8")
        paths = [str(ROOT), *(path for path in sys.path if path)]
        self.env = {
            **os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1",
            # Stages share what they compile.
            "TRITON_CACHE_DIR": str((out / "triton").resolve()),
            "TORCHINDUCTOR_CACHE_DIR": str((out / "inductor").resolve()),
        }  # fmt: skip
        self.to_come = list(chosen)
        self.failed: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return max(self.deadline - time.monotonic(), 0.0)

    def share(self, name: str) -> float:
        """Seconds for a stage: of what is left, some kept for the end, in proportion to the stages to come."""
        of = SHARES[name] / sum(SHARES.get(stage, 0.0) for stage in (name, *self.to_come))
        return of * max(self.left - FINISH_S, 0.0)

    def say(self, text: str) -> None:
        """To the terminal and to the log."""
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def stage(self, name: str, *command: str, limit_s: float | None = None) -> int:
        """Run a command, its output to the terminal and to the log; ended after ``limit_s``."""
        self.say(f"== {name}, {self.left:.0f} s left: {' '.join(command)}")
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        reader = threading.Thread(target=self._copy, args=(process,), daemon=True)
        reader.start()
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.say(f"ended after {limit_s:.0f} s")
            _end(process)
        except KeyboardInterrupt:
            _end(process)
            raise
        code = process.wait()
        # A grandchild may still hold the pipe.
        reader.join(5.0)
        self.say(f"== {name}: exit {code} after {time.monotonic() - began:.0f} s")
        if code:
            self.failed.append(name)
        self.bring_back()
        return code

    def _copy(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.say(line.rstrip("\n"))

    def bring_back(self) -> None:
        """Everything of value in one archive, written anew after every stage: a run that is killed leaves it too."""
        scratch = self.out / f"{ARCHIVE}.new"
        try:
            with tarfile.open(scratch, "w:gz") as archive:
                for path in sorted(path for pattern in KEPT for path in self.out.glob(pattern)):
                    archive.add(path, path.name, filter=lambda entry: None if "/search" in entry.name else entry)
        except OSError as error:  # a full disk, for example
            self.say(f"{ARCHIVE} is not up to date: {error}")
        else:
            scratch.replace(self.out / ARCHIVE)
        if self.copies is not None:
            self.copies.copy()


class Copies:
    """What there is of the results, in another folder: all of it now and every ``COPY_S`` seconds."""

    def __init__(self, out: Path, to: Path) -> None:
        self.out, self.to = out, to
        self._taken = threading.Lock()
        self._seen: dict[str, tuple[int, int]] = {}
        threading.Thread(target=self._go_on, daemon=True).start()

    def _go_on(self) -> None:
        while True:
            self.copy()
            time.sleep(COPY_S)

    def copy(self) -> None:
        """Those that have changed, each whole or as it was; what cannot be copied now can the next time."""
        with self._taken:
            for name in (*COPIED, DATABASE):
                with contextlib.suppress(OSError, sqlite3.Error):
                    self._copy(name)

    def _copy(self, name: str) -> None:
        source, scratch = self.out / name, self.to / f"{name}.new"
        state = source.stat()
        if self._seen.get(name) == (state.st_mtime_ns, state.st_size):
            return
        self.to.mkdir(parents=True, exist_ok=True)
        try:
            if name == DATABASE:
                # A search may be writing to it.
                only_read = f"{source.resolve().as_uri()}?mode=ro"
                with contextlib.closing(sqlite3.connect(only_read, uri=True, timeout=2.0)) as one:
                    with contextlib.closing(sqlite3.connect(scratch)) as other:
                        one.backup(other)
            else:
                shutil.copyfile(source, scratch)
            scratch.replace(self.to / name)
        finally:
            scratch.unlink(missing_ok=True)
        self._seen[name] = (state.st_mtime_ns, state.st_size)


def _end(process: subprocess.Popen[str]) -> None:
    """As Ctrl-C would, so that it leaves what it has: what does not end on that, asked a few times, is killed."""
    for _ in range(ASKED):
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ASKED_S)
            break
    _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


class Stages:
    """What each stage runs, for this machine's GPU or, to rehearse, without one."""

    def __init__(self, run: Run, rehearse: bool) -> None:
        from mctune.backends import get_backend
        from mctune.backends.presence import here, seen
        from mctune.core.environment import versions
        from mctune.core.target import resolve

        gpu, target = seen(), resolve("h200")[0] if rehearse else here(seen())
        if target is None:
            raise SystemExit(
                "on_gpu.py: error: there is no GPU here that `mctune targets` lists; --rehearse needs none"
            )
        run.say(f"{gpu.name if gpu else 'no GPU: a rehearsal'} as {target.name}; {json.dumps(versions())}")
        self.run, self.rehearse, self.target = run, rehearse, target.name
        self.package = run.out / f"mctune_{target.name.replace('-', '_')}"
        self.paper_package = run.out / f"{self.package.name}_paper"
        self.storage = run.out.resolve() / DATABASE
        self.identity = json.dumps(get_backend("triton").identity())

    def faults(self) -> None:
        """Once for every version of what is tested."""
        passed = self.run.out / "faults.json"
        if passed.is_file() and passed.read_text() == self.identity:
            return
        command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton/test_faults.py")
        if self.run.stage("faults", *command, limit_s=FAULTS_S) == 0:
            passed.write_text(self.identity)

    def verify(self) -> None:
        """Candidates that are under way when the time is over are given up by the command itself."""
        share = self.run.share("verify")
        record = ("--record", str(self.run.out / "held.jsonl"), "--timeout", f"{share:.0f}")
        self.run.stage("verify", "-m", "mctune", "verify", "--gpu", self.target, *record, limit_s=share + LATE_S)

    def benchmark(self) -> None:
        """With the kernels that a search has found, where one has."""
        share, out = self.run.share("benchmark"), self.run.out / "benchmark.json"
        tuned = ("--package", str(self.package)) if (self.package / "manifest.json").is_file() else ()
        small = ("--small", "--rounds", "3") if self.rehearse else ()
        command = ("-m", "mctune.measure.gpu.run", "--out", str(out), "--budget", f"{share:.0f}", *tuned, *small)
        self.run.stage("benchmark", *command, limit_s=share + LATE_S)

    def search(self) -> None:
        """The shapes that the comparison decides by."""
        self._search("search", "decisive", self.package)

    def paper(self) -> None:
        """A package of its own: what one holds is what one search was about."""
        self._search("paper", "paper", self.paper_package)

    def _search(self, name: str, workload: str, package: Path) -> None:
        share = self.run.share(name)
        if share < LEAST_S and not self.rehearse:
            self.run.say(f"== {name}: {share:.0f} s are too few; the same command goes on with it")
            return
        tiny = ("--problem", "T=512,H=2,Dk=32,Dv=32,aggregation=mean", "--segment-lengths", "64,128", "--trials", "4")
        what = tiny if self.rehearse else ("--workload", workload, "--measure")
        limit = ("--timeout", f"{max(share - SHIP_S, 20.0):.0f}", "--storage", str(self.storage))
        self.run.stage(name, "-m", "mctune", "search", "--gpu", self.target, *what, *limit, "--out", str(package),
                       limit_s=max(share, 60.0) if not self.rehearse else None)  # fmt: skip

    def report(self) -> None:
        """Tables of what there is; how well the cost model ranked what was measured."""
        out = self.run.out
        files = (out / "benchmark.json", self.package / "tuned.json", self.paper_package / "tuned.json")
        found = [str(path) for path in files if path.is_file()]
        results = ("--out", str(out / "results"))
        if found:
            self.run.stage("report", "-m", "mctune", "report", *found, *results, limit_s=60.0)
        if self.storage.is_file() and not self.rehearse:
            command = ("calibrate", "--gpu", self.target, str(self.storage), *results)
            self.run.stage("calibrate", "-m", "mctune", *command, limit_s=max(self.run.left, 10.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default 9.5)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE",
                        help=f"only these, in this order (default {' '.join(STAGES)})")  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="DIR", help="default build/gpu")
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "wheelhouse", metavar="DIR",
                        help="default build/wheelhouse")  # fmt: skip
    parser.add_argument("--copy-to", type=Path, default=os.environ.get("OUT") or None, metavar="DIR",
                        help="keep copies of the results here (default $OUT, where that is set)")  # fmt: skip
    rehearse = "no GPU: Triton's interpreter, tiny sizes, a predicted search; no time means anything"
    parser.add_argument("--rehearse", action="store_true", help=rehearse)
    options = parser.parse_args()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    # A shell ignores Ctrl-C for background jobs, and the stages would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    unpack_missing(options.wheels, options.out / "site")
    sys.path.insert(0, str(ROOT))
    run = Run(options.out, options.minutes, options.stages, options.copy_to)
    try:
        stages = Stages(run, options.rehearse)
        while run.to_come:
            getattr(stages, run.to_come.pop(0))()
    except KeyboardInterrupt:
        run.say("interrupted; the same command goes on from here")
        run.bring_back()
        raise SystemExit(130) from None
    run.say(f"everything is in {options.out}, what to bring back in {ARCHIVE} there"
            + (f"; not right: {', '.join(run.failed)}" if run.failed else ""))  # fmt: skip
    run.bring_back()
    raise SystemExit(1 if run.failed else 0)


if __name__ == "__main__":
    main()
