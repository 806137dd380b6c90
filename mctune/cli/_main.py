"""The command group, and what an error means to the shell."""

from __future__ import annotations

import errno
import importlib
import pkgutil
from collections.abc import Sequence
from contextlib import suppress

import click

import mctune
import mctune.cli
from mctune.cli._output import check_stdout, flush_stdout
from mctune.core.errors import MctuneError, UsageError

INTERRUPTED = 130
_ORDER = ("search", "emit", "verify", "warm", "bench", "explain", "report", "calibrate", "targets", "spaces", "doctor")


class _Commands(click.Group):
    """Every module of this package whose name has no underscore in front holds one ``command``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = {module.name for module in pkgutil.iter_modules(mctune.cli.__path__)}
        names = [name for name in found if not name.startswith("_")]
        return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"mctune.cli.{cmd_name}").command
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(mctune.__version__, message="mctune %(version)s")
def group() -> None:
    """Search Memory Caching kernels for the machine they run on.

    Data goes to stdout (--json on every command), progress to stderr. Exit codes: 0 done, 2 usage, 3 no such device,
    4 no valid configuration, 130 interrupted.
    """
    check_stdout()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one line on stderr."""
    code = _run(arguments)
    if (why := flush_stdout()) is not None:
        with suppress(OSError):
            click.echo(f"mctune: error: stdout cannot be written to: {why}", err=True)
        return code or UsageError.exit_code
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        status = group.main(list(arguments) if arguments is not None else None, "mctune", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except MctuneError as error:
        click.echo(f"mctune: error: {error}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("mctune: interrupted", err=True)
        return INTERRUPTED
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EBADF, errno.EIO):
            raise
        click.echo(f"mctune: error: what this command prints cannot be written: {error.strerror}", err=True)
        return UsageError.exit_code
    return status if isinstance(status, int) else 0
