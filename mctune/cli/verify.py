"""``mctune verify``: a package, or the defaults, against the oracle."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import click

from mctune.cli._output import json_option, print_json, say, text_table
from mctune.core import child
from mctune.core.errors import MctuneError, UsageError


@click.command()
@click.argument("package", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the random inputs.")
@click.option("--gpu", "target_name", metavar="NAME",
              help="Hold Triton's templates instead, as they are for this GPU.")  # fmt: skip
@click.option("--record", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="With --gpu: append results here, and do not repeat those that are there.")  # fmt: skip
@click.option("--timeout", type=float, metavar="SECONDS", help="With --gpu: begin nothing after this time.")
@json_option
def command(
    package: Path | None, seed: int, target_name: str | None, record: Path | None, timeout: float | None, as_json: bool
) -> int:
    """Hold the kernels of PACKAGE to the float64 oracle, or, without one, mctune's eager path.

    A grid of problems with odd sizes and fresh random inputs; memory that a kernel forgets to write holds NaN. With
    --gpu every template is held to it instead, in every dtype, with configurations drawn from all over its search
    space: on that GPU, or, where it is absent, in Triton's interpreter, bfloat16 in float16. Exit code 1 if any
    result is wrong.
    """
    if target_name is not None:
        if package is not None:
            raise UsageError("--gpu is for mctune's own templates; without it PACKAGE is held to the oracle")
        return _templates(target_name, seed, record, timeout, as_json)
    if record is not None or timeout is not None:
        raise UsageError("--record and --timeout go with --gpu NAME")
    from mctune.runtime.kernels.support import runs_instead
    from mctune.verify.package import away, check_defaults, check_package

    made_by = away(package) if package is not None else frozenset()
    if not all(runs_instead(maker) for maker in made_by):
        arguments = [str(package), "--seed", str(seed), *(["--json"] if as_json else [])]
        return _without_gpu(arguments, made_by)
    if "triton" in made_by:
        from mctune.backends.triton.interpreter import quicken

        quicken()
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


def _without_gpu(arguments: list[str], made_by: frozenset[str]) -> int:
    """Verify a package for an absent GPU, in a process whose kernels run on the CPU: that is decided when it starts."""
    from mctune.backends.triton.versions import check_interpreter
    from mctune.verify.cuda_cpu.folder import environment

    variables: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mctune-") as folder:
        if "triton" in made_by:
            check_interpreter()
            say("no GPU here: Triton's kernels run in its interpreter, those of bfloat16 in float16")
            variables["TRITON_INTERPRET"] = "1"
        if "tvm.gpu" in made_by:
            say("no GPU here: the CUDA C of TVM's kernels is compiled for the CPU and runs there (CUDA on CPU)")
            variables |= environment(Path(folder))
        return subprocess.run(child.command("mctune", "verify", *arguments), env={**os.environ, **variables}).returncode


def _templates(name: str, seed: int, record: Path | None, timeout: float | None, as_json: bool) -> int:
    """Every template on a GPU, or interpreted."""
    from mctune.backends import backend_for, get_backend
    from mctune.backends.presence import present
    from mctune.core.target import resolve
    from mctune.workers.hold import candidates, hold

    target, note = resolve(name)
    if note:
        say(note)
    if target.on_cpu:
        raise UsageError(f"{target.name} is a CPU: `mctune verify` without --gpu holds what runs there")
    get_backend(backend_for(target)).ready(here=present(target))
    drawn = candidates(target)
    results = []
    for held in hold(drawn, target, record, timeout, seed):
        results.append(held)
        said = held.failure or f"error {held.error:.1e}"
        say(f"{len(results)}/{len(drawn)} {held.problem}: {said}" + (f" with {held.config}" if held.failure else ""))
    wrong = [held for held in results if held.failure]
    if as_json:
        print_json([held.to_dict() for held in results])
    else:
        lines = [(str(held.problem), held.by, held.failure or f"{held.error:.1e}") for held in results]
        click.echo(text_table(("problem", "run by", "error"), lines))
    worst = max((held.error for held in results if held.error is not None), default=0.0)
    say(f"{len(results)} of {len(drawn)} candidates, {len(wrong)} not right, largest error {worst:.1e} "
        "(RMS ratio to the float64 oracle)")  # fmt: skip
    if wrong:
        raise MctuneError(f"{len(wrong)} of {len(results)} candidates are not right; the first: {wrong[0].failure}")
    if len(results) < len(drawn):
        say("the time limit ended it; the same command with --record goes on")
    return 0
