"""``mctune emit``: the package again, from studies that were searched before, or from a table of what was tuned."""

from __future__ import annotations

import tempfile
from dataclasses import replace as changed
from pathlib import Path

import click

from mctune.cli._cases import cases_of, default_out, measured
from mctune.cli._emit import emit_report, replace_option
from mctune.cli._output import given, json_option, print_json, say
from mctune.cli.search import report_text
from mctune.core.errors import NoValidConfigError, UsageError
from mctune.core.target import resolve
from mctune.study.events import SearchReport, SearchRequest

_FORMS = ("package", "hf-kernels")
_REPOSITORY = Path("build") / "mctune-memory-caching"
_OF_STUDIES = ("workload", "problem", "segment_lengths", "inner_chunks", "storage")


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
@click.option("--format", "form", type=click.Choice(_FORMS), default=_FORMS[0], show_default=True,
              help="A Python package, or a repository for the kernels library of Hugging Face.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Where it goes.  [default: build/mctune_<target>, or build/mctune-memory-caching]")  # fmt: skip
@click.option("--max-slowdown", type=float, default=1.10, show_default=True,
              help="Recommend the shortest segment within this factor of the fastest.")  # fmt: skip
@click.option("--from", "table", type=click.Path(path_type=Path), metavar="TABLE",
              help="Emit what this tuned.json, or package, holds; no study is needed.")  # fmt: skip
@replace_option
@click.option("--sign", "key", type=click.Path(path_type=Path, dir_okay=False), metavar="KEY",
              help="Sign the package with the Ed25519 private key in this PEM file.")  # fmt: skip
@json_option
def command(
    target_name: str, workload: str | None, problem: str | None, segment_lengths: str | None,
    inner_chunks: str | None, storage: str | None, form: str, out: Path | None, max_slowdown: float,
    table: Path | None, replace: bool, key: Path | None, as_json: bool,
) -> int:  # fmt: skip
    """Emit the package of a search again: from its studies as far as they went, without searching or timing.

    Give the options that the search was given. Every kernel is built and verified again; the times are the trials' own.
    A package for the same target that is in DIR already is added to: of two kernels for a problem the better one stays.

    With --from the problems and configurations are those of a published table, and so is the target.

    With --format hf-kernels DIR becomes a repository that the kernels library loads. It may hold several targets: emit
    each into the same DIR. Studies are those in build/mctune_<target>, unless --storage names others.
    """
    from mctune.emit import Signer, check_out, check_repository

    signer = Signer.of(key) if key else None
    report: SearchReport | None = None
    repository = None if form == _FORMS[0] else out or _REPOSITORY
    if repository is not None:
        # What is built on the way does not belong into a repository.
        scratch = tempfile.TemporaryDirectory(prefix="mctune-")
        out = Path(click.get_current_context().with_resource(scratch)) if table else None
    if table is not None:
        request, report = _of_table(table, target_name, out, max_slowdown)
    else:
        target, note = resolve(target_name)
        if note:
            say(note)
        cases, trials, _ = cases_of(target, workload, problem, segment_lengths, inner_chunks)
        request = SearchRequest(
            target=target, cases=cases, out=out or default_out(target), trials=trials, storage=storage,
            max_slowdown=max_slowdown, measure=measured(target, False),
        )  # fmt: skip
    if repository is None:
        check_out(request.out, request.target, replace=replace)
    else:
        check_repository(repository, request.target, replace=replace)
    from mctune.study.run import at_work, stored

    if report is None:
        report = stored(request)
    with at_work(request) as workers:
        package = emit_report(request, report, workers, replace, signer, repository)
    if package is None:
        raise NoValidConfigError("no study holds a candidate that was verified and timed; search on: `mctune search`")
    report = changed(report, out=package)
    if as_json:
        print_json({"package": str(package), **report.to_dict()})
    else:
        click.echo(report_text(report))
    say(f"emitted {package}")
    return 0


def _of_table(
    table: Path, target_name: str, out: Path | None, max_slowdown: float
) -> tuple[SearchRequest, SearchReport]:
    """What a tuned table holds, as a search would have found it."""
    from mctune.backends.registry import get_backend
    from mctune.report.known import machine_of, tuned_entries
    from mctune.study.tabled import tabled

    told = given()
    if unfit := [name for name in _OF_STUDIES if name in told]:
        raise UsageError(f"--from and --{unfit[0].replace('_', '-')} exclude each other: a table says what it is about")
    described, entries = tuned_entries(table)
    machine = machine_of(described)
    target, _ = resolve(target_name if "target_name" in told else machine.name)
    if target.name != machine.name:
        raise UsageError(
            f"{table} was tuned for {machine.name}, not {target.name}: "
            f"`mctune search --gpu {target.name} --from {table}` begins with it"
        )
    if target.on_cpu and (target.title, target.arch) != (machine.title, machine.arch):
        say(
            f"the times are of {machine.title} ({machine.arch}), and this is {target.title} ({target.arch}): what does "
            f"not fit here is left out; `mctune search --from {table}` tunes for this machine, beginning with it"
        )
    report, left_out = tabled(target, out or default_out(target), entries, max_slowdown)
    for text in left_out:
        say(text)
    if not report.studies:
        raise NoValidConfigError(f"nothing in {table} can be built for {target.name}")
    measure = measured(target, False)
    for maker in dict.fromkeys(study.maker for study in report.studies):
        get_backend(maker).ready(here=measure)
    request = SearchRequest(
        target=target, cases=tuple(study.case for study in report.studies), out=report.out, trials=1,
        max_slowdown=max_slowdown, measure=measure,
    )  # fmt: skip
    return request, report
