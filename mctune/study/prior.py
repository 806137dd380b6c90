"""The cost model as a prior: a study that only predicts goes before one that times candidates on a GPU.

Compiling a candidate takes seconds on any of many cores; timing it, the one GPU. So what the model ranks best is found
beside it first, in a study of its own in the same storage, and the measured study begins with that as with all else
that is known already (:mod:`mctune.study.known`). How good the ranking was is said at the end.
"""

from __future__ import annotations

import time
from dataclasses import replace

from mctune.backends import get_backend
from mctune.core.accuracy import accuracy
from mctune.core.config import Config
from mctune.core.outcome import Outcome
from mctune.core.workload import Case
from mctune.study.events import Listener, StudyReport
from mctune.study.one import OneStudy
from mctune.workers.pool import Workers

TRIALS = 32
"""Candidates that are predicted; no more than are timed."""
SHARE = 0.2
"""Of a study's time, at most."""


class _Quiet:
    """Hears of a study that is nobody's concern."""

    def __init__(self, listener: Listener) -> None:
        self.note = listener.note

    def study_started(self, case: Case, total: int, done: int) -> None:
        """Nothing is said."""

    def trial_done(self, number: int, config: Config, outcome: Outcome, best_ms: float | None) -> None:
        """Nothing is said."""

    def study_done(self, report: StudyReport) -> None:
        """Nothing is said."""


def predicted(study: OneStudy) -> OneStudy:
    """The study of the same candidates, predicted; its winners are not decided between."""
    request = study.request
    trials = min(TRIALS, study.trials)
    return replace(
        study,
        case=replace(study.case, trials=trials),
        request=replace(request, measure=False, decide=False),
        backend=get_backend(study.backend.maker),
    )


def predict_first(study: OneStudy, workers: Workers, listener: Listener, share_s: float | None) -> float:
    """Predict before a measured study on a GPU is begun, unless it begins with nothing that is known; the seconds.

    Raises:
        CutShort: if the machine or the storage fails.
    """
    if not study.request.warm or study.so_far():
        return 0.0
    begun, beside = time.monotonic(), predicted(study)
    listener.note(f"predicting {beside.trials} candidates before any is timed")
    beside.run(workers, _Quiet(listener), None if share_s is None else SHARE * share_s)
    return time.monotonic() - begun


def judged(study: OneStudy) -> str:
    """How the model ranked what was both predicted and timed, in one line; empty where too little was."""
    told = {trial.config: trial.ms for trial in predicted(study).so_far() if trial.ms is not None}
    pairs = [
        (trial.ms, told[trial.config]) for trial in study.so_far() if trial.ms is not None and trial.config in told
    ]
    found = accuracy(pairs)
    if found is None:
        return ""
    ranked = "" if found.spearman is None else f", rank correlation {found.spearman:.2f}"
    return (
        f"the cost model was off by {found.factor:.2f}x on {found.count} candidates{ranked}; `mctune calibrate` fits "
        "it to what was timed"
    )
