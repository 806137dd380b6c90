"""First minutes on a GPU: whether the kernels are right, repeat, and how fast they are, in less than five.

    0 s    versions, clocks, rates of the GPU; everything is compiled meanwhile, a kernel a process
    15 s   GRM, the base recurrence (residual) and SSC at D 128, segments of 256, bfloat16, T 4096: y and all gradients
           against the eager path in float32 on the GPU; then 20 repeats at T 16K, which must be bitwise equal. What
           fails is looked into at once: which kernel it is, and in which form it is right
    45 s   GRM beside torch's attention, kernel by kernel; residual beside fla; SSC and residual at T 64K
    130 s  decode beside torch's attention; other configurations of the read; TVM's kernels by every instruction kind
    170 s  `mctune verify`: every template against the float64 oracle

Every step runs in a process of its own, which may crash or hang without harm to the others, and leaves facts, a line
of JSON each, in ``facts.jsonl`` in the output folder the moment they are known. ``contact.txt`` is a table of them,
written anew after every step; ``rows.json`` is what `mctune calibrate` takes; ``held.jsonl`` what verify has held;
``log.txt`` what everything printed. Needed are torch, Triton and this checkout, LibCST if it is there or in
build/wheelhouse (`make wheelhouse`). ``--rehearse`` goes through every step without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Asking torch whether there is a GPU must not initialise CUDA: steps are forked from this process.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import contact_machine as machine  # noqa: E402
import contact_tvm  # noqa: E402
from contact_ahead import Claims, Job, compile_all, environment, fresh, predicted, prepared  # noqa: E402
from contact_diagnose import Search  # noqa: E402
from contact_guard import Background, Facts, Guard, told  # noqa: E402
from contact_kernels import AGGREGATIONS, SMALL, Kernels, Sizes  # noqa: E402
from contact_steps import Steps, read_of  # noqa: E402
from contact_table import rows, table  # noqa: E402
from on_gpu import unpack_missing  # noqa: E402

SPARE_CORES = 2
"""Not compiling: one launches, one tells."""
END_S = 6.0
"""For the table."""
DIAGNOSE_S, DIAGNOSE_SHARE = 70.0, 0.4
"""Most seconds, and most of the time that is left, for what is not right."""
OF_THE_GPU = ("CUDA error", "Triton Error [CUDA]")
LONG = ("ssc", "residual")


class Contact:
    """The steps, in order, and what they share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rehearse = options, options.rehearse
        self.work: Path = options.work.resolve()
        self.facts = Facts(options.out.resolve())
        self.guard = Guard(self.facts, self.facts.folder / "log.txt", self.facts.began + 60 * options.minutes - END_S)
        self.compiling: list[Background] = []
        self.aside: list[Background] = []
        self.sizes: Sizes = SMALL if self.rehearse else Sizes()
        os.environ.update(environment(self.work))
        self.scratch = self.work / f"contact_{os.getpid()}"
        self.cuda: Path = options.wheels / "cuda"
        """What TVM has compiled ahead (contact_tvm.py)."""
        if self.rehearse:
            # Read by Triton when it is imported, which this process does not do.
            os.environ["TRITON_INTERPRET"] = "1"
            self.cuda = self.scratch / "cuda"

    # --- what runs where

    def step(self, name: str, function: Callable[[], object], limit_s: float, device: bool = True) -> str:
        """Run a step, and write the table anew. In a rehearsal, what would use the GPU interprets."""
        if self.options.steps and not name.startswith(tuple(self.options.steps)):
            return "not asked for"
        outcome = self.guard.run(name, self._where(function, device), limit_s)
        self.write()
        return outcome

    def _where(self, function: Callable[[], object], device: bool) -> Callable[[], object]:
        return partial(fresh, function) if self.rehearse and not device else function

    def run(self) -> None:
        """Everything."""
        self.missing()
        self.guard.run("machine", lambda: machine.machine(self.facts), 30)
        self.target = self.guess()
        self.preload()
        self.kernels = Kernels(self.scratch / "kernels", self.target, self.sizes)
        self.steps = Steps(self.kernels, self.facts)
        self.jobs = self.wanted()
        self.compile(self.jobs)
        self.step("device", self.device, 45)
        self.again_if_touched()
        self.same_target()
        self.aside.append(self.guard.start("fla ahead", self._where(self.fla, True), quiet=True))
        for aggregation in AGGREGATIONS:
            self.right(aggregation)
        self.stop(self.aside, "others are timed now")
        predict = partial(predicted, self.jobs_and_long(), self.kernels, self.facts, "predict")
        self.aside.append(self.guard.start("predict", self._where(predict, device=False), quiet=True))
        self.times()
        self.rest()

    def right(self, aggregation: str) -> None:
        """Prepare, compare, repeat; and what is wrong is looked into."""
        self.prepare(f"{aggregation} ", 45)
        name = f"compare {aggregation}"
        outcome = self.step(name, lambda: self.steps.compare(name, aggregation), 40)
        lost = outcome.startswith(("killed", "not done"))
        wrong = [f for f in self.facts.of("compared", step=name) if not f["right"]]
        wrong += [f for f in self.facts.of("repeats", step=name) if not f["equal"]]
        # An illegal access, for example; other errors are not the compiler's fault.
        wrong += [f for f in self.facts.of("raised", step=name) if any(text in f["error"] for text in OF_THE_GPU)]
        if lost or wrong:
            self.diagnose(aggregation)

    def times(self) -> None:
        """By priority."""
        sizes = self.sizes
        attention = ("sdpa, flash", "sdpa, cudnn")
        for aggregation, T, others in (("grm", sizes.timed, attention), ("residual", sizes.timed, ("chunk_linear",)),
                                       *((one, sizes.long, ()) for one in LONG)):  # fmt: skip
            name = f"time {aggregation} {T}"
            self.step(name, lambda a=aggregation, T=T, o=others, n=name: self.steps.time(n, a, T, o), 60)  # type: ignore[misc]
        self.prepare("decode", 20)
        self.step("decode", lambda: self.steps.decode("decode"), 30)
        problem, configs = self.variants()
        self.prepare("variant", 25)
        self.step("variant", lambda: self.steps.variants("variant", problem, configs), 40)
        special = self.specialized(problem, configs[0])
        if special:
            # A kernel that deadlocks would take the others with it.
            self.prepare("specialized", 20)
            self.step("specialized", lambda: self.steps.variants("specialized", problem, [configs[0], *special]), 30)

        on_cpu = self.scratch / "cuda_on_cpu" if self.rehearse else None
        if on_cpu is not None:
            self.step("prepare tvm", lambda: contact_tvm.prepare_rehearsal(self.target, self.cuda, on_cpu), 150)
        self.step("tvm", lambda: contact_tvm.step(self.steps, "tvm", self.cuda, on_cpu), 40)

    def rest(self) -> None:
        """What takes all the time that is left."""
        self.stop(self.compiling, "verify has the cores now")
        left = self.guard.left
        self.step("verify", lambda: self.verify(max(left - 25.0, 1.0)), left)

    # --- before anything runs

    def missing(self) -> None:
        """Take what this Python lacks from the wheelhouse; record what is missing there too."""
        try:
            unpack_missing(self.options.wheels, self.work / "site")
        except (SystemExit, OSError) as error:
            self.facts.add("machine", "missing", said=str(error))
            self.guard.say(str(error))
        if self.rehearse:
            self.facts.add("machine", "rehearsal", why="Triton's interpreter, tiny sizes: no time means anything")

    def guess(self) -> Any:
        """The registry's entry for this GPU, from its name, without touching the GPU."""
        from mctune.backends.presence import Seen, here
        from mctune.core.target import resolve

        name = machine.gpu_name(self.facts)
        found = here(Seen(name, 0)) if name and not self.rehearse else None
        target = found or resolve(self.options.gpu)[0]
        self.facts.add("machine", "target", target=target.name, arch=target.arch, by=name or "--gpu")
        return target

    def same_target(self) -> None:
        """The entry by the properties that the GPU reports; kernels are the same for all GPUs of an architecture."""
        from mctune.backends.presence import Seen, here

        for fact in self.facts.of("properties")[-1:]:
            found = here(Seen(fact["name"], fact["multi_processor_count"]))
            if found is not None and found.arch == self.target.arch:
                self.target = found
                self.kernels = replace(self.kernels, target=found)
                self.steps = Steps(self.kernels, self.facts)

    def preload(self) -> None:
        """What every step imports, once; none of it touches the GPU. A rehearsal's interprets."""
        if self.options.bare:
            return
        try:
            from triton.runtime.cache import triton_key

            triton_key()
        except Exception as error:
            self.facts.add("machine", "not preloaded", error=repr(error))

    def again_if_touched(self) -> None:
        """If an import has touched the GPU after all, no child can use it: start again without that import."""
        lost = [fact for fact in self.facts.of("raised", step="device") if "forked subprocess" in fact["error"]]
        if lost and not self.options.bare:
            self.stop(self.compiling, "begun again")
            self.guard.say("an import has touched the GPU: everything once more, each step with its own imports")
            left = (self.guard.left + END_S) / 60
            os.execv(sys.executable, [sys.executable, *sys.argv, "--bare", "--minutes", f"{left:.2f}"])

    # --- compiling

    def wanted(self) -> list[Job]:
        """Every kernel that the steps launch, in the order of the steps."""
        try:
            return self._wanted()
        except Exception as error:
            self.facts.add("machine", "no jobs", error=repr(error))
            self.guard.say(f"nothing is compiled ahead: {error!r}")
            return []

    def _wanted(self) -> list[Job]:
        jobs = []
        for aggregation in AGGREGATIONS:
            for problem, config in self.kernels.pairs(aggregation):
                jobs.append(Job(f"{aggregation} {problem.pass_} {problem.T}", problem, config))
        for aggregation in ("grm", "ssc"):
            problem = self.sizes.problem("decode", aggregation)
            for dtype in ("float32", self.sizes.dtype):
                jobs.append(Job(f"decode {aggregation} {dtype}", problem, self.kernels.config(problem), dtype))
        problem, configs = self.variants()
        jobs += [Job(f"variant {number}", problem, config) for number, config in enumerate(configs)]
        special = self.specialized(problem, configs[0])
        jobs += [Job(f"specialized {number}", problem, config) for number, config in enumerate(special)]
        # A rehearsal compiles for a GPU too, but only a few.
        few = ("grm forward", "decode grm float32")
        return [job for job in jobs if job.name.startswith(few)] if self.rehearse else jobs

    def variants(self) -> tuple[Any, list[Any]]:
        """The problem of a forward, its default, and other valid configurations of its read."""
        from mctune.backends import get_backend

        problem = self.sizes.problem("forward", "grm")
        space, first = get_backend("triton").space(problem), self.kernels.config(problem)
        names = ("formulation", "read_BT", "read_BV", "read_BJ", "read_num_warps", "read_num_stages")
        tiles = [(256, 64, 64, 16, 3), (256, 64, 32, 16, 2), (256, 128, 32, 16, 2), (128, 128, 64, 8, 3),
                 (128, 128, 64, 8, 2), (128, 64, 64, 4, 3)]  # fmt: skip
        tiles = [(16, 16, 16, 4, 1)] if self.rehearse else tiles
        found = [first]
        for formulation in space.param("formulation").values:
            for tile in tiles:
                config = first.replace(**dict(zip(names, (formulation, *tile), strict=True)))
                if space.valid(config, problem, self.target) and read_of(config) not in map(read_of, found):
                    found.append(config)
        return problem, found

    def specialized(self, problem: Any, first: Any) -> list[Any]:
        """Reads by specialised warps, which no interpreter runs: none has shipped before a GPU has verified it."""
        from mctune.backends import get_backend

        space = get_backend("triton").measuring().space(problem)
        starts = [config.replace(formulation="specialized") for config in (space.default, *space.fallbacks)]
        found = next((one for one in starts if space.valid(one, problem, self.target)), None)
        if found is None or self.rehearse:
            return []
        stages = [found.replace(read_num_stages=count) for count in (2, 3, 4)]
        return [config for config in stages if space.valid(config, problem, self.target)]

    def compile(self, jobs: Sequence[Job]) -> None:
        """On all cores but a few, each process what no other has begun."""
        folder = self.scratch / "claims"
        processes = max(len(os.sched_getaffinity(0)) - SPARE_CORES, 1) if jobs else 0
        for number in range(processes):
            claims = Claims(folder, self.facts, "ahead")
            work = self._where(partial(compile_all, jobs, self.kernels, claims), device=False)
            self.compiling.append(self.guard.start(f"compiling {number}", work, quiet=True))

    def prepare(self, starts: str, limit_s: float) -> None:
        """Wait for the kernels of these jobs."""
        jobs = [job for job in self.jobs if job.name.startswith(starts)]
        name, folder = f"prepare {starts.strip()}", self.scratch / "claims"
        if jobs:
            wait = partial(prepared, jobs, self.kernels, folder, self.facts, name, limit_s)
            self.step(name, wait, limit_s + 30, device=False)

    def jobs_and_long(self) -> list[Job]:
        """What was compiled, also at the length of the long rows."""
        long = [replace(job, name=f"{a} {pass_} {self.sizes.long}", problem=job.problem.replace(T=self.sizes.long))
                for job in self.jobs for a in LONG for pass_ in ("forward", "backward")
                if job.name == f"{a} {pass_} {self.sizes.timed}"]  # fmt: skip
        return [*self.jobs, *long]

    # --- steps

    def device(self) -> None:
        """Facts first, then rates."""
        machine.device(self.facts)
        machine.rates(self.facts, self.rehearse)

    def fla(self) -> None:
        """Have fla's kernels compiled, by a small call: its tuner wants the GPU for that."""
        data = self.steps.data(min(self.sizes.timed, 2048))
        for call in self.steps.others("fla ahead", "training", data.q.shape[1], data, ("chunk_linear",)).values():
            call()

    def diagnose(self, aggregation: str) -> None:
        """Which operation, which form, which kernel."""
        folder = self.scratch / "operations"
        folder.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + min(DIAGNOSE_S, DIAGNOSE_SHARE * self.guard.left)

        def more(jobs: Sequence[Job]) -> None:
            self.jobs = [*self.jobs, *jobs]
            self.compile(jobs)

        try:
            Search(self.steps, self.facts, folder, self.step, more, self.prepare, until).run(aggregation)
        except Exception as error:
            self.facts.add(f"diagnose {aggregation}", "raised", error=told(error), where=[])

    def verify(self, seconds: float) -> None:
        """`mctune verify --gpu`, by the function that it calls: no other package is needed."""
        from mctune.workers.hold import candidates, hold

        drawn = candidates(self.target)
        if self.rehearse:
            drawn = [one for one in drawn if one.problem.pass_ == "decode"][-1:]
        held = []
        for one in hold(drawn, self.target, self.facts.folder / "held.jsonl", seconds):
            held.append(one)
            self.facts.add("verify", "held", problem=f"{one.problem} [{one.config.key}]", error=one.error,
                           failure=one.failure, by=one.by)  # fmt: skip
        self.facts.add("verify", "verified", count=len(held), of=len(drawn), wrong=sum(bool(h.failure) for h in held))

    # --- the end

    def stop(self, running: list[Background], why: str) -> None:
        """End what still runs in the background."""
        for one in running:
            one.stop(why)
        running.clear()

    def write(self) -> str:
        """The table and the rows as they are now."""
        try:
            text = table(self.facts)
            _replace(self.facts.folder / "contact.txt", text)
            data = rows(self.facts, self.target)
            _replace(self.facts.folder / "rows.json", json.dumps(data, indent=1))
        except Exception as error:
            text = f"no table: {told(error)}"
            self.facts.add("table", "raised", error=told(error), where=[])
        return text

    def end(self) -> int:
        """The table to the terminal, last; 0 if what was compared is right and repeats."""
        self.stop([*self.compiling, *self.aside], "the time is over")
        self.guard.say(f"\n{self.write()}")
        shutil.rmtree(self.scratch, ignore_errors=True)
        bad = [f for f in self.facts.of("compared") if not f["right"]]
        bad += [f for f in self.facts.of("repeats") if not f["equal"]]
        return 1 if bad or not self.facts.of("compared") else 0


def _replace(path: Path, text: str) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "contact"),
                        metavar="DIR", help="default $OUT, else build/contact")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=4.75, help="for everything (default 4.75)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", metavar="DIR",
                        help="what is compiled and unpacked, as `make gpu` has it (default build/gpu)")  # fmt: skip
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "wheelhouse", metavar="DIR",
                        help="default build/wheelhouse")  # fmt: skip
    parser.add_argument("--gpu", default="h100-sxm", help="target, where nvidia-smi names none (default h100-sxm)")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only those whose names begin so")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help="no GPU: Triton's interpreter, tiny sizes")
    options = parser.parse_args()
    # A shell ignores Ctrl-C for background jobs; here it must still print the table.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    contact = Contact(options)
    try:
        contact.run()
    except KeyboardInterrupt:
        contact.guard.say("interrupted: what there is so far")
    except Exception as error:
        contact.facts.add("contact", "raised", error=told(error), where=traceback.format_exc().splitlines()[-6:])
        contact.guard.say(traceback.format_exc())
    raise SystemExit(contact.end())


if __name__ == "__main__":
    main()
