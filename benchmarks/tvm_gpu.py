"""What is known of TVM's GPU kernels without a GPU: right, without races, in how many registers, and how fast by model.

    python benchmarks/tvm_gpu.py --out results/tvm_gpu

verifies every pass, instruction kind and aggregation by the CUDA C on the CPU, under sanitizers too; compiles the
defaults for every architecture; and predicts passes on GPUs that have no other backend. Nothing is measured. It takes
half an hour on two cores, and keeps what is done: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from mctune.backends.protocol import Launch
from mctune.backends.triton.cost.predict import predict
from mctune.backends.tvm.gpu import nvrtc
from mctune.backends.tvm.gpu.backend import TvmGpuBackend
from mctune.core.config import Config
from mctune.core.environment import versions
from mctune.core.host import usable_cores
from mctune.core.problem import AGGREGATIONS, Problem
from mctune.core.target import Target, resolve
from mctune.core.work import attention_operations, bound, work
from mctune.report.markdown import text_table
from mctune.verify.cuda_cpu.finalist import reports
from mctune.verify.cuda_cpu.folder import environment, prepare_built
from mctune.verify.judge import judge_all, run_kernel, tolerance, verify

KINDS = (("v100", "m8n8k4", "float16"), ("t4", "m16n8k8", "float16"), ("a100", "m16n8k16", "bfloat16"),
         ("t4", "simt", "float32"))  # fmt: skip
"""A GPU, the instruction that is its own, and a dtype for it."""
PASSES = ("forward", "backward", "decode")
ARCHES = {"v100": "sm_70", "t4": "sm_75", "a100": "sm_80", "h100": "sm_90", "rtx5090": "sm_120"}
SHAPES = tuple(product((64, 128), (4096, 16384)))
ATTENTION = {"t4": 21.0, "v100": 40.0}
"""TFLOP/s of torch's attention: inferred from flash-attention #2379 for the T4, a guess for the V100."""


def default(problem: Problem, target: Target, backend: TvmGpuBackend) -> Config:
    """The first default that is valid."""
    space = backend.space(problem)
    found = space.first_valid(lambda config: space.valid(config, problem, target))
    assert found is not None, f"{problem} on {target.name}"
    return found


def held(pass_: str, kind: tuple[str, str, str], aggregation: str, folder: Path) -> dict[str, Any]:
    """One pass of one kind against the oracle and under sanitizers; swla from checkpoints takes every branch."""
    gpu, instruction, dtype = kind
    os.environ.update(environment(folder / "cuda_on_cpu"))
    target, backend = resolve(gpu)[0], TvmGpuBackend()
    problem = Problem(
        pass_=pass_, recurrence="swla", aggregation=aggregation, state_init="checkpoint", T=200, H=2, Dk=32, Dv=32,
        segment_length=64, dtype=dtype, top_k=2 if AGGREGATIONS[aggregation].sparse else None,
    )  # fmt: skip
    config = default(problem, target, backend)
    built = backend.build(problem, config, target, folder)
    prepare_built(built)
    kernel = backend.load(problem, config, built)
    error = verify(partial(run_kernel, kernel), problem, judge_all(problem, 0))
    said = reports(problem, config, built, folder / "sanitized", 0)
    return {
        "pass": pass_, "instruction": instruction, "dtype": dtype, "aggregation": aggregation,
        "error": error if isinstance(error, float) else None, "tolerance": tolerance(problem), "sanitizers": said,
    }  # fmt: skip


def launches(problem: Problem, gpu: str, folder: Path) -> tuple[Config, Target, tuple[Launch, ...]]:
    """What the default launches."""
    target, backend = resolve(gpu)[0], TvmGpuBackend()
    config = default(problem, target, backend)
    found = backend.compile(problem, config, backend.build(problem, config, target, folder), target)
    assert isinstance(found, tuple), found
    return config, target, found


def resources(pass_: str, D: int, gpu: str, folder: Path) -> dict[str, Any]:
    """Registers and stack of every kernel of a default."""
    problem = Problem(
        pass_=pass_, recurrence="swla", aggregation="grm", T=4096, H=16, Dk=D, Dv=D, segment_length=256,
        state_init="checkpoint", dtype="float16",
    )  # fmt: skip
    _, target, found = launches(problem, gpu, folder)
    kernels = {one.name.removesuffix("_kernel"): [one.registers, one.spills, one.shared] for one in found}
    return {"pass": pass_, "D": D, "arch": target.arch, "kernels": kernels}


def forward_of(D: int, T: int) -> Problem:
    """The forward that is predicted."""
    return Problem(T=T, H=16, Dk=D, Dv=D, segment_length=256, aggregation="grm", dtype="float16")


def least_ms(gpu: str, D: int, T: int) -> float:
    """What the forward takes at the GPU's peak rates."""
    target = resolve(gpu)[0]
    assert target.matrix_tflops is not None and target.dram_gbs is not None
    return 1e3 * bound(work(forward_of(D, T)), 1e12 * target.matrix_tflops, 1e9 * target.dram_gbs)


def predicted(gpu: str, D: int, T: int, folder: Path) -> dict[str, Any]:
    """The default's forward and backward by the cost model, and causal attention's at its rate."""
    forward, ms = forward_of(D, T), []
    for problem in (forward, forward.replace(pass_="backward")):
        config, target, found = launches(problem, gpu, folder)
        ms.append(predict(found, problem, config, target).ms)
    attention = attention_operations(forward) / (ATTENTION[gpu] * 1e9) if gpu in ATTENTION else None
    return {"gpu": gpu, "D": D, "T": T, "forward_ms": ms[0], "step_ms": sum(ms), "attention_ms": attention}


def jobs(folder: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every row by its name."""
    for pass_, kind, aggregation in product(PASSES, KINDS, AGGREGATIONS):
        yield f"held {pass_} {kind[1]} {aggregation}", partial(held, pass_, kind, aggregation, folder)
    for pass_, D, gpu in product(PASSES, (64, 128), ARCHES):
        yield f"resources {pass_} {D} {gpu}", partial(resources, pass_, D, gpu, folder)
    for gpu, (D, T) in product(("t4", "v100", "a100"), SHAPES):
        yield f"predicted {gpu} {D} {T}", partial(predicted, gpu, D, T, folder)


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The tables."""
    checked = [row for name, row in rows.items() if name.startswith("held")]
    lines = [(row["pass"], row["instruction"], row["dtype"], row["aggregation"],
              "wrong" if row["error"] is None else f"{row['error']:.1e}", row["sanitizers"] or "no report")
             for row in checked]  # fmt: skip
    parts = [
        "# TVM's GPU kernels, without a GPU",
        "By `python benchmarks/tvm_gpu.py`. **Nothing here was measured on a GPU**: kernels are held to the float64 "
        "oracle and to sanitizers by their CUDA C on a CPU (docs/cuda-on-cpu.md), compiled by NVRTC, and timed by the "
        "cost model.",
        "## Against the oracle",
        "`swla` from checkpoints, D32, segments of 64; RMS error, and what ThreadSanitizer and AddressSanitizer say. "
        f"{len(checked)} rows of {len(PASSES) * len(KINDS) * len(AGGREGATIONS)} are done.",
        _fenced(("pass", "instruction", "dtype", "aggregation", "error", "sanitizers"), lines),
        "## Registers and stack",
        "Of the defaults in float16 (`swla`, GRM, checkpoints, segments of 256): registers a thread, and bytes of "
        "stack where there are any.",
    ]
    for pass_, D in product(PASSES, (64, 128)):
        found = [row for name, row in rows.items() if name.startswith(f"resources {pass_} {D} ")]
        names = list(dict.fromkeys(kernel for row in found for kernel in row["kernels"]))
        cells = [(name, *(_taken(row["kernels"].get(name)) for row in found)) for name in names]
        parts += [f"{pass_}, D{D}", _fenced(("kernel", *(row["arch"] for row in found)), cells)]
    lines = [(row["gpu"], str(row["D"]), str(row["T"]), f"{row['forward_ms']:.2f}",
              f"{100 * least_ms(row['gpu'], row['D'], row['T']) / row['forward_ms']:.0f} %", f"{row['step_ms']:.2f}",
              *((f"{row['attention_ms']:.2f}", f"{row['attention_ms'] / row['forward_ms']:.1f}")
                if row["attention_ms"] else ("", "")))
             for name, row in rows.items() if name.startswith("predicted")]  # fmt: skip
    parts += [
        "## Predicted",
        "GRM, linear, H16, float16, segments of 256, the defaults: predicted ms of a forward and of a training step; "
        "of bound: what the forward's operations or bytes take at the GPU's peak rates, over the prediction. "
        "Attention's forward is its operations at 21 TFLOP/s (T4, inferred from flash-attention #2379) and 40 (V100, a "
        "guess).",
        _fenced(("GPU", "D", "T", "forward", "of bound", "step", "attention", "ratio"), lines),
    ]
    return "\n\n".join(parts) + "\n"


def _taken(found: list[int] | None) -> str:
    return "" if found is None else f"{found[0]}" + (f" ({found[1]} B)" if found[1] else "")


def _fenced(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return f"```\n{text_table(header, lines)}\n```"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/tvm_gpu"), metavar="DIR", help="default build/tvm_gpu")
    parser.add_argument(
        "--only", default="", metavar="START", help="rows whose names begin so, for example 'resources'"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "rows.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    made_with = {**versions(), "nvrtc": nvrtc.version(), "templates": TvmGpuBackend().identity()["templates"]}
    if known.get("made_with") != made_with:
        known = {"made_with": made_with, "rows": {}}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(usable_cores()) as pool:
        wanted = dict(jobs(Path(folder)))
        left = {
            name: job for name, job in wanted.items() if name.startswith(options.only) and name not in known["rows"]
        }
        futures = {name: pool.submit(job) for name, job in left.items()}
        for number, (name, future) in enumerate(futures.items()):
            known["rows"][name] = future.result()
            file.write_text(json.dumps(known, indent=1) + "\n")
            print(f"{number + 1}/{len(left)} {name}", file=sys.stderr)
    rows = {name: known["rows"][name] for name in wanted if name in known["rows"]}
    (options.out / "README.md").write_text(page(rows))
    print(page(rows))
    return int(any(row["error"] is None or row["sanitizers"] for name, row in rows.items() if name[:4] == "held"))


if __name__ == "__main__":
    raise SystemExit(main())
