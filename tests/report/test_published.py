"""What lies in ``results`` is what a reader takes it for: docs/publishing.md says what is checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mctune.report.known import tuned_entries
from mctune.report.page.content import Content, folders, read_content
from mctune.report.rows import sort_key
from mctune.report.tables import results_readme

RESULTS = Path(__file__).resolve().parents[2] / "results"
FOLDERS = list(folders(RESULTS))


def content_of(folder: Path) -> Content:
    return read_content(folder, RESULTS)


def test_there_are_results() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(RESULTS).as_posix())
def test_rows_are_of_their_folder_and_say_how_they_came_about(folder: Path) -> None:
    content = content_of(folder)
    assert content.rows
    assert {row.target for row in content.rows} == {content.environment["target"]["name"]}
    assert list(content.rows) == sorted(content.rows, key=sort_key)
    for row in content.rows:
        assert row.date, row
        assert row.versions and row.fraction_of_bound is not None and row.fraction_of_bound > 0, row
        if row.how == "predicted":
            spread = (row.low, row.high, row.repeats, row.sm_mhz, row.celsius)
            assert spread == (None,) * 5 and not row.baselines, row
        else:
            assert row.low is not None and row.high is not None and row.low <= row.ms <= row.high, row


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(RESULTS).as_posix())
def test_the_readme_is_the_one_that_the_rows_make(folder: Path) -> None:
    content = content_of(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == results_readme(content.rows, content.environment)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(RESULTS).as_posix())
def test_what_stands_beside_the_rows_goes_with_them(folder: Path) -> None:
    content = content_of(folder)
    rows = {(row.problem.key, row.config.key, row.backend) for row in content.rows}
    if (folder / "tuned.json").exists():
        target, entries = tuned_entries(folder)
        assert target["name"] == content.environment["target"]["name"]
        assert {(one.problem.key, one.config.key, one.backend) for one in entries} <= rows
    for one in content.compiled:
        assert (one.problem.key, one.config.key, one.backend) in rows
        assert one.launches
    for study in content.studies:
        assert study.results.about["target"][0] == content.environment["target"]["name"]
        assert study.results.trials
    assert json.loads((folder / "environment.json").read_text()) == content.environment
