"""``mctune report``: results that can be published."""

from __future__ import annotations

from pathlib import Path

import click

from mctune.cli._output import json_option, print_json, say


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", default="results", show_default=True, type=click.Path(path_type=Path), help="Folder of the results."
)
@json_option
def command(inputs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Write OUT/<target>/ from INPUTS: tuned packages and what `mctune bench --json` printed.

    Each target's folder gets rows.csv, environment.json, tuned.json and a README.md with tables; what was there is
    replaced.
    """
    from mctune.report.write import read_document, write_results

    folders = write_results([read_document(path) for path in inputs], out)
    counts = {str(folder): _lines(folder / "rows.csv") - 1 for folder in folders}
    if as_json:
        print_json([{"folder": folder, "rows": count} for folder, count in counts.items()])
    for folder, count in counts.items():
        say(f"{folder}: {count} rows")


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
