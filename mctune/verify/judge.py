"""Hold a kernel to the float64 oracle: fresh random inputs, odd sizes, outputs and scratch poisoned with NaN."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mctune.backends.protocol import Kernel
from mctune.core.outcome import Wrong
from mctune.core.problem import Problem
from mctune.reference import error_ratio
from mctune.verify.decided import choice_gap, decided
from mctune.verify.guard import Fault, Guarded, same
from mctune.verify.inputs import Inputs, make_inputs, odd_problems
from mctune.verify.kept import OPTIONAL
from mctune.verify.passes import PASSES, Results

TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""Largest RMS(difference) / RMS(reference) of a right forward or decode result, by dtype of the problem."""
_BACKWARD = 2.5
"""A gradient may be this many times farther off: it is a sum of longer chains."""
_VANISHING = 1e-3
_GAP = 1e-5
"""Logits at the edge of ssc's choice are at least so far apart."""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN: what a kernel does not write, or reads too early, shows in the result."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    # Only the filling of memory is wanted: without warn_only, torch refuses operations that have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (  # type: ignore[attr-defined]
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        True,
    )
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before, warn_only=warned)


def decided_inputs(problem: Problem, seed: int) -> Inputs:
    """Random inputs that float32 can be judged on.

    ssc's choice is discontinuous: where two logits at its edge are closer than float32 rounding, a right kernel may
    read the other segment. Such tokens draw their u again, and where that does not help, all is drawn again.
    """
    while True:
        inputs = decided(problem, make_inputs(problem, seed), seed, _GAP)
        # Of two segments with one mean key, every u leaves the choice open.
        if not problem.reads.sparse or choice_gap(problem, inputs) >= _GAP:
            return inputs
        seed += 1


@dataclass(frozen=True)
class Judged:
    """A problem's inputs, and the oracle's results for them."""

    problem: Problem
    inputs: Inputs
    wanted: Results


def judge(problem: Problem, seed: int) -> Judged:
    """Decided inputs, and the oracle's results for them; one thread, the oracle's work is small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inputs = decided_inputs(problem, seed)
        return Judged(problem, inputs, PASSES[problem.pass_].expected(problem, inputs))
    finally:
        torch.set_num_threads(threads)


def judge_all(problem: Problem, seed: int) -> Iterator[Judged]:
    """The odd relatives of ``problem``, judged."""
    for number, case in enumerate(odd_problems(problem)):
        yield judge(case, seed + 1000 * number)


def save_cases(cases: Iterable[Judged], file: str) -> None:
    """Leave cases to another process, as plain values."""
    plain = [
        {"problem": case.problem.to_dict(), "inputs": case.inputs.to_dict(), "wanted": dict(case.wanted)}
        for case in cases
    ]
    torch.save(plain, file)


def load_cases(file: str) -> list[Judged]:
    """The inverse of :func:`save_cases`."""
    return [
        Judged(Problem.from_dict(one["problem"]), Inputs(**one["inputs"]), one["wanted"])
        for one in torch.load(file, weights_only=True)
    ]


def kept_cases(problem: Problem, seed: int, folder: Path) -> list[Judged]:
    """The odd relatives of ``problem``, judged; from a file in ``folder`` if they are there.

    The oracle takes longer for them than most kernels take for everything. To be called before a candidate has run in
    this process: the file serves those that follow.
    """
    file = folder / f"judged_{hashlib.sha256(f'{seed} {problem.key}'.encode()).hexdigest()[:16]}.pt"
    if file.is_file():
        return load_cases(str(file))
    cases = list(judge_all(problem, seed))
    with written_whole(file) as scratch:
        save_cases(cases, str(scratch))
    return cases


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Where to write what becomes ``file``, in a folder that is made, once it is all there; others may do the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}.tmp")
    yield scratch
    scratch.replace(file)


def run_kernel(kernel: Kernel, problem: Problem, inputs: Inputs) -> Results:
    """What a compiled candidate computes, watched.

    Raises:
        Fault: if it wrote to an input, or beside an array.
    """
    return PASSES[problem.pass_].run(Guarded(kernel), problem, inputs)


Run = Callable[[Problem, Inputs], Results]
"""What is held to the oracle: the results of a problem's inputs."""


def tolerance(problem: Problem) -> float:
    """Largest error of a right result."""
    return TOLERANCE[problem.dtype] * (_BACKWARD if problem.pass_ == "backward" else 1.0)


def error_of(results: Results, wanted: Results) -> float:
    """The largest RMS(difference) / RMS(reference) of any result, inf for NaN, a wrong shape or a missing one.

    A gradient may vanish (that of g at a sequence's first token does): below a thousandth of the largest RMS of all
    results it is held to that thousandth. What a forward may keep for a backward is held to where it is there.
    """
    wanted = {name: x for name, x in wanted.items() if name in results or not name.startswith(OPTIONAL)}
    if set(results) != set(wanted):
        return float("inf")
    sizes = {name: float(x.double().square().mean().sqrt()) if x.numel() else 0.0 for name, x in wanted.items()}
    floor = vanishing({name: size for name, size in sizes.items() if not name.startswith(OPTIONAL)})
    worst = 0.0
    for name, reference in wanted.items():
        if reference.numel() == 0 and results[name].shape == reference.shape:
            continue
        error = error_ratio(results[name], reference)
        if sizes[name] < floor and error < float("inf"):
            error = float((results[name].to(reference) - reference).square().mean().sqrt()) / floor
        worst = max(worst, error)
    return worst


def vanishing(sizes: Mapping[str, float]) -> float:
    """The RMS below which a result is not held to its own, of the RMS of all results."""
    return _VANISHING * max(sizes.values())


def verify_case(run: Run, problem: Problem, seed: int) -> float:
    """The error of one run on fresh random inputs, as :func:`error_of` has it."""
    return _error(run, judge(problem, seed))


def verify(run: Run, problem: Problem, cases: Iterable[Judged], repeats: int = 1, exact: bool = False) -> float | Wrong:
    """The largest error over ``cases``, those of :func:`judge_all`, or what was wrong with the first that failed.

    Every case is run ``repeats`` times, each time held to the oracle and, if ``exact``, to the bits of the first time.
    """
    worst, limit = 0.0, tolerance(problem)
    for case in cases:
        first: Results | None = None
        for number in range(repeats):
            try:
                results = _run(run, case)
            except Fault as fault:
                return Wrong(float("inf"), limit, f"{case.problem}: {fault}")
            error = error_of(results, case.wanted)
            if not error <= limit:
                return Wrong(error, limit, str(case.problem))
            worst, first = max(worst, error), first or results
            if exact and not all(same(x, first[name]) for name, x in results.items()):
                return Wrong(error, limit, f"{case.problem}, where run {number + 1} gave other bits than the first")
    return worst


def _error(run: Run, case: Judged) -> float:
    return error_of(_run(run, case), case.wanted)


def _run(run: Run, case: Judged) -> Results:
    with poisoned_memory():
        return run(case.problem, case.inputs)
