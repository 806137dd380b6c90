"""Templates held to the oracle by many processes: what is done already, what the time cuts off."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mctune.core.target import resolve
from mctune.verify.spread import Drawn, walk
from mctune.workers import hold as module
from mctune.workers.hold import Held, hold
from mctune.workers.worker import WorkerDied, WorkerTimedOut
from tests.workers.test_side_by_side import PROBLEM

TARGET = resolve("h200")[0]
CONFIG = walk(random.Random(0), PROBLEM, TARGET)
WIDE, NARROW = (Drawn(PROBLEM.replace(dtype=dtype), CONFIG) for dtype in ("bfloat16", "float16"))


class Planted:
    """Stands in for a worker; ``answers`` are given in turn, a number is the error of a right candidate."""

    answers: list[Any]
    environments: list[dict[str, str]]

    def __init__(self, entry: str, setup: Any, *, env: dict[str, str]) -> None:
        self.environments.append(env)

    def __enter__(self) -> Planted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def halt(self) -> None:
        pass

    def call(self, payload: dict[str, Any], limit_s: float) -> Any:
        answer = self.answers.pop(0)
        if answer == "slow":
            return WorkerTimedOut(limit_s, "build")
        return {"error": answer, "failure": ""} if isinstance(answer, float) else answer


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> type[Planted]:
    Planted.answers, Planted.environments = [], []
    monkeypatch.setattr(module, "Worker", Planted)
    monkeypatch.setattr(module, "usable_cores", lambda: 1)
    return Planted


@pytest.mark.parametrize("here", [True, False])
def test_a_result_in_one_dtype_is_another_ones_only_in_the_interpreter(
    planted: type[Planted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    monkeypatch.setattr(module, "present", lambda target: here)
    record = tmp_path / "held.jsonl"
    planted.answers = [1e-3, 2e-3, 3e-3]
    (first,) = hold([NARROW], TARGET, record, None)
    again = list(hold([WIDE, NARROW], TARGET, record, None))
    assert again[0] == first
    assert [held.problem.dtype for held in again[1:]] == (["bfloat16"] if here else ["float16"])
    assert len(list(hold([WIDE, NARROW], TARGET, record, None))) == 2
    # torch reads its number of threads when it is imported.
    assert all(env.get("OMP_NUM_THREADS") for env in planted.environments)
    assert all(("TRITON_INTERPRET" in env) != here for env in planted.environments)


def test_what_the_time_cuts_off_has_no_result(planted: type[Planted], tmp_path: Path) -> None:
    record = tmp_path / "held.jsonl"
    planted.answers = ["slow", WorkerDied("boom", "verify")]
    assert [held.failure for held in hold([WIDE, NARROW], TARGET, record, 60.0)] == ["crashed: boom (verify)"]
    assert len(record.read_text().splitlines()) == 1
    planted.answers = ["slow"]
    (late,) = hold([WIDE], TARGET, tmp_path / "other.jsonl", None)
    assert late.failure == "timed out: build took longer than 240 s" and late.error is None
    assert Held.from_dict(json.loads(json.dumps(late.to_dict()))) == late
    assert list(hold([WIDE], TARGET, tmp_path / "third.jsonl", -1.0)) == []
