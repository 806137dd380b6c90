"""Before candidates are timed on a GPU the cost model ranks some, and the study begins with the best of them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mctune.backends import get_backend
from mctune.core.config import Config
from mctune.core.outcome import Predicted, Timed, to_json
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.core.workload import Case
from mctune.study.events import SearchRequest
from mctune.study.one import OneStudy
from mctune.study.prior import TRIALS, judged, predict_first, predicted
from mctune.study.storage import sqlite_url

PROBLEM = Problem(T=4096, H=16, Dk=64, Dv=64, segment_length=256, aggregation="grm", dtype="bfloat16")


class Model:
    """Stands in for workers: what is measured is three times what is predicted, but for the candidate's own noise."""

    count = 2

    def __init__(self) -> None:
        self.asked: list[tuple[bool, Config]] = []

    def evaluate(self, candidate: dict[str, Any], limit_s: float, until: Any, *, measure: bool) -> dict[str, Any]:
        config = Config.of(candidate["config"])
        self.asked.append((measure, config))
        sizes = [value for _, value in config.items if isinstance(value, int) and value > 0]
        ms = 1.0 + sum(abs(math.log2(size) - 4.0) for size in sizes)
        outcome = Timed(3 * ms, 3 * ms, 3 * ms, 7, 1e-4) if measure else Predicted(ms, "a model")
        return {"outcome": to_json(outcome)}

    def compare(self, candidates: list[dict[str, Any]], limit_s: float) -> dict[str, Any]:
        return {"samples": [[1.0] * 7 for _ in candidates], "failures": []}

    def hold(self, candidate: dict[str, Any], limit_s: float) -> dict[str, Any]:
        return {"outcome": to_json(Predicted(0.0, "", 1e-4))}


@pytest.mark.parametrize("warm", [True, False])
def test_what_the_model_ranks_best_is_timed_first(warm: bool, tmp_path: Path) -> None:
    request = SearchRequest(
        target=resolve("h100-sxm")[0],
        cases=(Case(PROBLEM, (256,)),),
        out=tmp_path,
        trials=16,
        warm=warm,
        backend="triton",
    )
    study = OneStudy(request, get_backend("triton").measuring(), request.cases[0], sqlite_url(tmp_path / "s.db"))
    notes: list[str] = []
    listener: Any = SimpleNamespace(note=notes.append, study_started=lambda *_: None, trial_done=lambda *_: None)
    workers = Model()

    predict_first(study, cast(Any, workers), listener, None)
    ranked = [config for measure, config in workers.asked if not measure]
    assert len(ranked) == (min(TRIALS, request.trials) if warm else 0) == len(workers.asked)
    report, _ = study.run(cast(Any, workers), listener, None)

    timed = [config for measure, config in workers.asked if measure]
    assert report.trials == len(timed) == request.trials
    if not warm:
        assert not notes or "predicting" not in notes[0]
        return
    best = min(predicted(study).so_far(), key=lambda trial: trial.ms or math.inf)
    assert any(set(best.config.items) <= set(config.items) for config in timed[:8])
    assert notes[0] == "predicting 16 candidates before any is timed"
    assert any(note.startswith("starting from") and "the study" in note for note in notes)
    told = judged(study)
    assert "the cost model was off by 3.00x on" in told and "rank correlation 1.00; `mctune calibrate`" in told
    # Nothing is predicted again where candidates were timed.
    assert predict_first(study, cast(Any, workers), listener, None) == 0.0


def test_too_little_says_nothing_of_the_model(tmp_path: Path) -> None:
    request = SearchRequest(target=resolve("t4")[0], cases=(Case(PROBLEM, (256,)),), out=tmp_path, trials=4)
    assert judged(OneStudy(request, get_backend("triton"), request.cases[0], sqlite_url(tmp_path / "s.db"))) == ""
