"""What commands share: JSON or text on stdout, remarks on stderr."""

from __future__ import annotations

import json
from typing import Any

import click

from mctune.core.remark import say as say
from mctune.report.markdown import text_table as text_table

json_option = click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")


def print_json(data: Any) -> None:
    """``data`` on stdout."""
    click.echo(json.dumps(data, indent=2, allow_nan=False))


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
