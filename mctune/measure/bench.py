"""Time everything that computes a problem side by side: kernels, the eager path, torch.compile of it, the machine.

Everything is held to the oracle on the same inputs that it is timed on; a wrong result has no time. A backward is timed
as a training step, forward and backward through autograd, as a model runs it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mctune.core.config import Config
from mctune.core.environment import environment
from mctune.core.errors import MctuneError
from mctune.core.outcome import Timed, from_dict, shares
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.core.work import bound, work
from mctune.core.workload import load_workload
from mctune.measure.timing import summary, time_rotated
from mctune.measure.vmapped import vmapped
from mctune.runtime.api.functional import memory_caching
from mctune.verify.inputs import Inputs, make_inputs
from mctune.verify.judge import Run, decided_inputs, error_of, tolerance
from mctune.verify.package import find_entry, load_package, read_entries
from mctune.verify.passes import PASSES, Results, gradients

COPY_BYTES = 64 << 20
_SGEMM = ((2048, 2048, 2048), (4096, 512, 64))
"""M, K, N of the products that the sgemm rate is the better of: a square one, and one shaped like a cached read."""
_UNDECIDED = 1e-3
_LIMIT_S = 120.0


@dataclass(frozen=True)
class Contender:
    """One way to compute a problem. One that is ``optional`` and raises is left out of the comparison, with a note."""

    name: str
    problem: Problem
    run: Run
    optional: bool = False


@dataclass(frozen=True)
class Rates:
    """What the machine itself reached in the same rounds.

    Args:
        sgemm: of torch's float32 matrix product, operations/s.
        copy: of a copy of 64 MiB, bytes/s, read and written ones counted.
    """

    sgemm: float
    copy: float

    def to_dict(self) -> dict[str, float]:
        """The JSON form, in GFLOP/s and GB/s."""
        return {"matrix_gflops": self.sgemm / 1e9, "copy_gbs": self.copy / 1e9}


@dataclass(frozen=True)
class Measurement:
    """Times by the contenders' names, in their order, and the rates of the same rounds."""

    times: dict[str, Timed]
    rates: Rates


@dataclass(frozen=True)
class Result:
    """One problem: what is judged (a tuned kernel, or the eager path), and what it is compared with."""

    problem: Problem
    backend: str
    config: Config
    timed: Timed
    baselines: dict[str, Timed]
    rates: Rates
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of each operation in the time of the pass, as the search timed it."""

    @property
    def fraction_of_bound(self) -> float:
        """The shortest possible time at the measured rates over the time taken."""
        return fraction_of_bound(self.problem, self.timed.ms, self.rates)


Note = Callable[[str], None]
"""Takes a remark for a person: what is being timed, what was left out."""


def fraction_of_bound(problem: Problem, ms: float, rates: Rates) -> float:
    """The time that no implementation can beat at these rates, over ``ms``."""
    return bound(work(problem), rates.sgemm, rates.copy) * 1e3 / ms


def measure(contenders: Sequence[Contender], *, rounds: int, seed: int = 0, note: Note) -> Measurement:
    """Check every contender against the oracle, then time them all in rotated order, sgemm and copy among them.

    Contenders of the same shape get the same arrays. What torch compiled before is forgotten: past a limit of variants
    it would silently run uncompiled.

    Raises:
        MctuneError: naming the first contender whose result is wrong.
    """
    torch.compiler.reset()
    calls: dict[str, Callable[[], Results]] = {}
    errors: dict[str, float] = {}
    arguments = {c.problem: _inputs(c.problem, seed) for c in contenders}
    with torch.no_grad():
        references = {problem: _oracle(problem, inputs) for problem, inputs in arguments.items()}
        for contender in contenders:
            call = _bind(contender, arguments[contender.problem])
            try:
                results = call()
            except Exception as error:
                if not contender.optional:
                    raise
                reason = (str(error).strip() or "no message").splitlines()[0][:200]
                note(f"{contender.name} left out: {type(error).__name__}: {reason}")
                continue
            errors[contender.name] = _check(contender, results, references[contender.problem])
            calls[contender.name] = call
        machine = [_sgemm(*shape) for shape in _SGEMM] + [_copy()]
        samples = time_rotated([*calls.values(), *machine], rounds=rounds, limit_s=_LIMIT_S)
    times = {}
    for name, of_one in zip(calls, samples, strict=False):
        ms, low, high = summary(of_one)
        times[name] = Timed(ms, low, high, len(of_one), errors[name])
    *products, copy = [statistics.median(of_one) / 1e3 for of_one in samples[len(calls) :]]
    sgemm = max(2.0 * M * K * N / seconds for (M, K, N), seconds in zip(_SGEMM, products, strict=True))
    return Measurement(times, Rates(sgemm, 2 * COPY_BYTES / copy))


def target_of(path: Path) -> Target:
    """What a package was tuned for.

    Raises:
        UsageError: if there is no package at ``path``.
    """
    return resolve(load_package(path).runtime.kernels.dispatch.TABLE.target or "")[0]


def bench_package(path: Path, *, rounds: int, note: Note) -> tuple[Target, list[Result]]:
    """Time the kernels of an emitted package against the eager path and what else torch can do.

    Decode steps are left out, and backward kernels without a forward, which no model runs; ``note`` is told.

    Raises:
        UsageError: if there is no package at ``path``.
    """
    package, target = load_package(path), target_of(path)
    entries = read_entries(path)
    results = []
    with threads(target.cores):
        for number, entry in enumerate(entries):
            problem, name = Problem.from_dict(entry["problem"]), entry["backend"]
            if not _timed_here(problem, note):
                continue
            forward = problem.replace(pass_="forward")
            if problem.pass_ == "backward" and find_entry(package, forward, "cpu", name) is None:
                note(f"{problem} left out: the package has no forward kernel to train with")
                continue
            note(f"{number + 1}/{len(entries)} {problem}")
            kernel = Contender(name, problem, run_of(package.memory_caching, name))
            result = _compare(kernel, Config.of(entry["config"]), baselines(problem), rounds, note)
            results.append(replace(result, shares=shares(from_dict(entry["outcome"]))))
    return target, results


def bench_defaults(*, rounds: int, note: Note) -> tuple[Target, list[Result]]:
    """Time the eager path against torch.compile of it, over the quick workload at its middle segment length."""
    target, _ = resolve("cpu")
    cases = load_workload("quick").cases
    results = []
    with threads(target.cores):
        for number, case in enumerate(cases):
            lengths = case.segment_lengths
            problem = case.problem.replace(segment_length=lengths[len(lengths) // 2] if lengths else None)
            if not _timed_here(problem, note):
                continue
            note(f"{number + 1}/{len(cases)} {problem}")
            results.append(_compare(eager(problem), Config.of({}), baselines(problem)[1:], rounds, note))
    return target, results


def _timed_here(problem: Problem, note: Note) -> bool:
    if problem.pass_ == "decode":
        note(f"{problem} left out: benchmarks/decode.py times decode steps")
    return problem.pass_ != "decode"


def described(target: Target, rates: Sequence[Rates]) -> dict[str, Any]:
    """The environment of a benchmark: versions, hardware, threads, and the medians of the measured rates."""
    typical = Rates(statistics.median(r.sgemm for r in rates), statistics.median(r.copy for r in rates))
    return {**environment(target), "threads": target.cores, **typical.to_dict()}


def baselines(problem: Problem) -> list[Contender]:
    """What a kernel is set against: the eager path first, then what else torch can do."""
    return [eager(problem), vmap_of_grad(problem) if problem.deep else compiled(problem)]


def eager(problem: Problem) -> Contender:
    """mctune's vectorised torch implementation."""
    return Contender("eager", problem, run_of(memory_caching, "eager"))


def compiled(problem: Problem) -> Contender:
    """torch.compile of the eager path."""
    function: Callable[..., torch.Tensor] = torch.compile(memory_caching)
    return Contender("torch.compile", problem, run_of(function, "eager"), optional=True)


def vmap_of_grad(problem: Problem) -> Contender:
    """A deep memory by ``torch.func``; torch.compile leaves the eager path of one alone."""
    return Contender("vmap(grad)", problem, run_of(vmapped), optional=True)


def run_of(function: Callable[..., torch.Tensor], backend: str | None = None) -> Run:
    """``function``, called like ``memory_caching``; for a backward, a training step: the gradients by autograd."""
    operation = function if backend is None else partial(function, backend=backend)

    def run(problem: Problem, inputs: Inputs) -> Results:
        if problem.pass_ == "backward":
            return gradients(operation, problem, inputs, inputs.q.dtype)
        return {"y": operation(**inputs.arguments(problem))}

    return run


def _compare(judged: Contender, config: Config, baselines: list[Contender], rounds: int, note: Note) -> Result:
    measured = measure([judged, *baselines], rounds=rounds, note=note)
    times = dict(measured.times)
    timed = times.pop(judged.name)
    name = f"{judged.name} step" if judged.problem.pass_ == "backward" else judged.name
    return Result(judged.problem, name, config, timed, times, measured.rates)


def _inputs(problem: Problem, seed: int) -> Inputs:
    # For ssc, a choice that flips sends a gradient to every token of the other segment.
    return decided_inputs(problem, seed) if problem.pass_ == "backward" else make_inputs(problem, seed)


def _bind(contender: Contender, inputs: Inputs) -> Callable[[], Results]:
    return lambda: contender.run(contender.problem, inputs)


def _oracle(problem: Problem, inputs: Inputs) -> Results:
    if problem.deep and problem.pass_ == "backward":
        # The oracle's autograd would keep the state of every token. Elsewhere the eager path is held to the oracle.
        return gradients(partial(memory_caching, backend="eager"), problem, inputs, torch.float64)
    # The oracle's operations are too small to gain from threads.
    with threads(1):
        return PASSES[problem.pass_].expected(problem, inputs)


def _check(contender: Contender, results: Results, wanted: Results) -> float:
    """The error of the results, as ``error_of`` has it.

    ssc's choice is discontinuous: where two logits are closer than rounding, a right y may come from the other segment.
    So the one token in a thousand that is farthest off is left out of its comparison.
    """
    problem = contender.problem
    if problem.reads.sparse and set(results) == {"y"} and results["y"].shape == wanted["y"].shape:
        y, reference = results["y"], wanted["y"]
        off = (y.double() - reference).square().sum(-1).flatten()
        kept = off.argsort()[: off.numel() - int(_UNDECIDED * off.numel())]
        results, wanted = {"y": y.flatten(0, 2)[kept]}, {"y": reference.flatten(0, 2)[kept]}
    error = error_of(results, wanted)
    if not error <= tolerance(problem):
        raise MctuneError(f"{contender.name} is wrong on {problem}: error {error:.2e} over {tolerance(problem):.0e}")
    return error


def _sgemm(M: int, K: int, N: int) -> Callable[[], object]:
    a, b, c = torch.randn(M, K), torch.randn(K, N), torch.empty(M, N)
    return lambda: torch.mm(a, b, out=c)


def _copy() -> Callable[[], object]:
    source, destination = torch.zeros(COPY_BYTES // 4), torch.zeros(COPY_BYTES // 4)
    return lambda: destination.copy_(source)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch computes with ``count`` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
