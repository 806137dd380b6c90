"""``mctune calibrate``: the cost model fitted to what was measured on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mctune.cli._output import json_option, print_json, say, text_table

if TYPE_CHECKING:
    from mctune.core.accuracy import Accuracy
    from mctune.core.target import Target
    from mctune.report.rows import Row
    from mctune.study.calibrate import Calibration

_HEADER = ("problem", "candidates", "rank correlation", "regret of the top 10", "wrong by a factor of")


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="ROWS...")
@click.option("--gpu", "--target", "target_name", metavar="NAME", required=True,
              help="What they were measured on; see `mctune targets`.")  # fmt: skip
@click.option(
    "--out", default="results", show_default=True, type=click.Path(path_type=Path), help="Folder of the results."
)
@json_option
def command(inputs: tuple[str, ...], target_name: str, out: Path, as_json: bool) -> None:
    """Fit the cost model to ROWS and write OUT/<target>/calibration.toml, which later searches predict with.

    ROWS: a search's storage (sqlite:///DIR/search/study.db, or the file), rows.csv, packages, or what
    `mctune bench --json` printed; what was measured on other targets is left out. Every candidate is compiled again.
    Printed: how well the model ranks them before and after. `mctune report` reads the JSON.
    """
    import tempfile

    from mctune.backends.triton.cost.calibrated import FILE, write_calibration
    from mctune.core.target import resolve
    from mctune.study.calibrate import LEAST, Measured, calibrate, compiled

    target, note = resolve(target_name)
    if note:
        say(note)
    rows = [row for text in inputs for row in _rows(text, target)]
    with tempfile.TemporaryDirectory() as folder:
        measured = [Measured(row.problem, row.config, row.ms) for row in rows]
        samples = compiled(measured, target, Path(folder), say)
    fitted = calibrate(samples, target)
    path = out / target.name / FILE
    write_calibration(path, fitted.after, f"mctune calibrate: fitted to {len(samples)} measured times on {target.name}")
    lines = list(_lines(fitted))
    if as_json:
        print_json(_document(fitted, rows, target))
    elif lines:
        click.echo(text_table(_HEADER, lines))
    if not lines:
        say(f"no problem has 3 candidates: nothing to rank; {LEAST} times or more were fitted all the same")
    say(f"{path}: {len(samples)} times; mctune search predicts {target.name} with it")


def _rows(text: str, target: Target) -> Iterator[Row]:
    """The measured rows of one input."""
    from mctune.report.rows import Row, read_csv
    from mctune.report.write import read_document

    path = Path(text)
    if "://" in text or path.suffix == ".db":
        from mctune.study.calibrate import measured_in_storage
        from mctune.study.storage import url_of

        for backend, problem, config, timed in measured_in_storage(url_of(text), target):
            yield Row.of(target.name, problem, backend, config, timed)
        return
    for row in read_csv(path) if path.suffix == ".csv" and path.is_file() else read_document(path).rows:
        if row.how == "measured" and row.target == target.name:
            yield row


def _lines(fitted: Calibration) -> Iterator[tuple[str, ...]]:
    before = dict(fitted.judged(fitted.before))
    for problem, after in fitted.judged(fitted.after):
        was = before[problem]
        yield (
            str(problem),
            str(after.count),
            f"{_correlation(was)} -> {_correlation(after)}",
            f"{was.regret:.3f} -> {after.regret:.3f}",
            f"{was.factor:.2f} -> {after.factor:.2f}",
        )


def _correlation(judged: Accuracy) -> str:
    return "none" if judged.spearman is None else f"{judged.spearman:.2f}"


def _document(fitted: Calibration, rows: list[Row], target: Target) -> dict[str, Any]:
    """What `mctune report` reads: measured rows, and what the calibrated model says of the same candidates."""
    from mctune.core.environment import today, versions
    from mctune.core.outcome import Predicted
    from mctune.report.rows import Row

    made_with = versions()
    predicted = [
        Row.of(target.name, sample.measured.problem, "triton", sample.measured.config, Predicted(ms, "cost model"),
               versions=made_with, date=today())
        for sample, ms in zip(fitted.samples, fitted.predicted(fitted.after), strict=True)
    ]  # fmt: skip
    return {
        "rows": [row.to_dict() for row in [*rows, *predicted]],
        "environment": {"target": {"name": target.name, "title": target.title}, "versions": made_with},
    }
