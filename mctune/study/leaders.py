"""What stands for each segment length of a study, once its trials are over: the best that is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from mctune.core.config import Config
from mctune.core.outcome import Predicted, Timed, TimedOut, describe
from mctune.measure.timing import summary
from mctune.study.confirm import outcome_of
from mctune.study.events import Listener
from mctune.study.finalists import decide, shortlist
from mctune.study.record import Trial
from mctune.workers.pool import Workers
from mctune.workers.worker import WorkerDied

_FINALISTS = 5  # for each segment length
_VERIFIED = 5  # predicted candidates for each segment length that may turn out wrong before it gets none
_Groups = Mapping[int, Sequence[Trial]]
"""Trials that have a time, by segment length."""
_Samples = dict[Config, Sequence[float]]


@dataclass(frozen=True)
class Leader:
    """The candidate that stands for a segment length, and those that are as fast within noise."""

    trial: Trial
    ties: tuple[Config, ...] = ()


@dataclass(frozen=True)
class Deciding:
    """Decides by ``workers``, each answer within ``limit_s``; ``candidate`` is what they take for a configuration."""

    workers: Workers
    listener: Listener
    candidate: Callable[[Config], dict[str, Any]]
    limit_s: float

    def verify_fastest(self, groups: _Groups) -> dict[int, Leader]:
        """The fastest predicted candidate of every segment length that is right; where none is, there is no leader."""
        pool = ThreadPoolExecutor(self.workers.count)
        try:
            found = dict(zip(groups, pool.map(self._fastest_right, groups.values()), strict=True))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for _, notes in found.values():
            for text in notes:
                self.listener.note(text)
        return {length: leader for length, (leader, _) in found.items() if leader is not None}

    def _fastest_right(self, group: Sequence[Trial]) -> tuple[Leader | None, list[str]]:
        """The fastest of some candidates that is right, and what is wrong with those before it."""
        notes: list[str] = []
        for trial in sorted(group, key=lambda trial: (trial.ms, trial.number))[:_VERIFIED]:
            outcome = outcome_of(self.workers.verify(self.candidate(trial.config), self.limit_s))
            if isinstance(outcome, Predicted):
                assert isinstance(trial.outcome, Predicted)
                return Leader(replace(trial, outcome=replace(trial.outcome, error=outcome.error))), notes
            more = "; --trial-timeout gives more" if isinstance(outcome, TimedOut) else ""
            notes.append(f"{describe(outcome)}{more}  [{trial.config}]")
        return None, notes

    def time_again(self, groups: _Groups) -> dict[int, Leader] | None:
        """The best of every segment length after rounds of rotated order in one process, held to everything once more.

        ``None`` if they could not be timed.
        """
        lists = {length: shortlist(group, most=_FINALISTS) for length, group in groups.items()}
        finalists = [config for group in lists.values() for config in group]
        if not finalists:
            return {}
        self.listener.note(f"timing {len(finalists)} finalists against each other")
        samples = self._samples(finalists)
        if samples is None:
            return None
        leaders: dict[int, Leader] = {}
        for length, configs in lists.items():
            group = {trial.config: trial for trial in groups[length]}
            leader = self._best([(group[config], samples[config]) for config in configs if samples[config]])
            if leader is not None:
                leaders[length] = leader
                continue
            # The next best have their turn, without those.
            left = [trial for trial in groups[length] if trial.config not in samples]
            leaders |= self.time_again({length: left}) or {}
        return leaders

    def _samples(self, finalists: Sequence[Config]) -> _Samples | None:
        """The times of each, none of one that is not right after all; ``None`` if they could not be timed."""
        left = list(finalists)
        reply = self.workers.compare([self.candidate(config) for config in left], self.limit_s)
        if not isinstance(reply, dict):
            # One that crashes takes the others with it.
            left = [config for config in left if self._right(config)]
            if left and len(left) < len(finalists):
                reply = self.workers.compare([self.candidate(config) for config in left], self.limit_s)
        if not isinstance(reply, dict):
            if not left:
                return dict.fromkeys(finalists, ())
            what = reply.message if isinstance(reply, WorkerDied) else f"no answer in {reply.seconds:g} s"
            self.listener.note(f"the finalists could not be timed again ({what}); the trials' own times decide")
            return None
        for failure in reply["failures"]:
            self._not_right(failure)
        timed: _Samples = dict(zip(left, reply["samples"], strict=True))
        return {config: timed.get(config, ()) for config in finalists}

    def _best(self, timed: Sequence[tuple[Trial, Sequence[float]]]) -> Leader | None:
        """The best of some finalists, with their times, that is right."""
        left = {trial.config: (trial, samples) for trial, samples in timed}
        while left:
            decision = decide(list(left), lambda configs: [left[config][1] for config in configs])
            chosen = decision.winner.config
            if self._right(chosen):
                ties = tuple(f.config for f in decision.finalists if f.tied and f.config != chosen)
                return Leader(_retimed(*left[chosen]), ties)
            del left[chosen]
        return None

    def _right(self, config: Config) -> bool:
        """Whether a finalist is right when it is held to everything once more; if not, why is told."""
        reply = self.workers.hold(self.candidate(config), self.limit_s)
        if isinstance(reply, WorkerDied) and reply.fault:
            reply = self.workers.hold(self.candidate(config), self.limit_s, again=True)
        outcome = outcome_of(reply)
        if isinstance(outcome, Predicted):
            return True
        self._not_right(describe(outcome))
        return False

    def _not_right(self, why: str) -> None:
        self.listener.note(f"a finalist is not right after all: {why}")


def _retimed(trial: Trial, samples: Sequence[float]) -> Trial:
    """The trial with the times of the last round; its error, and the shares of its operations, are what they were."""
    assert isinstance(trial.outcome, Timed)
    ms, low, high = summary(samples)
    parts = tuple((name, part * ms / trial.outcome.ms) for name, part in trial.outcome.parts)
    timed = replace(trial.outcome, ms=ms, low=low, high=high, repeats=len(samples), parts=parts, pace=1.0)
    return replace(trial, outcome=timed)
