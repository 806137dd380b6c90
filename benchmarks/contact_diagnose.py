"""Which kernel is not right, and in which form it is: what `benchmarks/contact.py` asks when a comparison fails.

First the operations of one step are watched: the first whose results differ from run to run has the race, and the first
whose results differ from those of products by mma.sync, which share no hazard with the others, is the wrong one. Then
every form of :mod:`mctune.backends.triton.safe` is tried on all kernels, and those that help on each by itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from contact_ahead import Job
from contact_guard import Facts
from contact_kernels import Kernels, Leaves, step_of, wrap
from contact_steps import Steps

if TYPE_CHECKING:
    from mctune.core.config import Config

FORMS = ("warps", "stages", "operand", "mma", "ptxas")
SUSPECTS = ("states", "dstates", "dgroup", "dkv", "dq")
RUNS = 10
OFF = 3e-2
"""RMS ratio beyond which two right results of an operation may not differ."""


@dataclass(frozen=True)
class Form:
    """A trial: the configurations of forward and backward in one of the forms, with its variables.

    ``only``: the prefix of the one kernel that is in that form; all are without.
    """

    aggregation: str
    form: str
    only: str | None
    configs: Mapping[str, Config]
    variables: Mapping[str, str]

    def __str__(self) -> str:
        return f"form {self.form}{f' of {self.only}' if self.only else ''} {self.aggregation}"

    def jobs(self, kernels: Kernels) -> list[Job]:
        """What it has compiled."""
        pairs = kernels.pairs(self.aggregation, **self.configs)
        return [Job(f"{self} {problem.pass_}", problem, config, variables=tuple(self.variables.items()))
                for problem, config in pairs]  # fmt: skip


def _suspected(prefix: str) -> tuple[int, str]:
    """Those whose kernels show most of the known hazards first."""
    return (SUSPECTS.index(prefix) if prefix in SUSPECTS else len(SUSPECTS), prefix)


def trials(
    kernels: Kernels, aggregation: str, forms: Iterable[str], ptxas: str | None, each: bool = False
) -> list[Form]:
    """One for every form on all kernels or, with ``each``, on each by itself; those that change something."""
    from mctune.backends import get_backend
    from mctune.backends.triton.safe import ENVIRONMENT, environment, prefixes, safe

    pairs = {problem.pass_: (problem, config) for problem, config in kernels.pairs(aggregation)}
    every: list[str | None] = [None]
    if each:
        every = sorted({prefix for _, config in pairs.values() for prefix in prefixes(config)}, key=_suspected)
    found = []
    for only, form in product(every, list(forms)):
        variables = environment(form, ptxas)
        if variables is None or (only and form in ENVIRONMENT):
            continue
        configs = {}
        for pass_, (problem, config) in pairs.items():
            chosen = None if only is None else [prefix for prefix in prefixes(config) if prefix == only]
            space = get_backend("triton").space(problem)
            configs[pass_] = safe(config, space, problem, kernels.target, (form,), chosen) or config
        if variables or any(configs[pass_] != config for pass_, (_, config) in pairs.items()):
            found.append(Form(aggregation, form, only, configs, variables))
    return found


@dataclass(frozen=True)
class Search:
    """For the kernel of an aggregation that is not right.

    Attributes:
        step: runs a step on the GPU: name, what, most seconds.
        compile: begins to compile jobs; prepare: waits for those whose names begin so, for so many seconds at most.
        until: of ``time.monotonic``.
    """

    steps: Steps
    facts: Facts
    folder: Path
    step: Callable[[str, Callable[[], object], float], str]
    compile: Callable[[Sequence[Job]], None]
    prepare: Callable[[str, float], None]
    until: float

    def run(self, aggregation: str) -> None:
        """Facts: the first operations to differ or to be off, and the forms that are right."""
        kernels = self.steps.kernels
        ptxas = next((fact["path"] for fact in self.facts.of("ptxas", which="ptxas")), None)
        whole = trials(kernels, aggregation, FORMS, ptxas)
        self.compile([job for trial in whole for job in trial.jobs(kernels)])
        self._watch(f"watch {aggregation}", aggregation, {}, reference=True)
        right = [trial.form for trial in whole if self._attempt(trial)]
        self._watch(f"watch {aggregation} by mma.sync", aggregation, {"DISABLE_MMA_V3": "1"}, reference=False)
        parts = trials(kernels, aggregation, right, ptxas, each=True)
        self.compile([job for trial in parts for job in trial.jobs(kernels)])
        for trial in parts:
            self._attempt(trial)

    @property
    def left(self) -> float:
        """Seconds."""
        return max(self.until - time.monotonic(), 0.0)

    def _attempt(self, trial: Form) -> bool:
        if not self.left:
            return False
        self.prepare(str(trial), min(self.left, 30.0))
        name = str(trial)
        self.step(name, with_variables(trial.variables, lambda: attempt(self.steps, self.facts, name, trial)),
                  min(self.left, 25.0))  # fmt: skip
        found = self.facts.of("form", step=name)
        return bool(found and found[-1]["right"] and found[-1]["equal"])

    def _watch(self, name: str, aggregation: str, variables: Mapping[str, str], reference: bool) -> None:
        if self.left:
            self.step(
                name,
                with_variables(
                    variables, lambda: watch(self.steps, self.facts, name, aggregation, self.folder, reference)
                ),
                min(self.left, 25.0),
            )


def with_variables(variables: Mapping[str, str], function: Callable[[], object]) -> Callable[[], object]:
    """In a process of its own: the function with these variables of the environment."""

    def run() -> object:
        os.environ.update(variables)
        return function()

    return run


def attempt(steps: Steps, facts: Facts, step: str, trial: Form) -> None:
    """Whether a form is right, and repeats."""
    torch.set_float32_matmul_precision("highest")
    steps.kernels.serve(*steps.kernels.pairs(trial.aggregation, **trial.configs))
    errors = steps.compared(trial.aggregation)
    wrong = {name: off for name, off, limit in errors if not off <= limit}
    equal = steps.repeat(step, trial.aggregation, RUNS, steps.sizes.checked)
    facts.add(
        step, "form", aggregation=trial.aggregation, form=trial.form, only=trial.only, right=not wrong,
        equal=equal, wrong=wrong, variables=dict(trial.variables),
        configs={pass_: config.to_dict() for pass_, config in trial.configs.items()},
    )  # fmt: skip


def watch(steps: Steps, facts: Facts, step: str, aggregation: str, folder: Path, reference: bool) -> None:
    """The results of every operation of a step: the ``reference``'s are kept, and looked at for races; others are held
    to them."""
    from mctune.runtime.kernels import dispatch
    from mctune.verify.judge import poisoned_memory

    steps.kernels.serve(*steps.kernels.pairs(aggregation))
    seen: list[tuple[str, list[torch.Tensor]]] = []
    for entry in dispatch.TABLE.entries:
        wrap(dispatch.launcher(entry), lambda name, made: seen.append((name, [x.detach().clone() for x in made])))
    run = step_of(Leaves.of(steps.data(steps.sizes.checked), aggregation), steps.sizes, aggregation, "triton")
    path = folder / f"operations_{aggregation}.pt"
    with poisoned_memory():
        run()
        first = list(seen)
        if not reference:
            _held(facts, step, aggregation, first, torch.load(path, weights_only=True))
            return
        torch.save([(name, [x.cpu() for x in made]) for name, made in first], path)
        differing = [""] * RUNS
        for number in range(RUNS):
            seen.clear()
            run()
            differing[number] = next(
                (name for (name, made), (_, again) in zip(first, seen, strict=True) if not _equal(made, again)), ""
            )
    names = {name: differing.count(name) for name in dict.fromkeys(differing) if name}
    facts.add(step, "first to differ", aggregation=aggregation, runs=RUNS, operations=names)


def _equal(made: Sequence[torch.Tensor], again: Sequence[torch.Tensor]) -> bool:
    """Bit by bit: NaN equals itself."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(made, again, strict=True)
        if a.numel()
    )


def _held(
    facts: Facts, step: str, aggregation: str, made: Sequence[tuple[str, list[torch.Tensor]]], wanted: Sequence[Any]
) -> None:
    """The first operation whose results are off; those that have other shapes in the other form are passed over."""
    for (name, found), (_, reference) in zip(made, wanted, strict=False):
        for place, (a, b) in enumerate(zip(found, reference, strict=False)):
            if a.shape != b.shape or not a.is_floating_point():
                continue
            a, b = a.float().cpu().nan_to_num(0.0, 0.0, 0.0), b.float().nan_to_num(0.0, 0.0, 0.0)
            off = float((a - b).norm() / b.norm().clamp(min=1e-30))
            facts.add(step, "operation", aggregation=aggregation, operation=name, result=place, error=off,
                      right=bool(off <= OFF))  # fmt: skip
