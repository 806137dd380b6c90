"""The command group, and what an error means to the shell."""

from __future__ import annotations

import errno
import importlib
import io
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import click

import mctune
import mctune.cli
from mctune.cli._output import check_stdout, flush_stdout
from mctune.core.errors import MctuneError, UsageError
from mctune.core.interrupt import leave
from mctune.core.remark import redacted

INTERRUPTED = 130
_HOLD = ("search", "emit")
"""Commands that hold Ctrl-C back where something would be left half done; elsewhere it ends them at once."""
_ORDER = (
    "search", "emit", "verify", "warm", "bench", "explain", "report", "compare", "calibrate", "targets", "spaces",
    "doctor",
)  # fmt: skip


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
        if cmd_name not in _HOLD and signal.getsignal(signal.SIGINT) is leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(mctune.__version__, message="mctune %(version)s")
def group() -> None:
    """Search Memory Caching kernels for the machine they run on.

    Data goes to stdout (--json on every command), progress to stderr. Exit codes: 0 done, 2 usage, 3 no such device,
    4 no valid configuration, 5 slower than before, 130 interrupted.
    """
    check_stdout()
    try:
        os.getcwd()
    except OSError as error:  # torch's libraries end a process that computes there
        raise UsageError("the working directory is gone; change to one that exists") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one line on stderr."""
    before = signal.getsignal(signal.SIGINT)
    ours = before in (signal.default_int_handler, leave) and threading.current_thread() is threading.main_thread()
    try:
        if ours:
            signal.signal(signal.SIGINT, leave)
        return _exit_code(sys.argv[1:] if arguments is None else list(arguments))
    except (click.Abort, KeyboardInterrupt):
        return _failed("interrupted", INTERRUPTED)
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _exit_code(arguments: list[str]) -> int:
    """The exit code of a command that is not interrupted."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a path may have what a locale has not
                stream.reconfigure(errors="backslashreplace")
        if "_MCTUNE_COMPLETE" in os.environ:
            group.main(arguments, "mctune")
        with group.make_context("mctune", arguments) as context:
            status = group.invoke(context)
        if (why := flush_stdout()) is not None:
            return _failed(f"error: stdout cannot be written to: {why}", UsageError.exit_code)
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        return error.exit_code
    except MctuneError as error:
        return _failed(f"error: {redacted(str(error))}", error.exit_code)
    except MemoryError:
        return _failed("error: out of memory; free some, or take smaller problems", 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        if where or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF):
            return _failed(f"error: {where}{error.strerror or error}", 1)
        flush_stdout()  # or Python tries once more, when it ends
        return _failed(f"error: stdout cannot be written to: {error.strerror}", UsageError.exit_code)


def _failed(what: str, status: int) -> int:
    """One line on stderr, if there is one, and the exit code."""
    with suppress(OSError, ValueError):
        click.echo(f"mctune: {what}", err=True)
    return status
