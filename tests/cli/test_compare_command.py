"""``mctune compare``: commits, exit codes, what it prints and leaves."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.report.history import read_history
from mctune.report.rows import Row, write_csv
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
GRM = Problem(T=4096, H=4, Dk=64, Dv=64, segment_length=256)
ROW = Row("cpu", GRM, "tvm", Config.of({}), "measured", 10.0, 9.8, 10.2, 15)
SLOW = replace(ROW, ms=15.0, low=14.7, high=15.3)
WHEN = "2026-11-23T04:00:00+00:00"


def write(folder: Path, row: Row) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "rows.csv", [row])
    (folder / "environment.json").write_text(json.dumps({"target": {"name": "cpu", "title": "Test CPU"}}))
    return folder


def git(*arguments: str) -> str:
    identity = {f"GIT_{who}_{what}": "x@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **identity, "GIT_COMMITTER_DATE": WHEN, "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(["git", *arguments], env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a repository whose one commit has results, which the working tree has slower."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "results" / "cpu", ROW)
    (tmp_path / "results" / "link").symlink_to("/etc/hostname")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "results")
    git("tag", "v1")
    write(tmp_path / "results" / "cpu", SLOW)
    return tmp_path


@pytest.mark.parametrize(
    "old", ["HEAD", "v1:results", "HEAD:results/cpu", "HEAD:results/cpu/", "v1:results/cpu/rows.csv"]
)
def test_a_commit_beside_the_working_tree(run: Run, repository: Path, old: str) -> None:
    ran = run("compare", old, "results/cpu")
    assert ran.code == 5 and "1.500      slower" in ran.out
    assert ran.err == "mctune: error: 1 of 1 rows are slower than before, beyond 5 % and noise\n"
    back = run("compare", "results", old)
    assert back.code == 0 and " faster\n" in back.out


def test_a_path_wins_over_a_commit(run: Run, repository: Path) -> None:
    write(repository / "v1", SLOW)
    assert run("compare", "v1", "results/cpu").code == 0
    assert run("compare", "v1:results/cpu", "results/cpu").code == 5


def test_the_threshold(run: Run, repository: Path) -> None:
    assert run("compare", "HEAD", "results/cpu", "--threshold", "49").code == 5
    assert run("compare", "HEAD", "results/cpu", "--threshold", "51").code == 0


def test_json_and_markdown(run: Run, repository: Path) -> None:
    ran = run("compare", "HEAD", "results/cpu", "--json")
    data = json.loads(ran.out)
    assert ran.code == 5 and data["regressed"] and data["old"] == "HEAD:results" and data["new"] == "results/cpu"
    assert run("compare", "HEAD", "results/cpu", "--markdown").out.startswith(
        "### results/cpu (NEW) beside HEAD:results"
    )


def test_a_history_is_added_to_once_whatever_the_verdict(run: Run, repository: Path) -> None:
    arguments = ("compare", "HEAD", "results/cpu", "--history", "history.jsonl", "--date", "2026-11-24")
    assert run(*arguments, "--commit", "abc").code == 5
    text = Path("history.jsonl").read_bytes()
    assert "0 of 1 times added" in run(*arguments, "--commit", "abc").err and Path("history.jsonl").read_bytes() == text
    (record,) = read_history(Path("history.jsonl"))
    assert (record.date, record.commit, record.title) == ("2026-11-24", "abc", "Test CPU")
    assert (record.problem, record.ms, record.low, record.high) == (GRM, 15.0, 14.7, 15.3)
    # A commit has a date and a name of its own.
    assert run("compare", "results/cpu", "HEAD", "--history", "history.jsonl").code == 0
    record = read_history(Path("history.jsonl"))[1]
    assert (record.date, record.commit, record.ms) == (WHEN, git("rev-parse", "HEAD"), 10.0)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("nothing", "results/cpu"), "nothing is neither a path that exists nor a commit"),
        (("HEAD~9", "results/cpu"), "HEAD~9 is neither a path that exists nor a commit"),
        (("HEAD..HEAD", "results/cpu"), "HEAD..HEAD is neither a path"),
        ((":/results", "results/cpu"), ":/results is neither a path"),
        (("x" * 5000, "results/cpu"), "xxx is neither a path"),
        (("HEAD:nothing", "results/cpu"), "HEAD:nothing does not exist: that commit has no files at nothing"),
        (("HEAD:results/link", "results/cpu"), "that commit has no files at results/link"),
        (("HEAD:../x", "results/cpu"), "HEAD:../x does not exist"),
        (("--", "--output=x", "results/cpu"), "--output=x is neither a path"),
        (("HEAD", "results/cpu", "--json", "--markdown"), "give one of them"),
        (("HEAD", "results/cpu", "--threshold", "nan"), "--threshold nan: give a percentage from 0 to 1000"),
        (("HEAD", "results/cpu", "--rounds", "9"), "--rounds is for --measure"),
        (("HEAD", "results/cpu", "--measure"), "HEAD:results is not an emitted package"),
        (("HEAD", "results/cpu", "--date", "2026-11-23"), "--date and --commit go with --history"),
        (("HEAD", "results/cpu", "--history", "h"), "give --date 2026-11-23, or a commit as NEW"),
        (("HEAD", "results/cpu", "--history", "h", "--date", "now"), "date 'now' is not in the form of"),
    ],
)
def test_what_is_refused_in_one_line(run: Run, repository: Path, arguments: tuple[str, ...], why: str) -> None:
    before = sorted(repository.rglob("*"))
    ran = run("compare", *arguments)
    assert ran.code == 2 and ran.out == "" and why in ran.err and len(ran.err.splitlines()) == 1
    assert sorted(repository.rglob("*")) == before


def test_without_a_repository_or_git(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    write(tmp_path / "cpu", ROW)
    ran = run("compare", "HEAD", "cpu")
    assert ran.code == 2 and "(git: fatal: not a git repository" in ran.err and len(ran.err.splitlines()) == 1
    monkeypatch.setenv("PATH", str(tmp_path))
    ran = run("compare", "HEAD", "cpu")
    assert ran.code == 2 and "git is not installed: give paths that exist instead of commits" in ran.err
    assert run("compare", "cpu", "cpu").code == 0
