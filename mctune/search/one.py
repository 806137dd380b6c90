"""One study: a problem and its segment lengths, from the search space to the frontier."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mctune.backends.protocol import Backend
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Crashed, Outcome, Timed, TimedOut, from_json, kind
from mctune.core.problem import Problem
from mctune.core.space import Int, SearchSpace
from mctune.core.workload import Case
from mctune.search.events import Listener, SearchRequest, StudyReport
from mctune.search.finalists import decide, shortlist
from mctune.search.frontier import SEGMENT_LENGTH, frontier, recommend
from mctune.search.sampler import START
from mctune.search.study import Trial, load_study, run_study
from mctune.search.timing import summary
from mctune.search.worker import Worker, WorkerDied, WorkerTimedOut

_LEAST_START = 8
_FINALISTS = 3  # of each segment length
_FINALISTS_LIMIT_S = 300.0


@dataclass(frozen=True)
class OneStudy:
    """A case of a request, ready to be searched; ``storage`` is an Optuna URL."""

    request: SearchRequest
    backend: Backend
    case: Case
    storage: str

    def run(self, worker: Worker, listener: Listener, timeout_s: float | None) -> tuple[StudyReport, bool]:
        """Search, then time the finalists against each other; and whether Ctrl-C ended it (no finalists then)."""
        space, total = self.space(), self.request.trials
        best: list[float] = []

        def on_trial(trial: Trial) -> None:
            if trial.ms is not None:
                best[:] = [min([trial.ms, *best])]
            listener.trial_done(trial.number, trial.config, trial.outcome, best[0] if best else None)

        listener.study_started(self.case, total, len(self._trials()))
        result = run_study(
            space,
            self.valid,
            lambda config: self._evaluate(worker, config),
            trials=total,
            timeout=timeout_s,
            sampler=self.request.sampler,
            seed=self.request.seed,
            storage=self.storage,
            study_name=self.name,
            attrs=self._about(),
            on_trial=on_trial,
            balance=SEGMENT_LENGTH if self.case.segment_lengths else None,
            start=min(START, max(_LEAST_START, total // 5)),
        )
        if result.stopped == "timeout":
            listener.note(f"the time limit ended the study after {len(result.trials)} of {total} trials")
        if result.stopped == "exhausted":
            listener.note(f"every valid configuration was tried: {len(result.trials)}")
        if result.interrupted:
            return self.report(result.trials, {}), True
        try:
            return self.report(result.trials, self._time_again(worker, listener, result.trials)), False
        except KeyboardInterrupt:
            return self.report(result.trials, {}), True

    def stored(self) -> StudyReport:
        """The report of what the storage holds, without timing anything.

        Raises:
            UsageError: if the study was never begun.
        """
        return self.report(load_study(self.storage, self.name)[1], {})

    def space(self) -> SearchSpace:
        """The templates' parameters and the segment length, the default made valid for the problem."""
        space = self.backend.space(self.case.problem)
        lengths = self.case.segment_lengths
        if lengths:
            space = space.with_param(Int(SEGMENT_LENGTH, lengths, "C: tokens of a segment"), lengths[len(lengths) // 2])
        default = space.first_valid(self.valid)
        return replace(space, default=default) if default is not None else space

    def valid(self, config: Config) -> bool:
        """Whether the space's constraints hold for the problem at the configuration's segment length."""
        space = self.backend.space(self.case.problem)
        return space.valid(config, self.problem(config), self.request.target)

    def problem(self, config: Config) -> Problem:
        """The problem at the configuration's segment length."""
        if SEGMENT_LENGTH not in config:
            return self.case.problem
        return self.case.problem.replace(segment_length=config.integer(SEGMENT_LENGTH))

    @property
    def name(self) -> str:
        """The study's name: what it is about for a person, and a digest of all that it is about."""
        digest = hashlib.sha256(json.dumps(self._about(), sort_keys=True).encode()).hexdigest()[:10]
        problem = self.case.problem
        return f"{problem.pass_}-{problem.recurrence}-{problem.aggregation}-T{problem.T}-{digest}"

    def _about(self) -> dict[str, Any]:
        target = self.request.target
        problem = {name: value for name, value in self.case.problem.to_dict().items() if name != SEGMENT_LENGTH}
        return {
            "problem": problem,
            "segment_lengths": list(self.case.segment_lengths),
            "target": [target.name, target.title, target.arch, target.cores],
            "backend": self.backend.identity(),
        }

    def _trials(self) -> Sequence[Trial]:
        try:
            return load_study(self.storage, self.name)[1]
        except UsageError:
            return ()

    def _evaluate(self, worker: Worker, config: Config) -> Outcome:
        candidate = {"problem": self.problem(config).to_dict(), "config": config.to_dict()}
        reply = worker.call({"evaluate": candidate}, self.request.trial_timeout_s)
        match reply:
            case WorkerDied(message, stage):
                return Crashed(f"{message} ({stage})")
            case WorkerTimedOut(seconds, stage):
                return TimedOut(seconds, stage)
            case _:
                return from_json(reply["outcome"])

    def _time_again(self, worker: Worker, listener: Listener, trials: Sequence[Trial]) -> dict[Config, list[float]]:
        """Milliseconds of the best candidates of every segment length, in rounds of rotated order in one process."""
        finalists = [config for group in self._groups(trials) for config in shortlist(group, most=_FINALISTS)]
        if not finalists:
            return {}
        listener.note(f"timing {len(finalists)} finalists against each other")
        payload = [{"problem": self.problem(config).to_dict(), "config": config.to_dict()} for config in finalists]
        reply = worker.call({"compare": payload}, _FINALISTS_LIMIT_S)
        if not isinstance(reply, dict):
            what = reply.message if isinstance(reply, WorkerDied) else f"no answer in {reply.seconds:g} s"
            listener.note(f"the finalists could not be timed again ({what}); the trials' own times decide")
            return {}
        return dict(zip(finalists, reply["samples"], strict=True))

    def _groups(self, trials: Sequence[Trial]) -> list[list[Trial]]:
        """Trials that have a time, by segment length, shortest first."""
        groups: dict[int, list[Trial]] = {}
        for trial in trials:
            if trial.ms is not None:
                groups.setdefault(self.problem(trial.config).segment_length or 0, []).append(trial)
        return [groups[length] for length in sorted(groups)]

    def report(self, trials: Sequence[Trial], samples: dict[Config, list[float]]) -> StudyReport:
        """The frontier and the recommendation; where finalists were timed again (``samples``), that decides."""
        kept: list[Trial] = []
        ties: dict[Config, tuple[Config, ...]] = {}
        for group in self._groups(trials):
            finalists = [config for config in shortlist(group, most=_FINALISTS) if config in samples]
            if not finalists:
                kept += group
                continue
            decision = decide(finalists, lambda configs: [samples[config] for config in configs])
            chosen = decision.winner.config
            ties[chosen] = tuple(f.config for f in decision.finalists if f.tied and f.config != chosen)
            kept += [_retimed(trial, samples[chosen]) for trial in group if trial.config == chosen]
        counted = Counter(kind(trial.outcome) for trial in trials)
        outcomes = tuple(sorted(counted.items(), key=lambda item: (-item[1], item[0])))
        points = frontier(kept, self.case.problem)
        if not points:
            return StudyReport(self.case, outcomes, (), None)
        best = recommend(points, self.request.max_slowdown)
        return StudyReport(self.case, outcomes, points, best, ties.get(best.config, ()))


def _retimed(trial: Trial, samples: Sequence[float]) -> Trial:
    """The trial with the times of the last round; the error against the oracle is its own."""
    assert isinstance(trial.outcome, Timed)
    ms, low, high = summary(samples)
    return replace(trial, outcome=replace(trial.outcome, ms=ms, low=low, high=high, repeats=len(samples)))
