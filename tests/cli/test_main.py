"""The group: commands, errors and exit codes, and how little it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import mctune
import mctune.cli
from mctune.cli import _main, main
from mctune.core.errors import DeviceError, MctuneError, NoValidConfigError, UsageError

HEAVY = "{'torch', 'tvm', 'tvm_ffi', 'triton', 'optuna', 'numpy', 'rich'}"


def test_there_is_one_file_a_command(run: Callable[..., object]) -> None:
    ran = run("--help")
    files = {path.stem for path in Path(mctune.cli.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    listed = [line.split()[0] for line in ran.out.split("Commands:")[1].splitlines() if line.strip()]
    assert set(listed) == files and {"search", "targets", "spaces", "report", "doctor"} <= files
    for name in listed:
        helped = run(name, "--help")
        assert helped.code == 0 and "--json" in helped.out


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from mctune.cli import main\n"
        "assert main(['--help']) == 0\n"
        f"assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)\n"
    )
    spent = []
    for _ in range(3):
        # Processor time, not wall-clock time: the machine may be busy.
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = os.times()
        spent.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert min(spent) < 0.5


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "mctune", "targets", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("mctune: error: unknown target 'nothing'")


@pytest.mark.parametrize("closed", (0, 1, 2))
def test_no_file_takes_the_place_of_a_closed_stream(closed: int, tmp_path: Path) -> None:
    """A worker's pipe would get what is meant for stderr."""
    code = (
        "import os, pathlib, mctune.__main__\n"
        f"seen = os.readlink('/proc/self/fd/{closed}'), os.get_inheritable({closed})\n"
        "pathlib.Path('seen').write_text(repr(seen))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=environment, preexec_fn=lambda: os.close(closed), check=True)
    assert (tmp_path / "seen").read_text() == repr((os.devnull, True))


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UsageError("x"), 2),
        (DeviceError("x"), 3),
        (NoValidConfigError("x"), 4),
        (MctuneError("x"), 1),
        (KeyboardInterrupt(), 130),
        (click.UsageError("x"), 2),
    ],
)
def test_exit_codes(
    run: Callable[..., object], monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int
) -> None:
    @click.command()
    def failing() -> None:
        raise raised

    monkeypatch.setattr(_main._Commands, "get_command", lambda *_: failing)
    ran = run("targets")
    assert ran.code == code and ran.out == ""
    assert ran.err.strip() and "Traceback" not in ran.err
    assert len(ran.err.splitlines()) == 1 or isinstance(raised, click.UsageError | KeyboardInterrupt)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def failing() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(_main._Commands, "get_command", lambda *_: failing)
    with pytest.raises(ZeroDivisionError):
        main(["targets"])


def test_an_unknown_command_is_a_usage_error(run: Callable[..., object]) -> None:
    ran = run("serach")
    assert ran.code == 2 and "serach" in ran.err


def test_version(run: Callable[..., object]) -> None:
    assert run("--version").out == f"mctune {mctune.__version__}\n"


def test_a_working_directory_that_is_gone_is_one_line(
    run: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    ran = run("spaces")
    assert ran.code == 2 and "working directory is gone" in ran.err and len(ran.err.splitlines()) == 1
