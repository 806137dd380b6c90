"""Two packages timed by turns: kernels run and are held to what is right; the times themselves are made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mctune.backends.tvm import TvmBackend
from mctune.cli import main
from mctune.core.errors import DeviceError, MctuneError, UsageError
from mctune.core.outcome import Timed
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.core.winner import Winner
from mctune.emit.package import emit_package
from mctune.measure import packages, side_by_side
from mctune.measure.packages import packages_by_turns
from mctune.report.compare import ONLY_NEW, ONLY_OLD, SLOWER

FORWARD = Problem(T=96, H=1, Dk=8, Dv=8, segment_length=32)
DECODE = FORWARD.replace(pass_="decode")
BACKWARD = FORWARD.replace(pass_="backward")
RESIDUAL = FORWARD.replace(aggregation="residual")
TARGET, _ = resolve("cpu")
DRIFT = [1.0, 1.5, 2.0, 2.5, 3.0]


@pytest.fixture(scope="module")
def winners(kernel_folder: Path) -> dict[Problem, Winner]:
    """A kernel of each problem."""
    backend = TvmBackend()
    found = {}
    for problem in (FORWARD, BACKWARD, DECODE, RESIDUAL):
        space = backend.space(problem)
        config = space.first_valid(lambda one, space=space, problem=problem: space.valid(one, problem, TARGET))
        assert config is not None
        built = backend.build(problem, config, TARGET, kernel_folder)
        outcome = Timed(1.0, 0.9, 1.2, 5, 1e-7)
        found[problem] = Winner(problem, config, outcome, "tvm", "cpu", built.library, built.source, None, (), True, {})
    return found


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """What timing finds, after a run of each kernel; a test puts its samples in."""
    samples: list[list[float]] = []

    def once(held: Sequence[Any], **_: Any) -> list[list[float]]:
        for one in held:
            one.prepare()
            one.compare(one.call())
        return samples

    monkeypatch.setattr(side_by_side, "time_rotated", once)
    return samples


def emitted(folder: Path, *winners: Winner) -> Path:
    return emit_package(folder / "mctune_cpu", TARGET, list(winners))


def test_packages_of_one_name_are_judged_by_the_sign_test(
    winners: dict[Problem, Winner], times: list[list[float]], tmp_path: Path
) -> None:
    old, new = (
        emitted(tmp_path / side, *(winners[one] for one in (FORWARD, BACKWARD, DECODE))) for side in ("old", "new")
    )
    threads = torch.get_num_threads()
    # The medians are far apart and the spreads overlap: the rounds decide.
    times[:] = [DRIFT, [1.2 * ms for ms in DRIFT]]
    notes: list[str] = []
    found = packages_by_turns(old, new, rounds=5, threshold=0.05, note=notes.append)
    assert [pair.problem for pair in found] == [BACKWARD, DECODE, FORWARD] and len(notes) == 3
    for pair in found:
        assert pair.verdict == SLOWER and pair.ratio == pytest.approx(1.2)
        assert pair.old is not None and pair.new is not None
        assert (pair.old.ms, pair.old.low, pair.old.high, pair.old.repeats) == (2.0, 1.5, 2.5, 5)
        assert pair.new.ms == pytest.approx(2.4) and pair.new.config == winners[pair.problem].config
    assert torch.get_num_threads() == threads


def test_the_command_times_and_what_one_package_lacks_is_told(
    winners: dict[Problem, Winner], times: list[list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = emitted(tmp_path / "old", winners[FORWARD], winners[DECODE])
    new = emitted(tmp_path / "new", winners[FORWARD], winners[BACKWARD])
    times[:] = [DRIFT, [1.2 * ms for ms in DRIFT]]
    history = tmp_path / "history.jsonl"
    arguments = ["compare", str(old), str(new), "--measure", "--rounds", "5", "--json"]
    assert main([*arguments, "--history", str(history), "--date", "2026-11-23"]) == 5
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["rows"]
    assert [row["verdict"] for row in rows] == [ONLY_NEW, ONLY_OLD, SLOWER]
    assert "timed by turns on this machine, 5 rounds" in printed.err and f"1/1 {FORWARD} by tvm" in printed.err
    # What was not timed now is no time of that day.
    (line,) = history.read_text().splitlines()
    assert json.loads(line)["problem"]["pass"] == "forward" and json.loads(line)["ms"] == pytest.approx(2.4)


def test_a_wrong_kernel_has_no_time(winners: dict[Problem, Winner], times: list[list[float]], tmp_path: Path) -> None:
    right = emitted(tmp_path / "right", winners[RESIDUAL])
    wrong = emitted(tmp_path / "wrong", replace(winners[FORWARD], problem=RESIDUAL))
    times[:] = [DRIFT]
    for pair in ((right, wrong), (wrong, right)):
        with pytest.raises(
            MctuneError, match=f"^{wrong}, {RESIDUAL}: wrong: .*`mctune verify {wrong}` holds the whole"
        ):
            packages_by_turns(*pair, rounds=5, threshold=0.05, note=print)
    with pytest.raises(UsageError, match="have no problem and backend in common"):
        packages_by_turns(right, emitted(tmp_path / "other", winners[DECODE]), rounds=5, threshold=0.05, note=print)


def test_what_cannot_be_timed_here(
    winners: dict[Problem, Winner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = emitted(tmp_path / "a", winners[FORWARD])
    with pytest.raises(UsageError, match="is not an emitted package"):
        packages_by_turns(package, tmp_path, rounds=5, threshold=0.05, note=print)
    gpu = {(FORWARD, "triton", "cuda"): object()}
    monkeypatch.setattr(packages, "_loaded", lambda path, *_: packages._Package(path, shutil, gpu))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="have kernels for a GPU, and there is none here"):
        packages_by_turns(package, package, rounds=5, threshold=0.05, note=print)
