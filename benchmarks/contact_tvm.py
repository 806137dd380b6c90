"""TVM's kernels for `benchmarks/contact.py`: compiled ahead, for a machine with a GPU and without TVM.

    python benchmarks/contact_tvm.py --arch sm_90 --out build/wheelhouse/cuda

compiles GRM, forward and backward, by every instruction kind that the architecture runs, those of sm_70 and sm_75 too,
whose fragment layouts one run on a newer GPU confirms. The step holds each to the eager path in float32, repeats it,
and times it beside Triton's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from contact_guard import told  # noqa: E402
from contact_kernels import SMALL, Leaves, Sizes, differing, error_of, step_of  # noqa: E402

if TYPE_CHECKING:
    from contact_steps import Steps

    from mctune.core.problem import Problem
    from mctune.core.target import Target

INDEX = "index.json"
INSTRUCTIONS = ("m16n8k16", "m16n8k8", "m8n8k4")
PASSES = ("forward", "backward")


def problem_of(sizes: Sizes, pass_: str) -> Problem:
    """GRM in float16, which every instruction kind takes."""
    return replace(sizes, dtype="float16").problem(pass_, "grm")


def build(sizes: Sizes, target: Target, folder: Path, instructions: Sequence[str] = INSTRUCTIONS) -> None:
    """Compile kinds into ``folder``, and list them in its index."""
    from mctune.backends import get_backend

    backend, entries = get_backend("tvm.gpu").measuring(), []
    folder.mkdir(parents=True, exist_ok=True)
    for instruction in instructions:
        for pass_ in PASSES:
            problem = problem_of(sizes, pass_)
            space = backend.space(problem)
            starts = (config.replace(instruction=instruction) for config in (space.default, *space.fallbacks))
            config = next(one for one in starts if space.valid(one, problem, target))
            built = backend.build(problem, config, target, folder)
            entries.append(
                {
                    "instruction": instruction, "kernel": built.library.name, "problem": problem.to_dict(),
                    "config": config.to_dict(), "parts": dict(built.parts),
                }
            )  # fmt: skip
    text = json.dumps({"arch": target.arch, "entries": entries}, indent=1)
    (folder / INDEX).write_text(f"{text}\n", encoding="utf-8")


def compiled(folder: Path, arch: str) -> list[dict[str, Any]]:
    """What was compiled for an architecture, none if nothing was."""
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [dict(entry) for entry in found["entries"]] if found["arch"] == arch else []


def serve(entries: list[dict[str, Any]], folder: Path, target: str) -> None:
    """From now on ``memory_caching(backend="tvm")`` takes these, in this process."""
    from mctune.runtime.kernels import dispatch
    from mctune.runtime.kernels.table import Entry, Table

    records = [{**entry, "backend": "tvm", "device": "cuda"} for entry in entries]
    found = tuple(Entry(record["problem"], "tvm", folder / record["kernel"], record) for record in records)
    dispatch.TABLE = Table(found, target)


def step(steps: Steps, name: str, folder: Path, on_cpu: Path | None = None) -> None:
    """Each kind: right, equal in repeats, and how long; facts of it. ``on_cpu``: of :func:`prepare_rehearsal`."""
    import torch

    if on_cpu is not None:
        from mctune.verify.cuda_cpu.folder import environment

        os.environ.update(environment(on_cpu))
    from mctune.verify.judge import poisoned_memory, tolerance

    torch.set_float32_matmul_precision("highest")
    sizes, kernels = replace(steps.sizes, dtype="float16"), steps.kernels
    every = compiled(folder, kernels.target.arch)
    if not every:
        steps.facts.add(name, "left out", name="tvm", error=f"nothing in {folder} is for {kernels.target.arch}")
        return
    data = steps.data(sizes.checked)
    for field in ("q", "k", "v", "u", "dy"):
        setattr(data, field, getattr(data, field).to(torch.float16))
    wanted = step_of(Leaves.of(data, "grm", torch.float32), sizes, "grm", "eager")()
    limit = tolerance(problem_of(sizes, "backward"))
    calls: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {}
    for instruction, entries in _kinds(every):
        serve(entries, folder, kernels.target.name)
        kind = f"tvm {instruction}"
        try:
            run = step_of(Leaves.of(data, "grm"), sizes, "grm", "tvm")
            with poisoned_memory():
                first = {tensor: x.clone() for tensor, x in run().items()}
            lost = [tensor for _ in range(sizes.repeats) for tensor in differing(first, run())]
        except Exception as error:
            steps.facts.add(name, "left out", name=kind, error=told(error))
            continue
        for tensor, x in first.items():
            off = error_of(x, wanted[tensor], "grm")
            steps.facts.add(name, "compared", aggregation=kind, tensor=tensor, error=off, limit=limit,
                            right=bool(off <= limit), T=sizes.checked)  # fmt: skip
        counts = {tensor: lost.count(tensor) for tensor in dict.fromkeys(lost)}
        steps.facts.add(name, "repeats", aggregation=kind, T=sizes.checked, runs=sizes.repeats, equal=not lost,
                        differing=counts, shares={})  # fmt: skip
        calls |= {f"mctune {kind} {entry['problem']['pass']}": (_launch(steps, entry, folder, sizes), entry)
                  for entry in entries if entry["problem"]["pass"] == "forward"}  # fmt: skip
    _time(steps, name, calls, sizes)


def _kinds(entries: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for instruction in dict.fromkeys(entry["instruction"] for entry in entries):
        yield instruction, [entry for entry in entries if entry["instruction"] == instruction]


def _launch(steps: Steps, entry: dict[str, Any], folder: Path, sizes: Sizes) -> Callable[[], Any]:
    """The forward of one kind at the size that is timed."""
    from contact_steps import read

    from mctune.core.problem import Problem
    from mctune.runtime.kernels.tvm.gpu.matrix.forward import TvmGpuForward

    return read(TvmGpuForward(folder / entry["kernel"], entry), _narrow(steps, sizes), sizes,
                Problem.from_dict(entry["problem"]))  # fmt: skip


def _narrow(steps: Steps, sizes: Sizes) -> Any:
    import torch

    data = steps.data(sizes.timed)
    for field in ("q", "k", "v", "u"):
        setattr(data, field, getattr(data, field).to(torch.float16))
    return data


def _time(steps: Steps, name: str, calls: dict[str, tuple[Callable[[], Any], dict[str, Any]]], sizes: Sizes) -> None:
    """The forwards, and Triton's default beside them."""
    from contact_steps import read

    every = {key: call for key, (call, _) in calls.items()}
    triton = steps.sizes.problem("forward", "grm")
    try:
        launcher = steps.kernels.load(triton, steps.kernels.config(triton))
        every["mctune triton, beside tvm"] = read(launcher, steps.data(sizes.timed), steps.sizes, triton)
        every["mctune triton, beside tvm"]()
    except Exception as error:
        every.pop("mctune triton, beside tvm", None)
        steps.facts.add(name, "left out", name="triton beside tvm", error=told(error))
    for key, (timed, host) in steps.timed(name, every).items():
        entry = calls[key][1] if key in calls else None
        known = {"sizes": triton.to_dict()}
        if entry is not None:
            known = {"problem": entry["problem"], "config": entry["config"], "backend": "tvm"}
        steps.facts.add(name, "timed", name=key, aggregation="grm", part="forward", T=sizes.timed, **timed,
                        host_ms=host, **known)  # fmt: skip


def prepare_rehearsal(target: Target, folder: Path, on_cpu: Path) -> None:
    """Small kernels of the newest kind; their CUDA C, compiled for the CPU, is where the stand-in driver finds it."""
    from mctune.verify.cuda_cpu.folder import environment, prepare_parts

    os.environ.update(environment(on_cpu))
    build(SMALL, target, folder, INSTRUCTIONS[:1])
    for entry in compiled(folder, target.arch):
        prepare_parts(folder, entry["parts"])


def main() -> None:
    from mctune.core.target import targets

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="sm_90", help="default sm_90")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "wheelhouse" / "cuda", metavar="DIR")
    options = parser.parse_args()
    target = next((one for one in targets() if one.arch == options.arch), None)
    if target is None:
        parser.error(f"no target of the registry is {options.arch}; see `mctune targets`")
    build(Sizes(), target, options.out)
    print(f"{options.out}: {len(compiled(options.out, options.arch))} passes for {options.arch}")


if __name__ == "__main__":
    main()
