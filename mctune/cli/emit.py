"""``mctune emit``: the package again, from studies that were searched before."""

from __future__ import annotations

from pathlib import Path

import click

from mctune.cli._cases import cases_of, default_out, measured
from mctune.cli._emit import emit_report, replace_option
from mctune.cli._output import json_option, print_json, say
from mctune.cli.search import report_text
from mctune.core.errors import NoValidConfigError
from mctune.core.target import resolve
from mctune.study.events import SearchRequest


@click.command()
@click.option("--gpu", "--target", "target_name", metavar="NAME", default="cpu", show_default=True,
              help="What was tuned for.")  # fmt: skip
@click.option("--workload", metavar="NAME", help="Named set of problems that was searched.  [default: quick]")
@click.option("--problem", metavar="FIELDS", help="The one problem that was searched instead.")
@click.option("--segment-lengths", metavar="LIST", help="Segment lengths that were tried, if they were given.")
@click.option("--inner-chunks", metavar="LIST", help="As for `mctune search`.")
@click.option(
    "--storage", metavar="URL", help="Optuna storage, or a SQLite file.  [default: SQLite in the output directory]"
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Where the package goes.  [default: build/mctune_<target>]")  # fmt: skip
@click.option("--max-slowdown", type=float, default=1.10, show_default=True,
              help="Recommend the shortest segment within this factor of the fastest.")  # fmt: skip
@replace_option
@click.option("--sign", "key", type=click.Path(path_type=Path, dir_okay=False), metavar="KEY",
              help="Sign the package with the Ed25519 private key in this PEM file.")  # fmt: skip
@json_option
def command(
    target_name: str, workload: str | None, problem: str | None, segment_lengths: str | None,
    inner_chunks: str | None, storage: str | None, out: Path | None, max_slowdown: float, replace: bool,
    key: Path | None, as_json: bool,
) -> int:  # fmt: skip
    """Emit the package of a search again: from its studies as far as they went, without searching or timing.

    Give the options that the search was given. Every kernel is built and verified again; the times are the trials' own.
    A package for the same target that is in DIR already is added to: of two kernels for a problem the better one stays.
    """
    from mctune.emit import Signer, check_out
    from mctune.study.run import stored

    target, note = resolve(target_name)
    if note:
        say(note)
    cases, trials, _ = cases_of(target, workload, problem, segment_lengths, inner_chunks)
    request = SearchRequest(
        target=target, cases=cases, out=out or default_out(target), trials=trials, storage=storage,
        max_slowdown=max_slowdown, measure=measured(target, False),
    )  # fmt: skip
    signer = Signer.of(key) if key else None
    check_out(request.out, target, replace=replace)
    report = stored(request)
    package = emit_report(request, report, replace, signer)
    if package is None:
        raise NoValidConfigError("no study holds a candidate that was verified and timed; search on: `mctune search`")
    if as_json:
        print_json({"package": str(package), **report.to_dict()})
    else:
        click.echo(report_text(report))
    say(f"emitted {package}")
    return 0
