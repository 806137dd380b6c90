"""Histories keep what they say, are appended to as a whole, and name the line that is wrong."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted, Timed
from mctune.core.problem import Problem
from mctune.report.history import Record, append_history, check_history, dated, read_history
from mctune.report.rows import Row

GRM = Problem(T=4096, H=4, Dk=64, Dv=64, segment_length=256)
RECORD = Record("2026-11-23", "3f2c1ab", "cpu", "Test CPU", GRM, "tvm", "measured", 10.0, 9.5, 11.0)


def test_the_record_of_a_row() -> None:
    made = Row.of("cpu", GRM, "tvm", Config.of({"rows": 2}), Timed(10, 9.5, 11.0, 20, 4e-7))
    assert Record.of(made, date="2026-11-23", commit="3f2c1ab", title="Test CPU") == RECORD
    bare = Record.of(Row.of("cpu", GRM, "tvm", Config.of({}), Predicted(1.5, "m")), date="2026-11-23")
    assert (bare.how, bare.low, bare.high, bare.commit) == ("predicted", None, None, "")


@given(
    st.floats(1e-300, 1e300),
    st.none() | st.floats(1e-300, 1e300),
    st.text(st.characters(exclude_categories=("Cc", "Cf", "Zl", "Zp", "Cs")), max_size=40),
)
def test_a_record_survives_its_line(ms: float, low: float | None, title: str) -> None:
    record = replace(RECORD, ms=ms, low=low, title=title)
    assert Record.from_line(record.to_line()) == record and "\n" not in record.to_line()


def test_appending_twice_adds_once_and_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history.jsonl"
    later = replace(RECORD, date="2026-11-24", ms=10.5)
    assert append_history(path, [RECORD]) == 1
    first = path.read_bytes()
    assert append_history(path, [RECORD, later, later]) == 1 and path.read_bytes().startswith(first)
    known = path.stat().st_ino
    assert append_history(path, [later, RECORD]) == 0 and path.stat().st_ino == known
    assert read_history(path) == (RECORD, later)
    assert os.listdir(path.parent) == ["history.jsonl"]
    # A last line without its end, and blank ones, are as good.
    path.write_text("\n" + path.read_text().rstrip("\n"))
    assert append_history(path, [replace(RECORD, commit="other")]) == 1 and len(read_history(path)) == 3


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "kept.jsonl")
    append_history(tmp_path / "link", [RECORD])
    assert (tmp_path / "link").is_symlink() and read_history(tmp_path / "kept.jsonl") == (RECORD,)


def test_those_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    records = [replace(RECORD, ms=float(number)) for number in range(1, 21)]
    with ThreadPoolExecutor(5) as pool:
        assert sum(pool.map(lambda one: append_history(path, [one]), records)) == 20
    assert set(read_history(path)) == set(records)


LINE = json.loads(RECORD.to_line())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "JSONDecodeError"),
        ("[1]", "it is not an object of date, commit"),
        (json.dumps({**LINE, "more": 1}), "it is not an object of date, commit"),
        (json.dumps({**LINE, "ms": 0}), "ms=0.0 is not a positive time"),
        (json.dumps({**LINE, "ms": True}), "ms=True is not a positive time"),
        (json.dumps({**LINE, "low": float("nan")}), "low=nan is not a positive time"),
        (json.dumps({**LINE, "ms": 10**400}), "OverflowError"),
        (json.dumps({**LINE, "how": "guessed"}), "how='guessed' is not one of measured, predicted"),
        (json.dumps({**LINE, "date": "23.11.2026"}), "date '23.11.2026' is not in the form of 2026-11-23"),
        (json.dumps({**LINE, "title": "a\nb"}), "title 'a.nb' is not one line"),
        (json.dumps({**LINE, "target": "../x"}), "target '../x' is not a name"),
        (json.dumps({**LINE, "problem": {**LINE["problem"], "T": -1}}), "T=-1: must be an integer"),
        (json.dumps({**LINE, "problem": 3}), "TypeError"),
        ("\udcff", "UnicodeDecodeError"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "history.jsonl"
    text = f"{RECORD.to_line()}\n{line}\n".encode(errors="surrogateescape")
    path.write_bytes(text)
    for act in (lambda: read_history(path), lambda: append_history(path, [RECORD]), lambda: check_history(path)):
        with pytest.raises(UsageError, match=f"history.jsonl, line 2: {why}") as caught:
            act()
        assert len(str(caught.value).splitlines()) == 1
    assert path.read_bytes() == text


def test_what_cannot_be_a_history(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.jsonl cannot be read: No such file"):
        read_history(tmp_path / "absent.jsonl")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "file" / "x.jsonl"):
        for act in (check_history, lambda path: append_history(path, [RECORD])):
            with pytest.raises(UsageError, match=r"is not a file|cannot be written"):
                act(path)


def test_moments_are_in_utc() -> None:
    moments = ("2026-11-23", "2026-11-23T04:00:00", "2026-11-23T04:00:00Z", "2026-11-23T04:00:00+02:00")
    told = [replace(RECORD, date=text).when.strftime("%d %H:%M %z") for text in moments]
    assert told == ["23 00:00 +0000", "23 04:00 +0000", "23 04:00 +0000", "23 02:00 +0000"]


def test_the_date_is_the_users_or_the_environments() -> None:
    environment = {"date": "2026-11-23", "commit": "abc"}
    assert dated(environment, None, None) == ("2026-11-23", "abc")
    assert dated(environment, "2026-11-24", "def") == ("2026-11-24", "def")
    with pytest.raises(UsageError, match="give --date"):
        dated({}, None, None)
