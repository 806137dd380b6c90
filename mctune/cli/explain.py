"""``mctune explain``: what the compiler made of a pass's kernels, and what bounds them."""

from __future__ import annotations

from pathlib import Path

import click

from mctune.cli._cases import parse_problem
from mctune.cli._output import given, json_option, print_json, say
from mctune.core.workload import on_gpu

_PROBLEM = "T=16384,H=16,Dk=128,Dv=128,segment_length=256,aggregation=grm"


@click.command()
@click.option("--gpu", default="h100-sxm", show_default=True, help="Target; it need not be on this machine.")
@click.option("--problem", default=_PROBLEM, show_default=True, help="As `mctune search` takes it.")
@click.option("--set", "chosen", default="", metavar="NAME=VALUE,..", help="Parameters other than the default's.")
@click.option("--backend", type=click.Choice(("auto", "triton", "tvm")), default="auto", show_default=True,
              help="What compiles; auto is the first that serves the GPU.")  # fmt: skip
@click.option("--package", type=click.Path(path_type=Path), metavar="DIR",
              help="Every kernel of this package, or tuned.json, instead of one problem.")  # fmt: skip
@click.option("--markdown", is_flag=True, help="Rows for a page instead of a table.")
@json_option
def command(
    gpu: str, problem: str, chosen: str, backend: str, package: Path | None, markdown: bool, as_json: bool
) -> None:
    """Compile the kernels of a pass for a GPU and print what the compiler says of each.

    Nothing is measured. Of every launch: its grid, registers, stack and shared memory, the instructions of its busiest
    loop by class, how many cycles each unit of a multiprocessor needs for one pass of it, what ptxas remarks, writes to
    shared memory that may come too early, the bytes that it moves, and the time that the cost model predicts. Loops,
    remarks and writes are read from NVIDIA's assembly; of another GPU they are empty.

    With --package and --json it is what `mctune report` keeps with the rows of the package.
    """
    if package is not None:
        _explain_package(package, as_json)
        return
    from mctune.backends import makers
    from mctune.core.problem import Problem
    from mctune.core.target import resolve
    from mctune.measure.explain import chosen_config, explain

    target, note = resolve(gpu)
    if note:
        say(note)
    asked = Problem.from_dict(on_gpu(parse_problem(problem), target.matrix_dtype))
    maker = makers(target, backend)[0]
    explained = explain(asked, chosen_config(asked, target, parse_problem(chosen), maker), target, maker)
    if as_json:
        print_json(explained.to_dict())
    else:
        click.echo(explained.markdown() if markdown else explained.text())


def _explain_package(package: Path, as_json: bool) -> None:
    """Print what the compiler says of every entry of a table; what it cannot compile is said to be left out."""
    from mctune.backends.registry import maker_of
    from mctune.core.errors import MctuneError, UsageError
    from mctune.core.target import resolve
    from mctune.measure.explain import explain
    from mctune.report.known import machine_of, tuned_entries

    unfit = [option for name, option in given().items() if name not in ("package", "as_json")]
    if unfit:
        raise UsageError(f"--package and {unfit[0]} exclude each other: the package says what it is about")
    described, entries = tuned_entries(package)
    target, _ = resolve(machine_of(described).name)
    if target.on_cpu:
        raise UsageError(f"{package} is of a CPU; a compiler's account is of GPU kernels")
    explained = []
    for number, entry in enumerate(entries, 1):
        say(f"{number}/{len(entries)} {entry.problem}, by {entry.backend}")
        try:
            found = explain(entry.problem, entry.config, target, maker_of(target, entry.problem, entry.backend) or "")
        except MctuneError as error:
            say(f"left out: {error}")
            continue
        explained.append({"backend": entry.backend, **found.to_dict()})
        if not as_json:
            click.echo(found.text())
    if as_json:
        print_json({"target": target.name, "explained": explained})
