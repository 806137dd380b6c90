"""What commands share: JSON or text on stdout, remarks on stderr."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from contextlib import suppress
from typing import Any

import click
from click.core import ParameterSource

from mctune.core.errors import UsageError
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


def check_stdout() -> None:
    """See that what a command will print can be written, before it works for minutes.

    Raises:
        UsageError: if stdout is a file on a full disk, a full device, or a pipe that nobody reads.
    """
    try:
        descriptor = sys.stdout.fileno()
        seen = os.fstat(descriptor)
    except (AttributeError, OSError, ValueError):
        return  # closed, or not a file: whoever did that knows
    why = None
    if stat.S_ISREG(seen.st_mode):
        with suppress(OSError):
            disk = os.fstatvfs(descriptor)
            left = disk.f_bavail if os.geteuid() else disk.f_bfree
            why = "its disk is full" if disk.f_blocks and not left else None
    elif stat.S_ISCHR(seen.st_mode) and not os.isatty(descriptor):
        try:
            os.write(descriptor, b"\n")  # /dev/null takes it
        except OSError as error:
            why = error.strerror
    elif stat.S_ISFIFO(seen.st_mode):
        waiting = select.poll()
        waiting.register(descriptor, 0)
        if any(event & select.POLLERR for _, event in waiting.poll(0)):
            why = "nobody reads the pipe"
    if why is not None:
        raise UsageError(f"stdout cannot be written to: {why}")


def flush_stdout() -> str | None:
    """Write what is buffered; why it could not be, in which case nothing more is tried when Python ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return str(error)
    return None


def given() -> dict[str, str]:
    """The options that the user has given: by their parameters' names, how they are spelled."""
    context = click.get_current_context()
    spelled = {param.name or "": param.opts[0] for param in context.command.params}
    return {
        name: spelled[name]
        for name in context.params
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
