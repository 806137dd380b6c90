"""What `make bench` runs: the forward pass of Memory Caching (arXiv:2602.24281) on this CPU against the best of torch.

Dense GRM (Eq. 8-10), gates included, at B1 H4 D64 T4096 and segments of 256, beside torch written two ways:

    one product       every segment's state for every token, gated to zero where it lies in the future: one long GEMM
    loop              a loop over segments, each a GEMM over its own past alone: half the operations

each as it is and through torch.compile; beside mctune's eager path, and beside torch's own sgemm. Then the sparse read
(SSC, Eq. 16-17, top 4) beside the dense one at T16384. Every result is held to the float64 oracle first. All in one
process in rotated order with cold caches; the times are medians.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mctune.backends.tvm import TvmBackend
from mctune.cli._output import say, text_table
from mctune.core.config import Config
from mctune.core.errors import MctuneError
from mctune.core.outcome import Timed
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.core.work import work
from mctune.measure.bench import Contender, Measurement, Result, compiled, eager, fraction_of_bound, measure, threads
from mctune.measure.documents import document, write
from mctune.verify.inputs import Inputs
from mctune.verify.judge import Run, run_kernel
from mctune.verify.package import find_entry, load_package
from mctune.verify.passes import Results

GRM = Problem(aggregation="grm", T=4096, H=4, Dk=64, Dv=64, segment_length=256)
LONG_GRM = GRM.replace(T=16384)
LONG_SSC = LONG_GRM.replace(aggregation="ssc", top_k=4)

DENSE = Config.of(
    {
        "chunk": 64, "rows": 4, "cols": 64, "formulation": "gated", "panel": 2, "unroll": 1, "loop_order": "rows_outer",
        "parallel": "head", "score_rows": 8, "score_lanes": 32, "state_chunk": 32, "state_rows": 8, "state_cols": 32,
    }
)  # fmt: skip
"""Good configurations for the shapes above, for where there is no tuned package."""
SPARSE = DENSE.replace(formulation="gather", rows=8, cols=32, panel=1)


def fitting(config: Config, target: Target) -> Config:
    """``config``, with smaller register tiles where a CPU has sixteen registers of eight floats (AVX2)."""
    if target.vector_floats >= 16:
        return config
    return config.replace(rows=4, cols=16, score_rows=4, score_lanes=16, state_rows=4, state_cols=16)


FASTER_THAN_TORCH = 2.0
OF_SGEMM = 0.80
SSC_FASTER_THAN_DENSE = 3.0

CHUNK = 64
"""Tokens of a chunk of the torch forms: of 64, 128 and 256 the fastest."""

Tensor = torch.Tensor
Form = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Goal:
    """A figure to be reached; ``explained`` says where it comes from."""

    name: str
    wanted: float
    figure: float
    explained: str

    @property
    def met(self) -> bool:
        """Whether it was."""
        return self.figure >= self.wanted

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "met": self.met}


# --- GRM in torch, twice. q, k, v, u [B, T, H, D]; C divides T and is a multiple of the chunk, or less than it.


def one_product(q: Tensor, k: Tensor, v: Tensor, u: Tensor, C: int) -> Tensor:
    """The read of all cached states by all tokens as one product: gated q [T, (N - 1) D] times the states."""
    B, T, H, _ = q.shape
    q, u, online, states, means, own = _parts(q, k, v, u, C)
    future = torch.arange(T // C - 1) >= (torch.arange(T) // C)[:, None]
    past = (u @ means[:, :-1].mT).masked_fill(future, float("-inf"))
    gamma = torch.cat([past, own], -1).softmax(-1)
    gated = (gamma[..., :-1, None] * q[:, :, None]).flatten(2)
    y = torch.baddbmm(gamma[..., -1:] * online, gated, states[:, :-1].flatten(1, 2))
    return y.view(B, H, T, -1).transpose(1, 2).contiguous()


def loop(q: Tensor, k: Tensor, v: Tensor, u: Tensor, C: int) -> Tensor:
    """The same a segment at a time: segment s reads the s states before it and no other."""
    B, T, H, _ = q.shape
    q, u, online, states, means, own = _parts(q, k, v, u, C)
    rows = [online[:, :C]]
    for s in range(1, T // C):
        t = slice(s * C, (s + 1) * C)
        gamma = torch.cat([u[:, t] @ means[:, :s].mT, own[:, t]], -1).softmax(-1)
        gated = (gamma[..., :-1, None] * q[:, t, None]).flatten(2)
        rows.append(torch.baddbmm(gamma[..., -1:] * online[:, t], gated, states[:, :s].flatten(1, 2)))
    return torch.cat(rows, 1).view(B, H, T, -1).transpose(1, 2).contiguous()


def _parts(q: Tensor, k: Tensor, v: Tensor, u: Tensor, C: int) -> tuple[Tensor, ...]:
    """What both forms need, with G = B * H in front.

    Scaled q and u [G, T, D], the online reads [G, T, D], the segments' states [G, N, D, D] and mean keys [G, N, D], the
    logits of each token's own segment [G, T, 1].
    """
    G, T, D, c = q.shape[0] * q.shape[2], q.shape[1], q.shape[3], min(CHUNK, C)
    q, k, v, u = (x.transpose(1, 2).reshape(G, T, D) for x in (q * D**-0.5, k, v, u))
    rows, keys, values = (x.reshape(-1, c, D) for x in (q, k, v))
    writes = (keys.mT @ values).view(G, T // C, C // c, D, D)
    online = ((rows @ keys.mT).tril() @ values).view(G, T // C, C // c, c, D)
    entering = writes.cumsum(2)[:, :, :-1]
    carried = rows.view(online.shape)[:, :, 1:] @ entering
    online = torch.cat([online[:, :, :1], online[:, :, 1:] + carried], 2).view(G, T, D)
    running = k.view(G, T // C, C, D).cumsum(2)
    own = (u.view(G, T // C, C, D) * running).sum(-1) / torch.arange(1, C + 1)
    return q, u, online, writes.sum(2), running[:, :, -1] / C, own.view(G, T, 1)


def torch_form(name: str, problem: Problem, form: Form, *, optional: bool = False) -> Contender:
    """A form as something that can be checked and timed."""
    C = problem.segment_length
    assert C is not None and problem.T % C == 0
    return Contender(name, problem, lambda _, x: {"y": form(x.q, x.k, x.v, x.u, C)}, optional)


def baselines(problem: Problem) -> list[Contender]:
    """Every torch form of dense GRM, each as it is and compiled."""
    found = [eager(problem), compiled(problem)]
    for name, form in (("one product", one_product), ("loop", loop)):
        found.append(torch_form(name, problem, form))
        found.append(torch_form(f"{name}, torch.compile", problem, torch.compile(form), optional=True))
    return found


# --- Our kernels.


@dataclass(frozen=True)
class Ours:
    """A kernel of ours and its configuration."""

    config: Config
    run: Run


def ours(problem: Problem, config: Config, target: Target, package: Path | None, folder: Path) -> Ours:
    """The kernel of the package that serves the problem, else one that is built into ``folder`` with ``config``."""
    if package is not None:
        module = load_package(package)
        entry = find_entry(module, problem, "cpu", "tvm")
        if entry is not None:
            return Ours(Config.of(entry.record["config"]), _of_package(module.memory_caching))
        say(f"{package} has no kernel for {problem}; one is built")
    backend = TvmBackend()
    kernel = backend.load(problem, config, backend.build(problem, config, target, folder))
    return Ours(config, lambda case, inputs: run_kernel(kernel, case, inputs))


def _of_package(memory_caching: Callable[..., Tensor]) -> Run:
    def run(problem: Problem, inputs: Inputs) -> Results:
        return {"y": memory_caching(**inputs.arguments(problem), backend="tvm")}

    return run


# --- The two comparisons.


@dataclass(frozen=True)
class Bench:
    """What was measured: dense GRM against torch, and the sparse read against the dense one, on longer rows."""

    dense: Result
    long_dense: Result
    long_sparse: Result

    @property
    def results(self) -> tuple[Result, ...]:
        """All of them."""
        return self.dense, self.long_dense, self.long_sparse

    def goals(self) -> list[Goal]:
        """What is wanted of the figures, and what they are."""
        best = min(self.dense.baselines, key=lambda name: self.dense.baselines[name].ms)
        sgemm, rate = self.dense.rates.sgemm, operations(self.dense) / self.dense.timed.ms * 1e3
        return [
            Goal(
                "times the best torch form",
                FASTER_THAN_TORCH,
                self.dense.baselines[best].ms / self.dense.timed.ms,
                f"{best} {self.dense.baselines[best].ms:.2f} ms, kernel {self.dense.timed.ms:.2f} ms",
            ),
            Goal(
                "of the rate of sgemm",
                OF_SGEMM,
                rate / sgemm,
                f"{rate / 1e9:.0f} of {sgemm / 1e9:.0f} GFLOP/s, counting the operations of the kernel's chunks of "
                f"{self.dense.config['chunk']} (causal half); {self.dense.fraction_of_bound:.2f} counting the fewest",
            ),
            Goal(
                "times as fast, ssc as dense grm",
                SSC_FASTER_THAN_DENSE,
                self.long_dense.timed.ms / self.long_sparse.timed.ms,
                f"dense {self.long_dense.timed.ms:.1f} ms, ssc {self.long_sparse.timed.ms:.1f} ms",
            ),
        ]


def operations(result: Result) -> int:
    """Operations of the problem in chunks as long as the kernel's."""
    assert result.problem.segment_length is not None
    return work(result.problem, min(result.config.integer("chunk"), result.problem.segment_length)).operations


def bench(dense: Problem, long_dense: Problem, long_sparse: Problem, package: Path | None, rounds: int) -> Bench:
    """Build or load the kernels, then measure."""
    target, _ = resolve("cpu")
    with tempfile.TemporaryDirectory() as scratch, threads(target.cores):
        kernels = [
            ours(problem, fitting(config, target), target, package, Path(scratch))
            for problem, config in ((dense, DENSE), (long_dense, DENSE), (long_sparse, SPARSE))
        ]
        first, second, third = kernels
        say(f"{dense}: compiling the torch forms")
        measured = measure([Contender("tvm", dense, first.run), *baselines(dense)], rounds=rounds, note=say)
        say(f"{long_dense} beside {long_sparse}")
        longer = measure(
            [
                Contender("grm tvm", long_dense, second.run),
                Contender("ssc tvm", long_sparse, third.run),
                Contender("grm eager", long_dense, eager(long_dense).run),
                Contender("ssc eager", long_sparse, eager(long_sparse).run),
            ],
            rounds=rounds,
            note=say,
        )
    return Bench(
        _result(dense, first.config, measured, "tvm", [name for name in measured.times if name != "tvm"]),
        _result(long_dense, second.config, longer, "grm tvm", ["grm eager"]),
        _result(long_sparse, third.config, longer, "ssc tvm", ["ssc eager"]),
    )


def _result(problem: Problem, config: Config, measured: Measurement, name: str, others: Sequence[str]) -> Result:
    against = {other.removeprefix(f"{problem.aggregation} "): measured.times[other] for other in others}
    return Result(problem, "tvm", config, measured.times[name], against, measured.rates)


# --- What is said about it.


def table(result: Result) -> str:
    """One line a contender: GFLOP/s by the kernel's own count of operations, and how many times as long it took."""
    counted = operations(result)

    def line(name: str, timed: Timed) -> tuple[str, ...]:
        bound = fraction_of_bound(result.problem, timed.ms, result.rates)
        return (
            name,
            f"{timed.ms:.2f}",
            f"{timed.low:.2f} to {timed.high:.2f}",
            f"{counted / timed.ms / 1e6:.0f}",
            f"{timed.ms / result.timed.ms:.2f}",
            f"{bound:.0%}",
            f"{timed.error:.1e}",
        )

    header = (str(result.problem), "ms", "20% to 80%", "GFLOP/s", "of kernel", "of the bound", "error")
    lines = [line("mctune, tvm kernel", result.timed)]
    lines += [line(name, timed) for name, timed in sorted(result.baselines.items(), key=lambda item: item[1].ms)]
    return text_table(header, lines)


def said(found: Bench) -> str:
    """Everything for a person to read."""
    parts = [table(result) for result in found.results]
    rates = found.dense.rates
    parts.append(f"torch's sgemm {rates.sgemm / 1e9:.0f} GFLOP/s, copy {rates.copy / 1e9:.1f} GB/s, in the same rounds")
    parts += [
        f"{'met   ' if goal.met else 'MISSED'} {goal.figure:.2f} {goal.name}, {goal.wanted:g} wanted ({goal.explained})"
        for goal in found.goals()
    ]
    return "\n\n".join(parts[:3]) + "\n\n" + "\n".join(parts[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="repeats of each contender (default 21)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the figures here; `mctune report` reads it")
    parser.add_argument("--package", type=Path, metavar="DIR", help="take the kernels from this tuned package")
    options = parser.parse_args()
    try:
        found = bench(GRM, LONG_GRM, LONG_SSC, options.package, options.rounds)
    except MctuneError as error:
        raise SystemExit(f"forward.py: error: {error}") from error
    print(said(found))
    if options.out is not None:
        goals = [goal.to_dict() for goal in found.goals()]
        write(options.out, {**document(resolve("cpu")[0], found.results), "goals": goals})


if __name__ == "__main__":
    main()
