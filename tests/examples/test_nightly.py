"""examples/nightly.yml: its every command exists with the options that it is given, and it never runs here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from mctune.cli._main import group
from mctune.core.errors import RegressionError
from mctune.core.target import targets

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "nightly.yml"
ENDS = {"|", "||", "&&", ";", ">", ">>", "2>"}


def workflow() -> dict[Any, Any]:
    return yaml.safe_load(PAGE.read_text(encoding="utf-8"))


def steps() -> list[dict[str, Any]]:
    (job,) = workflow()["jobs"].values()
    return job["steps"]


def commands(text: str, program: str) -> list[list[str]]:
    """The arguments of each call of a program in a shell script, up to what ends it."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        for at, word in enumerate(words):
            if word.rpartition("/")[2] == program:
                ends = [n for n, other in enumerate(words) if n > at and other in ENDS]
                found.append(words[at + 1 : ends[0] if ends else None])
    return found


CALLS = [call for step in steps() for call in commands(step.get("run", ""), "mctune")]


def parsed(call: list[str]) -> click.Context:
    """The command's own reading of its arguments; it is not run."""
    name, *arguments = call
    with click.Context(group) as context:
        command = group.get_command(context, name)
        assert command is not None, name
        return command.make_context(name, arguments)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_every_command_takes_what_it_is_given(call: list[str]) -> None:
    parsed(call)


def test_the_night_times_reports_and_compares() -> None:
    assert [call[0] for call in CALLS] == ["bench", "report", "compare"]
    bench, report, compare = (parsed(call).params for call in CALLS)
    assert (str(bench["out"]),) == report["inputs"]
    assert compare["history"] and compare["date"] and compare["commit"] and compare["as_markdown"]
    assert f"Exit code {RegressionError.exit_code}," in PAGE.read_text(encoding="utf-8")


def test_a_wrong_option_would_be_seen() -> None:
    with pytest.raises(click.NoSuchOption):
        parsed(["compare", "a", "b", "--histry", "x"])


def test_make_targets_and_files_exist() -> None:
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wanted = [call[0] for step in steps() for call in commands(step.get("run", ""), "make")]
    assert wanted and set(wanted) <= rules
    assert workflow()["env"]["TARGET"] in {target.name for target in targets()}
    for path in re.findall(r"docs/\w+\.md", PAGE.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file()


def test_it_runs_by_itself_nowhere() -> None:
    """It stands outside .github; on a fork's machine it would run what a pull request says, so none starts it."""
    assert not (ROOT / ".github" / "workflows" / PAGE.name).exists()
    # YAML reads the key `on` as true.
    assert set(workflow()[True]) == {"schedule", "workflow_dispatch"}


def test_no_expression_is_pasted_into_a_shell() -> None:
    assert not [step for step in steps() if "${{" in step.get("run", "")]
