"""``mctune warm``: compile a package's kernels before a model's first call would."""

from __future__ import annotations

from pathlib import Path

import click

from mctune.cli._output import json_option, print_json, say, text_table
from mctune.core.target import resolve


@click.command()
@click.argument("package", type=click.Path(path_type=Path, file_okay=False))
@click.option("--gpu", "--target", "target_name", metavar="NAME",
              help="What to compile for.  [default: what the package was tuned for]")  # fmt: skip
@json_option
def command(package: Path, target_name: str | None, as_json: bool) -> None:
    """Compile the Triton kernels of PACKAGE into Triton's cache, without a GPU.

    Triton compiles a kernel when it is first launched, seconds each, unless its cache (TRITON_CACHE_DIR, or
    ~/.triton/cache) has it: with the same Triton, for the same architecture. Sizes are arguments of
    the kernels: what is compiled serves calls of any length, batch and number of heads, and decoding token by token.
    """
    from mctune.workers.warm import tuned_for, warm_package

    target, note = resolve(target_name) if target_name else (tuned_for(package), "")
    if note:
        say(note)
    warmed = []
    for one in warm_package(package, target):
        warmed.append(one)
        count = len(one.launched)
        say(f"{one.problem}: {len(one.compiled)} variants of {count} kernels compiled in {one.seconds:.1f} s")
    if as_json:
        print_json([one.to_dict() for one in warmed])
    else:
        lines = [(str(one.problem), str(len(one.launched)), str(len(one.compiled))) for one in warmed]
        click.echo(text_table(("problem", "kernels", "variants compiled"), lines))
