"""``mctune verify``: a package, or the defaults, against the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from mctune.cli._output import json_option, print_json, say, text_table
from mctune.core.errors import MctuneError


@click.command()
@click.argument("package", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random inputs.")
@json_option
def command(package: Path | None, seed: int, as_json: bool) -> int:
    """Hold the kernels of PACKAGE to the float64 oracle, or, without one, mctune's eager path.

    A grid of problems with odd sizes and fresh random inputs; memory that a kernel forgets to write holds NaN. Exit
    code 1 if any result is wrong.
    """
    from mctune.search.package import check_defaults, check_package, needs_interpreter

    if package is not None and os.environ.get("TRITON_INTERPRET") != "1" and needs_interpreter(package):
        say("no GPU here: Triton's kernels run in its interpreter, those of bfloat16 in float16")
        # Triton reads it when it is imported, as torch was.
        arguments = [str(package), "--seed", str(seed), *(["--json"] if as_json else [])]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        return subprocess.run([sys.executable, "-m", "mctune", "verify", *arguments], env=environment).returncode

    checks = []
    for check in check_package(package, seed) if package else check_defaults(seed):
        checks.append(check)
        if not check.passed:
            say(f"WRONG: {check.problem}: error {check.error:.2e} over {check.tolerance:.0e}")
    if as_json:
        print_json([check.to_dict() for check in checks])
    else:
        lines = [(c.backend, str(c.problem), f"{c.error:.1e}", "ok" if c.passed else "WRONG") for c in checks]
        click.echo(text_table(("backend", "problem", "error", ""), lines))
    wrong = sum(not check.passed for check in checks)
    worst = max((check.error for check in checks), default=0.0)
    say(f"{len(checks)} problems, {wrong} wrong, largest error {worst:.1e} (RMS ratio to the float64 oracle)")
    if wrong:
        raise MctuneError(f"{wrong} of {len(checks)} problems are wrong")
    return 0
