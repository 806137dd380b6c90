"""``mctune bench``: tuned kernels beside the eager path and torch.compile of it, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mctune.cli._output import json_option, print_json, say, text_table
from mctune.core.errors import UsageError
from mctune.core.outcome import shares_text

_HEADER = ("problem", "backend", "ms (20% to 80%)", "best baseline", "speedup", "of the bound")


@click.command()
@click.argument("package", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Repeats of each function.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the JSON here too.")
@click.option("--gpu", "on_gpu", is_flag=True, help="Without PACKAGE: the GPU of this machine instead of its CPU.")
@click.option("--budget", type=click.FloatRange(min=0), metavar="SECONDS", help="On a GPU: begin no shape after that.")
@click.option("--small", is_flag=True, help="On a GPU: tiny shapes, a rehearsal whose times mean nothing.")
@json_option
def command(
    package: Path | None,
    rounds: int,
    out: Path | None,
    on_gpu: bool,
    budget: float | None,
    small: bool,
    as_json: bool,
) -> int:
    """Time the kernels of PACKAGE side by side with mctune's eager path and torch.compile of that.

    One process, rotated order, cold caches, after a check against the float64 oracle; beside them torch's own matrix
    product and a copy, whose rates give the bound. Without PACKAGE, the eager path against torch.compile of it, over
    the quick workload. `mctune report` reads the JSON. A backward is timed as a training step, forward and backward.
    Deep memories are set against vmap(grad) of torch.func instead. Decode steps are left out: benchmarks/decode.py
    times them.

    A package of GPU kernels is set against what people use there: torch's attention, FlashAttention 3,
    flash-linear-attention and torch.compile, shape by shape, those that decide first. FILE (build/gpu/benchmark.json
    unless given) is then written as rows come, and the same command goes on where an earlier one ended.
    """
    from mctune.measure.bench import bench_defaults, bench_package, target_of
    from mctune.measure.documents import document, write

    if on_gpu or (package is not None and not target_of(package).on_cpu):
        return _on_gpu(package, rounds, out, budget, small, as_json)
    if budget is not None or small:
        raise UsageError("--budget and --small are for a package of GPU kernels, or with --gpu")
    if package is None:
        target, results = bench_defaults(rounds=rounds, note=say)
    else:
        target, results = bench_package(package, rounds=rounds, note=say)
    data = document(target, results)
    if out is not None:
        write(out, data)
    if as_json:
        print_json(data)
    else:
        click.echo(text_table(_HEADER, [_line(row) for row in data["rows"]]))
        for result in results:
            if len(result.shares) > 1:
                click.echo(f"where the time of {result.problem} goes, by its search: {shares_text(result.shares)}")
    measured = data["environment"]
    say(f"torch's sgemm {measured['matrix_gflops']:.0f} GFLOP/s, copy {measured['copy_gbs']:.1f} GB/s, "
        f"{measured['threads']} threads")  # fmt: skip
    return 0


def _on_gpu(
    package: Path | None, rounds: int, out: Path | None, budget: float | None, small: bool, as_json: bool
) -> int:
    """The comparison on this machine's GPU, in processes of its own."""
    from mctune.measure.gpu.run import compare

    if as_json:
        raise UsageError("--json with a GPU: the rows are in the file of --out, which is JSON")
    return compare(
        [
            *("--rounds", str(rounds)),
            *(("--out", str(out)) if out is not None else ()),
            *(("--package", str(package)) if package is not None else ()),
            *(("--budget", str(budget)) if budget is not None else ()),
            *(("--small",) if small else ()),
        ]
    )


def _line(values: dict[str, Any]) -> tuple[str, ...]:
    from mctune.report.rows import Row

    row = Row.from_dict(values)
    best, bound = row.best_baseline, row.fraction_of_bound
    return (
        str(row.problem),
        row.backend,
        f"{row.ms:.3f} ({row.low:.3f} to {row.high:.3f})",
        f"{best[0]} {best[1]:.3f}" if best else "-",
        f"{row.speedup:.2f}x" if row.speedup else "-",
        f"{bound:.0%}" if bound is not None else "-",
    )
