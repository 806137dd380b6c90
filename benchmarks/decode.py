"""One new token over 64 cached states (arXiv:2602.24281) on this CPU: the decode kernel against the best of torch.

Dense GRM (Eq. 8-10) and sparse SSC (Eq. 16-17, top 8) at B1 H4 D64 and at B1 H16 D128, float32: write, logits, softmax,
read. The torch forms, which find the states where the kernel does, contiguous:

    gated       (gamma_i q) side by side times all states on top of one another: one product a head
    weighted    q times each state, then the sum of the results by their gates

each on all states, or on the chosen ones, gathered. Then a deep memory (dla, Eq. 30-31) at H4 D64 E256, where the torch
form is `vmap(grad)` of torch.func for the write and the MLP under vmap for the reads; without kernels the eager path
stands in their place. Every y is held to the float64 oracle first. One process, rotated order, caches warm as they are
from one token to the next; times are medians. The bound is the time that a copy of as many bytes as a step must touch
takes in the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forward import Goal
from torch.func import grad, vmap

from mctune.backends.registry import computes
from mctune.backends.tvm import TvmBackend
from mctune.cli._output import say, text_table
from mctune.core.config import Config
from mctune.core.errors import MctuneError
from mctune.core.outcome import Timed
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.core.work import work
from mctune.measure.bench import Rates, Result, threads
from mctune.measure.documents import document, write
from mctune.measure.timing import summary
from mctune.measure.vmapped import loss
from mctune.measure.vmapped import memory as mlp
from mctune.reference import error_ratio, memory_caching
from mctune.runtime.api.step import memory_caching_step
from mctune.runtime.memory import Rules
from mctune.verify.inputs import Inputs
from mctune.verify.judge import decided_inputs, tolerance
from mctune.verify.package import find_entry, launcher_of, load_package
from mctune.verify.passes import memory_of, options

STATES = 64
# A step's time does not depend on the segment length: short ones keep the oracle cheap.
SMALL = Problem(pass_="decode", aggregation="grm", T=4 * STATES + 2, H=4, Dk=64, Dv=64, segment_length=4)
LARGE = SMALL.replace(H=16, Dk=128, Dv=128)
DEEP = SMALL.replace(recurrence="dla")
PROBLEMS = tuple(p.replace(**ssc) for p in (SMALL, LARGE, DEEP) for ssc in ({}, {"aggregation": "ssc", "top_k": 8}))
FASTER_THAN_TORCH = 3.0
SAMPLE_S = 1e-3
"""How long a function is called over and over for one sample."""

Tensor = torch.Tensor
Step = Callable[[], Tensor]
"""Writes the last token of a row to a memory of those before it; its y, [B, 1, H, Dv]."""


class Torch:
    """The torch forms, over a memory of their own."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        memory = memory_of(problem, inputs, problem.T - 1)
        self.filled = int(memory.filled[0]) + 1
        self.states = memory.states[0][0, :, :STATES].contiguous()
        self.means = memory.descriptors[0, :, :STATES].contiguous()
        self.online, self.key_sum = memory.online[0][0].clone(), memory.key_sum[0].clone()
        self.q, self.k, self.v, self.u = (x[0, -1] for x in (inputs.q, inputs.k, inputs.v, inputs.u))
        self.scale, self.top_k = problem.Dk**-0.5, problem.top_k

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled q, the states that are read, [H, N, Dk, Dv], and the gates, [H, N + 1], the own one last."""
        self.key_sum += self.k
        self.online.baddbmm_(self.k[:, :, None], self.v[:, None])
        past, states = torch.bmm(self.means, self.u[:, :, None])[..., 0], self.states
        if self.top_k is not None:
            past, chosen = past.topk(self.top_k, sorted=False)
            states = states[torch.arange(len(states))[:, None], chosen]
        own = (self.u * self.key_sum).sum(-1, keepdim=True) / self.filled
        return self.q * self.scale, states, torch.cat([past, own], -1).softmax(-1)

    def gated(self) -> Tensor:
        """One product a head."""
        q, states, gamma = self._parts()
        rows = (gamma[:, :-1, None] * q[:, None]).flatten(1)[:, None]
        y = torch.baddbmm(gamma[:, -1:, None] * torch.bmm(q[:, None], self.online), rows, states.flatten(1, 2))
        return y.transpose(0, 1)[None]

    def weighted(self) -> Tensor:
        """One product a state."""
        q, states, gamma = self._parts()
        each = torch.matmul(q[:, None, None], states)[..., 0, :]
        y = torch.baddbmm(gamma[:, -1:, None] * torch.bmm(q[:, None], self.online), gamma[:, None, :-1], each)
        return y.transpose(0, 1)[None]


class Deep:
    """A deep memory in torch.func, of its own states; there is no momentum."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        memory = memory_of(problem, inputs, problem.T - 1)
        self.filled = int(memory.filled[0]) + 1
        self.states = tuple(store[0, :, :STATES].contiguous() for store in memory.states)
        self.means = memory.descriptors[0, :, :STATES].contiguous()
        self.start, self.online = ([layer[0].clone() for layer in x] for x in (memory.start, memory.online))
        self.key_sum, self.top_k = memory.key_sum[0].clone(), problem.top_k
        self.eta = inputs.gates["eta"][0, -1]
        self.q, self.k, self.v, self.u = (x[0, -1] for x in (inputs.q, inputs.k, inputs.v, inputs.u))
        self.scale, residual = problem.Dk**-0.5, problem.Dk == problem.Dv
        self.surprise = vmap(grad(partial(loss, residual=residual, squared=False)))
        self.each = vmap(partial(mlp, residual=residual))
        self.every = vmap(vmap(partial(mlp, residual=residual), (0, None)))

    def step(self) -> Tensor:
        """Write, then read every state or the chosen ones."""
        self.key_sum += self.k
        steps = self.surprise((self.start[0], self.start[1]), self.k, self.v)
        for layer, gradient in zip(self.online, steps, strict=True):
            layer -= self.eta[:, None, None] * gradient
        past, states = torch.bmm(self.means, self.u[:, :, None])[..., 0], self.states
        if self.top_k is not None:
            past, chosen = past.topk(self.top_k, sorted=False)
            states = tuple(store[torch.arange(len(store))[:, None], chosen] for store in states)
        own = (self.u * self.key_sum).sum(-1, keepdim=True) / self.filled
        gamma, q = torch.cat([past, own], -1).softmax(-1), self.q * self.scale
        y = gamma[:, -1:] * self.each((self.online[0], self.online[1]), q)
        return (y + (gamma[:, :-1, None] * self.every(states, q)).sum(1))[None, None]


def torch_forms(problem: Problem, inputs: Inputs) -> dict[str, Step]:
    """What one writes in torch."""
    if problem.deep:
        return {"vmap(grad)": Deep(problem, inputs).step}
    return {"torch, gated": Torch(problem, inputs).gated, "torch, weighted": Torch(problem, inputs).weighted}


def eager(problem: Problem, inputs: Inputs) -> Step:
    """mctune's own step in torch. It counts tokens, so it goes back before each."""
    memory, C = memory_of(problem, inputs, problem.T - 1), problem.segment_length
    cached, filled = memory.cached.clone(), memory.filled.clone()
    assert C is not None
    memory.rules = Rules(problem.recurrence, problem.state_init, C, problem.inner_chunk or 16, problem.Dk == problem.Dv)
    left_out = ("segmentation", "cu_seqlens")
    given = {name: value for name, value in inputs.arguments(problem).items() if name not in left_out}
    given |= {name: given[name][:, -1:] for name in ("q", "k", "v", "u", *inputs.gates)}

    def step() -> Tensor:
        memory.cached, memory.filled = cached.clone(), filled.clone()
        return memory_caching_step(**given, memory=memory, backend="eager")

    return step


def kernel_step(kernel: Any, problem: Problem, inputs: Inputs) -> Step:
    """The decode kernel through its launcher."""
    memory = memory_of(problem, inputs, problem.T - 1)
    q, k, v, u = (x[:, -1:].contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.u))
    given = options(problem, inputs, slice(problem.T - 1, problem.T))
    return lambda: kernel(q, k, v, u, **given, segment_length=problem.segment_length, memory=memory)


def kernel_of(problem: Problem, target: Target, package: Path | None, folder: Path) -> tuple[Config, Any] | None:
    """The kernel of the package that serves the problem, else one of the space's default, built into ``folder``.

    ``None`` where there is no template.
    """
    if package is not None:
        module = load_package(package)
        entry = find_entry(module, problem, "cpu", "tvm")
        if entry is not None:
            return Config.of(entry.record["config"]), launcher_of(module, entry)
        say(f"{package} has no kernel for {problem}; one is built")
    if not computes("tvm", problem):
        say(f"no kernel: {computes('tvm', problem).reason}")
        return None
    backend = TvmBackend()
    space = backend.space(problem)
    config = space.first_valid(lambda candidate: space.valid(candidate, problem, target))
    assert config is not None
    return config, backend.load(problem, config, backend.build(problem, config, target, folder))


def copy_of(size: int) -> Callable[[], object]:
    """Reads and writes ``size`` bytes together, the same ones every time."""
    source, destination = torch.zeros(size // 8), torch.zeros(size // 8)
    return lambda: destination.copy_(source)


def time_hot(functions: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Milliseconds a call of each function in each round; every round starts one function later than the last."""
    samples: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds):
        for offset in range(len(functions)):
            index = (round_ + offset) % len(functions)
            functions[index]()
            calls, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < SAMPLE_S:
                functions[index]()
                calls += 1
            samples[index].append(passed / calls * 1e3)
    return samples


def bench(problem: Problem, package: Path | None, rounds: int) -> Result:
    """Build or load the kernel, check everything, then measure.

    Raises:
        MctuneError: naming the first whose y is wrong.
    """
    target, _ = resolve("cpu")
    with tempfile.TemporaryDirectory() as folder, threads(target.cores), torch.no_grad():
        say(f"{problem}, {STATES} states")
        found = kernel_of(problem, target, package, Path(folder))
        inputs = decided_inputs(problem, 0)
        wanted = memory_caching(**inputs.arguments(problem))[:, -1:]
        steps = {} if found is None else {"tvm": kernel_step(found[1], problem, inputs)}
        steps |= {"eager": eager(problem, inputs), **torch_forms(problem, inputs)}
        errors = {name: error_ratio(step(), wanted) for name, step in steps.items()}
        for name, error in errors.items():
            if not error <= tolerance(problem):
                raise MctuneError(f"{name} is wrong on {problem}: error {error:.2e} over {tolerance(problem):.0e}")
        touched = work(problem).bytes
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        samples = time_hot([*steps.values(), copy_of(touched), lambda: torch.mm(a, b)], rounds)
    times = {}
    for (name, error), of_one in zip(errors.items(), samples, strict=False):
        times[name] = Timed(*summary(of_one), len(of_one), error)
    copied, product = (statistics.median(of_one) / 1e3 for of_one in samples[len(times) :])
    rates = Rates(2.0 * 1024**3 / product, touched / copied)
    first, config = ("eager", Config.of({})) if found is None else ("tvm", found[0])
    return Result(problem, first, config, times.pop(first), times, rates)


def goal(result: Result) -> Goal:
    """What is wanted of the figure, and what it is."""
    problem = result.problem
    best = min(result.baselines, key=lambda name: result.baselines[name].ms)
    slow, fast = result.baselines[best].ms * 1e3, result.timed.ms * 1e3
    return Goal(
        f"times as fast a token of {problem.recurrence} {problem.aggregation}, H{problem.H} {problem.widths}, as the "
        "best torch form",
        FASTER_THAN_TORCH,
        slow / fast,
        f"{best} {slow:.0f} us, kernel {fast:.0f} us, {result.fraction_of_bound:.2f} of the bound",
    )


def table(result: Result) -> str:
    """One line a contender."""
    touched = work(result.problem).bytes
    lines = [
        (
            name,
            f"{timed.ms * 1e3:.0f}",
            f"{timed.low * 1e3:.0f} to {timed.high * 1e3:.0f}",
            f"{touched / timed.ms / 1e6:.1f}",
            f"{timed.ms / result.timed.ms:.2f}",
            f"{touched / result.rates.copy * 1e3 / timed.ms:.0%}",
            f"{timed.error:.1e}",
        )
        for name, timed in [
            ("mctune, tvm kernel" if result.backend == "tvm" else result.backend, result.timed),
            *sorted(result.baselines.items(), key=lambda item: item[1].ms),
        ]
    ]
    return text_table(
        (str(result.problem), "us", "20% to 80%", "GB/s", f"of {result.backend}", "of the bound", "error"), lines
    )


def said(results: Sequence[Result]) -> str:
    """Everything for a person to read."""
    goals = [goal(result) for result in results if result.backend == "tvm"]
    lines = [
        f"{'met   ' if g.met else 'MISSED'} {g.figure:.2f} {g.name}, {g.wanted:g} wanted ({g.explained})" for g in goals
    ]
    return "\n\n".join(table(result) for result in results) + "\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101, help="samples of each contender (default 101)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the figures here; `mctune report` reads it")
    parser.add_argument("--package", type=Path, metavar="DIR", help="take the kernels from this tuned package")
    chosen = parser.parse_args()
    try:
        results = [bench(problem, chosen.package, chosen.rounds) for problem in PROBLEMS]
    except MctuneError as error:
        raise SystemExit(f"decode.py: error: {error}") from error
    print(said(results))
    if chosen.out is not None:
        goals = [goal(result).to_dict() for result in results if result.backend == "tvm"]
        write(chosen.out, {**document(resolve("cpu")[0], results), "goals": goals})


if __name__ == "__main__":
    main()
