"""The steps of `benchmarks/contact.py` that use the GPU: is it right, does it repeat, how long does it take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from contact_guard import Facts, told
from contact_kernels import TOP_K, Kernels, Leaves, Sizes, differing, error_of, step_of, through

if TYPE_CHECKING:
    from mctune.core.config import Config
    from mctune.core.problem import Problem

PROFILED = 5
"""Calls under the profiler."""


@dataclass(frozen=True)
class Steps:
    """What steps share. Every method runs in a process of its own, and tells facts under ``step``."""

    kernels: Kernels
    facts: Facts

    @property
    def sizes(self) -> Sizes:
        return self.kernels.sizes

    def data(self, T: int, seed: int = 0) -> SimpleNamespace:
        """Random q, k, v, u, dy [1, T, H, D] and g [1, T, H] on the GPU, logits of about unit size."""
        from mctune.runtime.kernels.triton.tables import DEVICE

        sizes, generator = self.sizes, torch.Generator(DEVICE).manual_seed(seed)
        scales = {"q": 1.0, "k": 1.0, "v": 1.0, "u": math.sqrt(sizes.C / sizes.D), "dy": 1.0}
        found = {
            name: (torch.randn(1, T, sizes.H, sizes.D, generator=generator, device=DEVICE) * scale).to(
                getattr(torch, sizes.dtype)
            )
            for name, scale in scales.items()
        }
        return SimpleNamespace(**found, g=-0.1 * torch.rand(1, T, sizes.H, generator=generator, device=DEVICE))

    def shape(self, kind: str, T: int) -> Any:
        """As the contenders of `mctune bench` take it."""
        from mctune.measure.gpu.contenders import Shape

        sizes = self.sizes
        return Shape(kind, 1, T, sizes.H, sizes.D, sizes.C, sizes.dtype)

    # --- right?

    def compare(self, step: str, aggregation: str) -> None:
        """y and the gradients against the eager path in float32 on the same device; then bitwise equal repeats."""
        torch.set_float32_matmul_precision("highest")
        self.kernels.serve(*self.kernels.pairs(aggregation))
        for name, off, limit in self.compared(aggregation):
            self.facts.add(step, "compared", aggregation=aggregation, tensor=name, error=off, limit=limit,
                           right=bool(off <= limit), T=self.sizes.checked)  # fmt: skip
        self.repeat(step, aggregation)

    def compared(self, aggregation: str, seed: int = 0) -> list[tuple[str, float, float]]:
        """(tensor, error, limit): fresh memory holds NaN, so that what is not written shows."""
        from mctune.verify.judge import poisoned_memory, tolerance

        data = self.data(self.sizes.checked, seed)
        wanted = step_of(Leaves.of(data, aggregation, torch.float32), self.sizes, aggregation, "eager")()
        with poisoned_memory():
            found = step_of(Leaves.of(data, aggregation), self.sizes, aggregation, "triton")()
        limits = {name: tolerance(self.sizes.problem("backward" if name != "y" else "forward", aggregation))
                  for name in wanted}  # fmt: skip
        return [(name, error_of(found[name], wanted[name], aggregation), limits[name]) for name in wanted]

    def repeat(self, step: str, aggregation: str, runs: int | None = None, T: int | None = None) -> bool:
        """Nothing in a pass depends on the order in which programs end: a difference is a race."""
        from mctune.verify.judge import poisoned_memory

        runs, T = runs or self.sizes.repeats, T or self.sizes.timed
        run = step_of(Leaves.of(self.data(T), aggregation), self.sizes, aggregation, "triton")
        with poisoned_memory():
            first = {name: x.clone() for name, x in run().items()}
        counts, shares = dict.fromkeys(first, 0), dict.fromkeys(first, 0.0)
        for _ in range(runs):
            for name, share in differing(first, run()).items():
                counts[name] += 1
                shares[name] = max(shares[name], share)
        equal = not any(counts.values())
        self.facts.add(step, "repeats", aggregation=aggregation, T=T, runs=runs, equal=equal,
                       differing={name: count for name, count in counts.items() if count},
                       shares={name: share for name, share in shares.items() if share})  # fmt: skip
        return equal

    # --- how long?

    def time(self, step: str, aggregation: str, T: int, others: Sequence[str] = (), profile: bool = True) -> None:
        """Forward, backward and both of an aggregation beside others' calls, in rotated order; then its kernels."""
        pairs = self.kernels.pairs(aggregation)
        self.kernels.serve(*pairs)
        data, calls = self.data(T), dict[str, Callable[[], Any]]()
        leaves = Leaves.of(data, aggregation)
        calls.update(passes(leaves, self.sizes, aggregation))
        for kind in ("forward", "training"):
            calls.update(self.others(step, kind, T, data, others))
        for name, (timed, host) in self.timed(step, calls).items():
            ours = name in ("forward", "backward", "training")
            part = name if ours else name.rpartition(" ")[2]
            problem = self.sizes.problem("forward" if part == "forward" else "backward", aggregation, T).to_dict()
            known = (
                {"problem": problem, "config": pairs[part != "forward"][1].to_dict()} if ours else {"sizes": problem}
            )
            self.facts.add(
                step, "timed", name=f"mctune {aggregation} {name}" if ours else name, aggregation=aggregation, T=T,
                part=part, **timed, host_ms=host, **known,
            )  # fmt: skip
        if profile:
            for part in ("forward", "backward"):
                self.profile(step, aggregation, T, part, calls[part])

    def others(self, step: str, kind: str, T: int, data: Any, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
        """Calls of the contenders of `mctune bench` whose names contain one of ``names``; each by itself, once."""
        found: dict[str, Callable[[], Any]] = {}
        if not names:
            return found
        try:
            from mctune.measure.gpu.contenders import Data, contenders

            shape, same = self.shape(kind, T), Data(**vars(data))
            every = contenders(shape, self.kernels.target, None, self.kernels.folder)
        except Exception as error:
            self.facts.add(step, "left out", name=f"all others {kind}", error=told(error))
            return found
        for one in every:
            if any(name in one.name for name in names) and not one.name.startswith("mctune"):
                try:
                    call = one.make(shape, same)
                    call()
                except Exception as error:
                    self.facts.add(step, "left out", name=f"{one.name} {kind}", error=told(error))
                    continue
                found[f"{one.name} {kind}"] = call
        return found

    def timed(self, step: str, calls: Mapping[str, Callable[[], Any]]) -> dict[str, tuple[dict[str, float], float]]:
        """Median, 20th and 80th percentile in milliseconds of each, and what the host takes to launch it."""
        from mctune.measure.clocks import clock_and_heat
        from mctune.measure.timing import host_ms, summary, time_rotated
        from mctune.runtime.kernels.triton.tables import DEVICE

        samples = time_rotated(list(calls.values()), rounds=self.sizes.rounds, limit_s=12.0, device=DEVICE)
        mhz, celsius = clock_and_heat(DEVICE)
        found = {}
        for (name, call), some in zip(calls.items(), samples, strict=True):
            values = dict(zip(("ms", "low", "high"), summary(some), strict=True))
            # Interpreted kernels run on the host.
            host = host_ms(call) if DEVICE == "cuda" else values["ms"]
            found[name] = ({**values, "repeats": len(some), "sm_mhz": mhz, "celsius": celsius}, host)
        return found

    def profile(self, step: str, aggregation: str, T: int, part: str, call: Callable[[], Any]) -> None:
        """Microseconds of every kernel that a call launches, in their order: calibration points of the cost model."""
        kernels, by = profiled(call)
        if not kernels:
            self.facts.add(step, "no profile", aggregation=aggregation, part=part, by=by)
        for place, (name, us) in enumerate(kernels):
            self.facts.add(step, "kernel time", aggregation=aggregation, T=T, part=part, place=place, kernel=name,
                           us=us, by=by)  # fmt: skip

    def decode(self, step: str) -> None:
        """A token after ``states`` segments, their states in float32 and in 16 bits, beside attention's."""
        from mctune.measure.gpu.contenders import Data, memory_after

        sizes = self.sizes
        T = sizes.states * sizes.C + 1
        shape, data, calls = self.shape("decode", T), self.data(T), dict[str, Callable[[], Any]]()
        wanted = {}
        wide = Leaves.of(data, "grm", torch.float32)
        for aggregation in ("grm", "ssc"):
            with torch.no_grad():
                wanted[aggregation] = decoded(wide, sizes, aggregation)
        configs = {}
        for aggregation in ("grm", "ssc"):
            problem = sizes.problem("decode", aggregation)
            config = self.kernels.config(problem)
            launcher = self.kernels.load(problem, config)
            for dtype in (torch.float32, getattr(torch, sizes.dtype)):
                name = f"mctune {aggregation} decode, {str(dtype).removeprefix('torch.')} states"
                memory = memory_after(shape, Data(**vars(data)))
                memory.states = (memory.states[0].to(dtype),)
                call = one_token(launcher, problem, data, memory)
                try:
                    off = error_of(call(), wanted[aggregation], aggregation="")
                except Exception as error:
                    self.facts.add(step, "left out", name=name, error=told(error))
                    continue
                self.facts.add(step, "compared", aggregation=f"{aggregation} decode", tensor=f"y, {name}", error=off,
                               limit=1e-2, right=off <= 1e-2, T=T)  # fmt: skip
                calls[name], configs[name] = call, (problem, config, dtype)
        calls |= self.others(step, "decode", T, data, ("sdpa", "products"))
        for name, (timed, host) in self.timed(step, calls).items():
            known: dict[str, Any] = {}
            if name in configs:
                problem, config, dtype = configs[name]
                known = {"problem": problem.to_dict(), "config": config.to_dict(), "state_dtype": str(dtype)}
            self.facts.add(step, "timed", name=name, part="decode", T=T, **timed, host_ms=host, **known)

    def variants(self, step: str, problem: Problem, configs: Sequence[Config]) -> None:
        """Other configurations of the read: each held to the default, repeated, and timed beside the others."""
        data, sizes = self.data(problem.T), self.sizes
        calls: dict[str, Callable[[], Any]] = {}
        known: dict[str, Config] = {}
        first: torch.Tensor | None = None
        for number, config in enumerate(configs):
            name = f"{step} {number}"
            try:
                call = read(self.kernels.load(problem, config), data, sizes, problem)
                y = call()
                first = y.clone() if first is None else first
                off = error_of(y, first, problem.aggregation)
                differing = sum(not torch.equal(y, call()) for _ in range(sizes.repeats))
            except Exception as error:
                self.facts.add(step, "left out", name=name, error=told(error), config=str(config))
                continue
            self.facts.add(step, "compared", aggregation=problem.aggregation, tensor=f"y of {name}", error=off,
                           limit=1e-2, right=off <= 1e-2, T=problem.T)  # fmt: skip
            self.facts.add(step, "repeats", aggregation=name, T=problem.T, runs=sizes.repeats, equal=not differing,
                           differing={"y": differing} if differing else {}, shares={})  # fmt: skip
            calls[name], known[name] = call, config
        for name, (timed, host) in self.timed(step, calls).items():
            config = known[name]
            self.facts.add(step, "timed", name=name, part="forward", T=problem.T, **timed, host_ms=host,
                           aggregation=problem.aggregation, problem=problem.to_dict(), config=config.to_dict(),
                           variant=read_of(config))  # fmt: skip


def passes(leaves: Leaves, sizes: Sizes, aggregation: str) -> dict[str, Callable[[], Any]]:
    """Forward, backward and both, through the operators that a model calls."""
    run = through(leaves, sizes, aggregation, "triton")
    y = run()

    def forward() -> object:
        with torch.no_grad():
            return run()

    return {
        "forward": forward,
        "backward": lambda: leaves.gradients(y, keep=True),
        "training": step_of(leaves, sizes, aggregation, "triton"),
    }


def profiled(call: Callable[[], Any]) -> tuple[list[tuple[str, float]], str]:
    """(kernel, microseconds), the medians of a few calls, and by what they were measured."""
    if not torch.cuda.is_available():
        return [], "no GPU"
    from torch.profiler import ProfilerActivity, profile

    scratch = torch.zeros(64 << 20, device="cuda")
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED):
            call()
            # Evicts from L2 what the call left there, and marks the call's end.
            scratch.sum()
        torch.cuda.synchronize()
    from torch.autograd import DeviceType

    events = [event for event in seen.events() or () if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    found = [(event.name, event.time_range.elapsed_us()) for event in events]
    count, rest = divmod(len(found), PROFILED)
    if not found or rest:
        return [(name, us) for name, us in found], f"torch.profiler, {len(found)} events of {PROFILED} calls"
    return [
        (found[i][0], statistics.median(found[i + round_ * count][1] for round_ in range(PROFILED)))
        for i in range(count)
    ], "torch.profiler"


def one_token(launcher: Any, problem: Problem, data: Any, memory: Any) -> Callable[[], torch.Tensor]:
    """y of the last token; the memory's counts stay, so that every call computes the same but for the online state."""
    q, k, v, u = (x[:, -1:].contiguous() for x in (data.q, data.k, data.v, data.u))
    options = {"g": None, "beta": None, "lam": None, "scale": problem.Dk**-0.5, "top_k": problem.top_k or 1}

    def step() -> torch.Tensor:
        y: torch.Tensor = launcher(q, k, v, u, **options, segment_length=problem.segment_length, memory=memory)
        return y

    return step


def decoded(leaves: Leaves, sizes: Sizes, aggregation: str) -> torch.Tensor:
    """The last token's y by the eager path."""
    from mctune.runtime.api.functional import memory_caching

    ssc = {"top_k": TOP_K["decode"]} if aggregation == "ssc" else {}
    y: torch.Tensor = memory_caching(
        leaves.q, leaves.k, leaves.v, leaves.u, aggregation=aggregation, segment_length=sizes.C, backend="eager", **ssc
    )
    return y[:, -1:]


def read(launcher: Any, data: Any, sizes: Sizes, problem: Problem) -> Callable[[], torch.Tensor]:
    """y of a forward by its launcher."""
    from mctune.runtime.segments import make_segments

    options = {
        "g": None, "beta": None, "lam": None, "scale": sizes.D**-0.5, "top_k": problem.top_k or 1,
        "segments": make_segments(problem.T, "constant", sizes.C, None),
    }  # fmt: skip
    return lambda: launcher(data.q, data.k, data.v, data.u, **options).y


def read_of(config: Config) -> dict[str, Any]:
    """What distinguishes a variant."""
    names = ("formulation", "gates")
    return {name: value for name, value in config.items if name in names or name.startswith("read_")}
