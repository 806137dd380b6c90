"""``mctune search``: from problems to a tuned package."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace as replace_
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mctune.cli._cases import cases_of, default_out, measured
from mctune.cli._emit import emit_report, replace_option
from mctune.cli._main import INTERRUPTED
from mctune.cli._output import json_option, print_json, say, size, text_table
from mctune.cli._workers import check_workers, joined
from mctune.core.advice import advice
from mctune.core.errors import MctuneError, NoValidConfigError, UsageError
from mctune.core.known import Known
from mctune.core.outcome import Predicted, where
from mctune.core.paths import results_dir
from mctune.core.target import resolve
from mctune.study.events import SAMPLERS, SearchReport, SearchRequest, StudyReport

if TYPE_CHECKING:
    from mctune.workers.pool import Workers


@click.command()
@click.option("--gpu", "--target", "target_name", metavar="NAME", default="cpu", show_default=True,
              help="What to tune for; see `mctune targets`.")  # fmt: skip
@click.option("--workload", metavar="NAME", help="Named set of problems; see `mctune spaces`.  [default: quick]")
@click.option("--problem", metavar="FIELDS",
              help="One problem instead: T=4096,H=4,Dk=64,Dv=64,aggregation=grm, or JSON.")  # fmt: skip
@click.option("--segment-lengths", metavar="LIST", help="Segment lengths to try, for example 64,128,256.")
@click.option("--inner-chunks", metavar="LIST",
              help="Inner chunks of deep memories to compare, a study each, for example 8,16,64.")  # fmt: skip
@click.option("--trials", type=click.IntRange(min=1), help="Candidates a study.  [default: the workload's, or 100]")
@click.option("--timeout", type=float, metavar="SECONDS",
              help="End after this time, all studies together.  [default: the workload's, or none]")  # fmt: skip
@click.option("--backend", type=click.Choice(("auto", "triton", "tvm")), default="auto", show_default=True,
              help="What compiles; auto searches all that serve the target, a study each.")  # fmt: skip
@click.option("--sampler", metavar="NAME", default="chain", show_default=True,
              help=f"{', '.join(SAMPLERS)}, or module:Class of any other Optuna sampler.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option(
    "--storage", metavar="URL", help="Optuna storage, or a SQLite file.  [default: SQLite in the output directory]"
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Where the package goes.  [default: build/mctune_<target>]")  # fmt: skip
@click.option("--max-slowdown", type=float, default=1.10, show_default=True,
              help="Recommend the shortest segment within this factor of the fastest.")  # fmt: skip
@click.option("--trial-timeout", type=float, default=60.0, show_default=True, metavar="SECONDS",
              help="Kill a candidate after this time; the last check of what may ship, after ten times.")  # fmt: skip
@click.option("--from", "files", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Begin with what did best there: a package, tuned.json, T4 or cache file; repeatable.")  # fmt: skip
@click.option("--no-warm-start", "cold", is_flag=True,
              help="Begin with the defaults alone, whatever is known of similar problems.")  # fmt: skip
@replace_option
@click.option("--measure", is_flag=True, help="Insist on measuring: fail if the target is not on this machine.")
@click.option("--workers", "count", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="So many processes, each with a GPU of its own, or a share of the cores where times are predicted. "
                   "They share --storage, which is a server's; the same command elsewhere joins them.")  # fmt: skip
@click.option("--join", is_flag=True, help="Only help others with their search: leave no package.")
@json_option
def command(
    target_name: str, workload: str | None, problem: str | None, segment_lengths: str | None,
    inner_chunks: str | None, trials: int | None, timeout: float | None, backend: str, sampler: str, seed: int,
    storage: str | None, out: Path | None, max_slowdown: float, trial_timeout: float, files: tuple[Path, ...],
    cold: bool, replace: bool, measure: bool, count: int, join: bool, as_json: bool,
) -> int:  # fmt: skip
    """Search kernels for every problem of a workload and leave a package that a model can import.

    Each candidate is built, verified against the oracle, then timed, in a process that can be killed. For a GPU that is
    not on this machine each is compiled, and its time predicted by a cost model; the fastest are verified. The same
    command again goes on where an interrupted one stopped. A package for the same target that is in DIR already is
    added to: of two kernels for a problem the better one stays.

    A new study begins with up to five configurations that are known to do well on similar problems: of the other
    studies in its storage, of published results, and of --from.
    """
    target, note = resolve(target_name)
    if note:
        say(note)
    cases, default_trials, default_timeout = cases_of(target, workload, problem, segment_lengths, inner_chunks)
    if trials is not None:
        cases = tuple(replace_(case, trials=None) for case in cases)
    for line in advice(cases):
        say(line)
    request = SearchRequest(
        target=target,
        cases=cases,
        out=out or default_out(target),
        trials=trials or default_trials,
        timeout_s=timeout if timeout is not None else default_timeout,
        sampler=sampler,
        seed=seed,
        storage=storage,
        max_slowdown=max_slowdown,
        trial_timeout_s=trial_timeout,
        measure=measured(target, measure),
        backend=backend,
        warm=not cold,
        known=_known(files, cold),
        decide=not join,
    )
    check_workers(count, target, request.measure, storage)
    # The sampler's matrices are small: a second numpy thread would only contend with the kernels being timed.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mctune.cli._progress import SearchProgress
    from mctune.emit import check_out
    from mctune.study.run import at_work, search

    check_out(request.out, target, replace=replace)
    with at_work(request) as workers:
        with joined(count, request.measure, request.out / "search"), SearchProgress() as progress:
            report = search(request, progress, workers)
        return _helped(report) if join else _left(request, report, workers, replace, as_json)


def _left(request: SearchRequest, report: SearchReport, workers: Workers, replace: bool, as_json: bool) -> int:
    """Print what was found and leave its package; the exit code."""
    try:
        if as_json:
            print_json(report.to_dict())
        else:
            click.echo(report_text(report))
    finally:
        # What was found is not lost with whoever reads the output.
        try:
            package = emit_report(request, report, workers, replace)
        except MctuneError as error:
            raise report.failure or error from error
    if not request.measure:
        say(f"{request.target.name} is not on this machine: every time above is predicted, none is measured")
    if package is not None:
        say(f"{package} is a package: `from {package.name} import memory_caching` with {package.parent} on PYTHONPATH")
    if report.failure is not None:
        raise report.failure
    if report.interrupted:
        say("interrupted: what stands above is the best so far; the same command goes on from here")
        return INTERRUPTED
    if not any(study.recommended for study in report.studies):
        raise NoValidConfigError(_nothing_valid(report))
    return 0


def _helped(report: SearchReport) -> int:
    """What a worker says that leaves the rest to others."""
    for study in report.studies:
        say(f"{study.case}: {study.trials} trials in all")
    if report.failure is not None:
        raise report.failure
    return INTERRUPTED if report.interrupted else 0


def _known(files: Sequence[Path], cold: bool) -> tuple[Known, ...]:
    """What is known besides the storage's studies: of the files, and of published results."""
    if cold and files:
        raise UsageError("--from and --no-warm-start exclude each other; give one")
    from mctune.report.known import published, read_known

    if cold:
        return ()
    return (*(known for path in files for known in read_known(path)), *published(results_dir()))


def report_text(report: SearchReport) -> str:
    """The frontier of each study, the recommendation marked; then that of inner chunks, where several were studied."""
    return "\n\n".join([*map(_study_text, report.studies), *_inner_chunks(report)])


def _inner_chunks(report: SearchReport) -> list[str]:
    """Inner chunk against time: like the segment length it changes what is computed, so none is recommended."""
    alike: dict[str, list[StudyReport]] = {}
    for study in report.studies:
        if study.case.problem.deep and study.recommended is not None:
            key = str(replace_(study.case, problem=study.case.problem.replace(inner_chunk=1)))
            alike.setdefault(key, []).append(study)
    tables = []
    for key, studies in alike.items():
        points = [study.recommended for study in studies if study.recommended is not None]
        if len(points) < 2:
            continue
        how = "predicted ms" if isinstance(points[0].outcome, Predicted) else "ms"
        lines = [
            (str(p.problem.inner_chunk), str(p.problem.segment_length or "log"), f"{p.outcome.ms:.3f}") for p in points
        ]
        tried = ",".join(str(p.problem.inner_chunk) for p in points)
        tables.append(f"{key.replace(' b1 ', f' b{tried} ')}\n" + text_table(("inner chunk", "segment", how), lines))
    return tables


def _study_text(study: StudyReport) -> str:
    lines = []
    for point in study.frontier:
        length = point.problem.segment_length
        mark = "recommended" if point == study.recommended else ""
        lines.append(
            (
                str(length or "log"),
                str(point.states),
                size(point.bytes),
                f"{point.outcome.ms:.3f}",
                mark,
                str(point.config),
            )
        )
    if not lines:
        return f"{_title(study)}\n" + (f"no valid configuration: {_told([study])}" if study.trials else "not reached")
    how = "predicted ms" if isinstance(study.frontier[0].outcome, Predicted) else "ms"
    ties = f"\n{len(study.ties)} within noise of the recommended one" if study.ties else ""
    notes = study.recommended.outcome.notes if study.recommended else ()
    share = where(study.recommended.outcome) if study.recommended else ""
    spent = f"\nwhere the time of the recommended one goes: {share}" if share else ""
    said = "".join(f"\nthe compiler on the recommended one: {note}" for note in notes)
    return (
        f"{_title(study)}\n"
        + text_table(("segment", "states", "cache", how, "", "configuration"), lines)
        + ties
        + spent
        + said
    )


def _title(study: StudyReport) -> str:
    """The case, and where a target is served by several, what compiled it."""
    backend = study.maker.partition(".")[0]
    return f"{study.case}, by {backend}" if backend else str(study.case)


def _nothing_valid(report: SearchReport) -> str:
    told, remedy = _told(report.studies), "give more --trials, --timeout or --trial-timeout"
    if not any(count for study in report.studies for _, count in study.outcomes):
        remedy = f"if no configuration is valid, a line above says why, and else {remedy}"
    return f"no valid configuration for {report.target.name}: {told}; {remedy}"


def _told(studies: Sequence[StudyReport]) -> str:
    """How their trials ended: ``3 wrong, 1 timed out``."""
    counts: Counter[str] = Counter()
    for study in studies:
        counts.update(dict(study.outcomes))
    told = [f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items() if count]
    return ", ".join(told) or "no trial finished"
