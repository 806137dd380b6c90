"""``mctune bench``: tuned kernels beside the eager path and torch.compile of it, in one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mctune.cli._output import json_option, print_json, say, text_table

if TYPE_CHECKING:
    from mctune.core.target import Target
    from mctune.measure.bench import Result

_HEADER = ("problem", "backend", "ms (20% to 80%)", "best baseline", "speedup", "of the bound")


@click.command()
@click.argument("package", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Repeats of each function.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the JSON here too.")
@json_option
def command(package: Path | None, rounds: int, out: Path | None, as_json: bool) -> None:
    """Time every kernel of PACKAGE side by side with mctune's eager path and torch.compile of that.

    One process, rotated order, cold caches, after a check against the float64 oracle; beside them torch's own matrix
    product and a copy, whose rates give the bound. Without PACKAGE, the eager path against torch.compile of it, over
    the quick workload. `mctune report` reads the JSON.
    """
    from mctune.measure.bench import bench_defaults, bench_package

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
    measured = data["environment"]
    say(f"torch's sgemm {measured['matrix_gflops']:.0f} GFLOP/s, copy {measured['copy_gbs']:.1f} GB/s, "
        f"{measured['threads']} threads")  # fmt: skip


def document(target: Target, results: Sequence[Result]) -> dict[str, Any]:
    """What `mctune report` reads: rows and their environment; the rates that go with each row stand beside them."""
    from mctune.core.environment import versions
    from mctune.measure.bench import described
    from mctune.report.rows import Row

    made_with = versions()
    rows = [
        Row.of(
            target.name,
            result.problem,
            result.backend,
            result.config,
            result.timed,
            baselines={name: timed.ms for name, timed in result.baselines.items()},
            fraction_of_bound=result.fraction_of_bound,
            versions=made_with,
        )
        for result in results
    ]
    return {
        "rows": [row.to_dict() for row in rows],
        "rates": [result.rates.to_dict() for result in results],
        "environment": described(target, [result.rates for result in results]),
    }


def write(path: Path, data: dict[str, Any]) -> None:
    """``data`` as JSON in ``path``, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


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
