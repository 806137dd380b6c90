"""``mctune explain``: what the compiler made of a pass's kernels, and what bounds them."""

from __future__ import annotations

import click

from mctune.cli._cases import parse_problem
from mctune.cli._output import json_option, print_json, say
from mctune.core.workload import on_gpu

_PROBLEM = "T=16384,H=16,Dk=128,Dv=128,segment_length=256,aggregation=grm"


@click.command()
@click.option("--gpu", default="h100-sxm", show_default=True, help="Target; it need not be on this machine.")
@click.option("--problem", default=_PROBLEM, show_default=True, help="As `mctune search` takes it.")
@click.option("--set", "chosen", default="", metavar="NAME=VALUE,..", help="Parameters other than the default's.")
@click.option("--backend", type=click.Choice(("auto", "triton", "tvm")), default="auto", show_default=True,
              help="What compiles; auto is the first that serves the GPU.")  # fmt: skip
@click.option("--markdown", is_flag=True, help="Rows for a page instead of a table.")
@json_option
def command(gpu: str, problem: str, chosen: str, backend: str, markdown: bool, as_json: bool) -> None:
    """Compile the kernels of a pass for a GPU and print what the compiler says of each.

    Nothing is measured. Of every launch: its grid, registers, stack and shared memory, the instructions of its busiest
    loop by class, how many cycles each unit of a multiprocessor needs for one pass of it, what ptxas remarks, writes to
    shared memory that may come too early, the bytes that it moves, and the time that the cost model predicts. Loops,
    remarks and writes are read from NVIDIA's assembly; of another GPU they are empty.
    """
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
