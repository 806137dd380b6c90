"""What commands share: JSON or text on stdout, remarks on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")


def say(text: str) -> None:
    """A remark for a person, on stderr."""
    click.echo(text, err=True)


def print_json(data: Any) -> None:
    """``data`` on stdout."""
    click.echo(json.dumps(data, indent=2, allow_nan=False))


def text_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Aligned columns, plain text, no trailing spaces."""
    cells = [list(header), *(list(line) for line in lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(rows)


def number(value: float | int | None) -> str:
    """A figure for a table; a dash where there is none."""
    return "-" if value is None else f"{value:g}"


def size(bytes_: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    amount = float(bytes_)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} GiB"
