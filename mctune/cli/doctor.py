"""``mctune doctor``: whether mctune can work here, and what to do where it cannot."""

from __future__ import annotations

from dataclasses import asdict

import click

from mctune.cli._checks import BAD, OK, all_checks
from mctune.cli._output import json_option, print_json, say, text_table
from mctune.core.errors import DeviceError
from mctune.core.target import resolve


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Say what is installed, which versions do not go together, and which devices are seen.

    Exits with 0 when CPU kernels can be searched here, with 3 when something needed for that is missing or broken.
    """
    checks = all_checks(resolve("cpu")[0])
    problems = [check for check in checks if check.status == BAD]
    if as_json:
        print_json({"usable": not problems, "checks": [asdict(check) for check in checks]})
    else:
        click.echo(text_table(("what", "state", "found"), [(c.name, c.status, c.found) for c in checks]))
    for check in checks:
        if check.status != OK:
            say(f"{check.name}: {check.remedy}")
    if problems:
        names = ", ".join(check.name for check in problems)
        raise DeviceError(f"not usable as it is: {names}; the remedies stand above")
