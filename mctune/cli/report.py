"""``mctune report``: results that can be published, and studies in formats that others read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import mctune
from mctune.cli._output import json_option, print_json, say
from mctune.core.errors import UsageError

if TYPE_CHECKING:
    from mctune.study.exported import Exported

_TABLES = "tables"


@click.command()
@click.argument("inputs", nargs=-1)
@click.option(
    "--out", default="results", show_default=True, type=click.Path(path_type=Path), help="Folder of the results."
)
@click.option("--format", "formats", multiple=True, default=(_TABLES,), show_default=True,
              type=click.Choice((_TABLES, "t1", "t4"), case_sensitive=False),
              help="Tables, or each study as T1 (its search space) or T4 (its trials); repeatable.")  # fmt: skip
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
    """
    others = [form.lower() for form in formats if form.lower() != _TABLES]
    if html and others:
        raise UsageError("--html makes pages of tables: leave --format out")
    if not inputs and not html:
        raise UsageError("nothing to report: give packages or files, or --html for the pages of what lies in --out")
    if others and len(others) < len(formats):
        raise UsageError("--format tables is made from packages, t1 and t4 from studies: give them in two commands")
    counts = _studies(inputs, out, others) if others else _tables(inputs, out) if inputs else {}
    pages = _pages(out) if html else []
    if as_json:
        told = [{"folder" if not others else "file": name, "rows": count} for name, count in counts.items()]
        print_json([*told, *({"page": str(page)} for page in pages)])
    for name, count in counts.items():
        say(f"{name}: {count} {'parameters' if name.endswith('.t1.json') else 'results' if others else 'rows'}")
    if pages:
        say(f"{pages[0]}: the index of {len(pages) - 1} pages; open it in a browser")


def _tables(inputs: Sequence[str], out: Path) -> dict[str, int]:
    """Rows by folder."""
    from mctune.report.compiled import read_explanation
    from mctune.report.write import read_document, write_results

    paths = [Path(path) for path in inputs]
    explained = {path: found for path in paths if (found := read_explanation(path)) is not None}
    documents = [read_document(path) for path in paths if path not in explained]
    if not documents:
        raise UsageError("what `mctune explain` printed goes with rows: give the package too")
    folders = write_results(documents, out, _searched(paths), tuple(explained.values()))
    return {str(folder): _lines(folder / "rows.csv") - 1 for folder in folders}


def _searched(packages: Sequence[Path]) -> list[tuple[str, Any]]:
    """The studies in the packages' own storages, each as T4 has it."""
    stored = [path for path in packages if storage_in(path).is_file()]
    if not stored:
        return []
    from mctune.study.exported import exported
    from mctune.study.storage import sqlite_url

    return [(study.name, _results(study)) for path in stored for study in exported(sqlite_url(storage_in(path)))]


def _pages(out: Path) -> list[Path]:
    from mctune.report.page.write import write_pages
    from mctune.study.importance import importance

    return write_pages(out, importance)


def _studies(inputs: Sequence[str], out: Path, formats: Sequence[str]) -> dict[str, int]:
    """Trials, or parameters, by file."""
    from mctune.report.exchange import exchange_file, write_json
    from mctune.report.t4 import to_t4
    from mctune.study.exported import exported

    written: dict[str, int] = {}
    for url in [_url(text) for text in inputs]:
        for study in exported(url):
            for form in dict.fromkeys(formats):
                path = exchange_file(out, study.machine.name, study.name, form)
                results = _results(study)
                write_json(path, to_t4(results) if form == "t4" else _t1(study, "t4" in formats))
                written[str(path)] = len(results.trials) if form == "t4" else len(study.space.params)
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
