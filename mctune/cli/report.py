"""``mctune report``: results that can be published, and studies in formats that others read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import mctune
from mctune.cli._output import json_option, print_json, say
from mctune.core.errors import UsageError

if TYPE_CHECKING:
    from mctune.report.trace.dataset import Package
    from mctune.study.exported import Exported

_TABLES, _TRACE, _FLA = "tables", "flashinfer-trace", "fla"
_OF_STUDIES = ("t1", "t4")


@dataclass(frozen=True)
class _Written:
    """What a format has left: a file or a folder, and how many of what is in it."""

    kind: str
    path: Path
    count: int
    unit: str


@click.command()
@click.argument("inputs", nargs=-1)
@click.option(
    "--out", default="results", show_default=True, type=click.Path(path_type=Path), help="Folder of the results."
)
@click.option("--format", "formats", multiple=True, default=(_TABLES,), show_default=True,
              type=click.Choice((_TABLES, *_OF_STUDIES, _TRACE, _FLA), case_sensitive=False),
              help="Tables; each study as T1 (its search space) or T4 (its trials); packages as a dataset of "
              "flashinfer-bench; rows as flash-linear-attention's runner writes them. Repeatable.")  # fmt: skip
@click.option("--html", is_flag=True, help="A page of each target of OUT too, and the index over them.")
@json_option
def command(inputs: tuple[str, ...], out: Path, formats: tuple[str, ...], html: bool, as_json: bool) -> None:
    """Write OUT/<target>/ from INPUTS: tuned packages and what `mctune bench --json` printed.

    Each target's folder gets rows.csv, environment.json, tuned.json and a README.md with tables; what was there is
    replaced. The studies of a package's own storage are kept beside them, as T4, and so is what `mctune explain
    --package DIR --json` printed, which may be among INPUTS.

    With --html, OUT gets index.html, and each target's folder a page of its own: self-contained, made from the files
    that lie there. Without INPUTS the pages are all that is made.

    With --format t1 or t4, INPUTS are output directories of `mctune search`, or storages: each of their studies becomes
    OUT/<target>/<study>.t1.json or .t4.json, the JSON that kernel_tuner and other tuners exchange.

    With --format flashinfer-trace, INPUTS are packages: OUT/<target>/flashinfer-trace is a dataset of flashinfer-bench.
    With --format fla, OUT/<target>/fla.json is what flash-linear-attention's benchmark runner writes.
    """
    chosen = tuple(dict.fromkeys(form.lower() for form in formats))
    of_studies = [form for form in chosen if form in _OF_STUDIES]
    if of_studies and len(of_studies) < len(chosen):
        other = next(form for form in chosen if form not in _OF_STUDIES)
        raise UsageError(f"--format {other} is made from packages, t1 and t4 from studies: give them in two commands")
    if html and chosen != (_TABLES,):
        raise UsageError("--html makes pages of tables: leave --format out")
    if not inputs and not html:
        raise UsageError("nothing to report: give packages or files, or --html for the pages of what lies in --out")
    written = _studies(inputs, out, of_studies) if of_studies else []
    for form, write in ((_TABLES, _tables), (_TRACE, _trace), (_FLA, _fla)):
        written += write(inputs, out) if form in chosen and inputs else []
    pages = _pages(out) if html else []
    if as_json:
        told = [{one.kind: str(one.path), "rows": one.count} for one in written]
        print_json([*told, *({"page": str(page)} for page in pages)])
    for one in written:
        say(f"{one.path}: {one.count} {one.unit}")
    if pages:
        say(f"{pages[0]}: the index of {len(pages) - 1} pages; open it in a browser")


def _tables(inputs: Sequence[str], out: Path) -> list[_Written]:
    from mctune.report.compiled import read_explanation
    from mctune.report.write import read_document, write_results

    paths = [Path(path) for path in inputs]
    explained = {path: found for path in paths if (found := read_explanation(path)) is not None}
    documents = [read_document(path) for path in paths if path not in explained]
    if not documents:
        raise UsageError("what `mctune explain` printed goes with rows: give the package too")
    folders = write_results(documents, out, _searched(paths), tuple(explained.values()))
    return [_Written("folder", folder, _lines(folder / "rows.csv") - 1, "rows") for folder in folders]


def _searched(packages: Sequence[Path]) -> list[tuple[str, Any]]:
    """The studies in the packages' own storages, each as T4 has it."""
    stored = [path for path in packages if storage_in(path).is_file()]
    if not stored:
        return []
    from mctune.study.exported import exported
    from mctune.study.storage import sqlite_url

    return [(study.name, _results(study)) for path in stored for study in exported(sqlite_url(storage_in(path)), False)]


def _pages(out: Path) -> list[Path]:
    from mctune.report.page.write import write_pages
    from mctune.study.importance import importance

    return write_pages(out, importance)


def _trace(inputs: Sequence[str], out: Path) -> list[_Written]:
    from mctune.report.trace.dataset import write_flashinfer_trace

    folders = write_flashinfer_trace([_package(Path(path)) for path in inputs], out, say)
    return [_Written("folder", folder, count, "solutions") for folder, count in folders.items()]


def _package(path: Path) -> Package:
    """A package whose files are what its manifest says."""
    from mctune.report.trace.dataset import Package
    from mctune.report.write import read_document
    from mctune.runtime.errors import PackageError
    from mctune.runtime.manifest import verify

    if not (path / "tuned.json").is_file():
        raise UsageError(f"{path} is no package; --format {_TRACE} needs its folder, with its kernels")
    document = read_document(path)
    try:
        return Package(document, verify(path).files)
    except PackageError as error:
        raise UsageError(str(error)) from error


def _fla(inputs: Sequence[str], out: Path) -> list[_Written]:
    from mctune.report.exchange import write_json
    from mctune.report.fla import to_fla
    from mctune.report.write import of_targets, read_document

    written = []
    for name, document in of_targets([read_document(Path(path)) for path in inputs]).items():
        made = to_fla(document, say)
        if not made["results"]:
            raise UsageError(f"nothing of {name} can be written as {_FLA}")
        write_json(out / name / "fla.json", made)
        written.append(_Written("file", out / name / "fla.json", len(made["results"]), "results"))
    return written


def _studies(inputs: Sequence[str], out: Path, formats: Sequence[str]) -> list[_Written]:
    from mctune.report.exchange import exchange_file, write_json
    from mctune.report.t4 import to_t4
    from mctune.study.exported import exported

    written: list[_Written] = []
    for url in [_url(text) for text in inputs]:
        for study in exported(url, "t1" in formats):
            for form in formats:
                path = exchange_file(out, study.machine.name, study.name, form)
                if form == "t4":
                    results = _results(study)
                    write_json(path, to_t4(results))
                    written.append(_Written("file", path, len(results.trials), "results"))
                else:
                    write_json(path, _t1(study, "t4" in formats))
                    written.append(_Written("file", path, len(study.space.params), "parameters"))
    return written


def storage_in(package: Path) -> Path:
    """Where a search keeps its studies unless it is told another place."""
    return package / "search" / "study.db"


def _url(text: str) -> str:
    """The storage that a user means: a URL, an output directory, or a SQLite file."""
    from mctune.study.storage import sqlite_url, url_of

    if "://" in text:
        return url_of(text)
    path = Path(text)
    file = storage_in(path) if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file} does not exist; give an output directory of `mctune search`, or its --storage")
    return sqlite_url(file)


def _results(study: Exported) -> Any:
    from mctune.report.t4 import Results, Tried

    trials = (
        Tried(trial.config, trial.outcome, trial.seconds, study.finished.get(trial.number)) for trial in study.trials
    )
    return Results(study.attrs, tuple(trials), mctune.__version__, study.begun)


def _t1(study: Exported, with_results: bool) -> dict[str, Any]:
    from mctune.report.t1 import Condition, Described, to_t1

    if study.conditions is None:
        say(
            f"{study.name}: its constraints are not written, because the templates, compilers or machine of today are "
            "not the study's; the parameters are"
        )
    if study.unsaid:
        say(f"{study.name}: {study.unsaid} constraints read too much for an expression and are not written")
    described = Described(
        kernel=study.name,
        kind=study.machine.kind,
        device=study.machine.title or study.machine.name,
        compiler=str(study.attrs["backend"]["name"]),
        space=study.space,
        conditions=tuple(Condition(*one) for one in study.conditions or ()),
        results=f"{study.name}.t4.json" if with_results else "",
    )
    return to_t1(described)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
