"""One study: a problem and its segment lengths, from the search space to the frontier."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mctune.backends.protocol import Backend
from mctune.core.config import Config
from mctune.core.errors import DeviceError, MctuneError, UsageError
from mctune.core.interrupt import held
from mctune.core.known import Machine
from mctune.core.outcome import Crashed, FailedBuild, Outcome, Timed, TimedOut, cost, describe, kind
from mctune.core.problem import Problem
from mctune.core.space import Constraint, Int, SearchSpace
from mctune.core.workload import Case
from mctune.study.confirm import evaluated
from mctune.study.events import FrontierPoint, Listener, SearchRequest, StudyReport
from mctune.study.feasible import Feasible
from mctune.study.frontier import SEGMENT_LENGTH, frontier, recommend
from mctune.study.known import Home, begun_from, recorded, seeds
from mctune.study.leaders import Deciding, Leader
from mctune.study.record import Trial
from mctune.study.rules import Rule
from mctune.study.samplers import start_of
from mctune.study.samplers.chain import APART
from mctune.study.samplers.parts import judged
from mctune.study.study import CutShort, load_study, run_study
from mctune.workers.payload import Beside
from mctune.workers.pool import Workers

_ALIKE = 12  # candidates that all fail in one way, none before them having got further, are not what is wrong
_SPARE = 2  # for each segment length: they ship where the best turns out wrong


@dataclass(frozen=True)
class OneStudy:
    """A case of a request, ready to be searched; ``storage`` is an Optuna URL."""

    request: SearchRequest
    backend: Backend
    case: Case
    storage: str

    def run(
        self, workers: Workers, listener: Listener, timeout_s: float | None, at_most_s: float | None = None
    ) -> tuple[StudyReport, bool]:
        """Search, then decide between the best that were measured, by :meth:`decided`; and whether Ctrl-C ended it
        (nothing is decided then).

        After ``timeout_s`` no candidate is started, and those under way are cut off; where none has a time yet, they
        have until ``at_most_s``.

        Measured candidates are timed against each other. Predicted ones are to be verified, when all studies are over.

        Raises:
            CutShort: with what was found, if the machine or the storage fails.
        """
        space, lengths, total = self.space(), self.case.segment_lengths, self.trials
        started, so_far = time.monotonic(), self.so_far()
        until = None if timeout_s is None else started + timeout_s
        at_most = None if at_most_s is None else started + at_most_s
        best: list[float] = []

        def on_trial(trial: Trial) -> None:
            if trial.ms is not None:
                best[:] = [min([trial.ms, *best])]
            listener.trial_done(trial.number, trial.config, trial.outcome, best[0] if best else None)

        listener.study_started(self.case, total, len(so_far))
        candidates = _Candidates(workers, self, until, at_most, any(trial.ms is not None for trial in so_far))
        candidates.go_on_from(so_far)
        for note in self._without_point(space):
            listener.note(note)
        result = run_study(
            space,
            self.rules(),
            candidates.evaluate,
            trials=total,
            timeout=timeout_s,
            sampler=self.request.sampler,
            seed=self.request.seed,
            storage=self.storage,
            study_name=self.name,
            attrs=self._about(),
            on_trial=on_trial,
            balance=SEGMENT_LENGTH if lengths else None,
            start=start_of(total),
            first=() if so_far else self._known_already(space, listener),
            at_once=workers.count,
            guard=False,
        )
        if result.stopped == "timeout":
            listener.note(f"the time limit ended the study after {len(result.trials)} of {total} trials")
        if result.stopped == "exhausted":
            listener.note(f"no further valid configuration: {len(result.trials)} were tried")
        if note := self._sums(space, result.trials):
            listener.note(note)
        if result.interrupted or not (self.request.decide and self.request.measure):
            return self.report(result.trials), result.interrupted
        try:
            with held() as ctrl_c, ctrl_c.let_in():
                return self.decided(workers, listener, result.trials), False
        except KeyboardInterrupt:
            return self.report(result.trials), True
        except MctuneError as error:
            raise CutShort(error, result.trials) from error

    def decided(self, workers: Workers, listener: Listener, trials: Sequence[Trial]) -> StudyReport:
        """The report once the best of ``trials`` are decided between: what is recommended has been held to everything.

        Raises:
            MctuneError: if the machine fails.
        """
        deciding = Deciding(workers, listener, self.candidate, self.request.holding_s)
        decide = deciding.time_again if self.request.measure else deciding.verify_fastest
        return self.report(trials, decide(self._groups(trials)))

    @property
    def trials(self) -> int:
        """Candidates of this study in all."""
        return self.case.trials or self.request.trials

    def _sums(self, space: SearchSpace, trials: Sequence[Trial]) -> str:
        """What was judged one by one, and whether the times of operations added up."""
        found = judged(space, [(trial.config, trial.outcome) for trial in trials])
        if found is None or self.request.sampler != "chain" or not trials:
            return ""
        count = f"{len(trials)} trials judged {found.variants} variants of operations"
        if found.misses is None:
            return count
        off = f"{count}; their times miss the time of the whole by {found.misses:.1%}".replace("%", " %")
        return off if found.misses <= APART else f"{off}: not searched one by one any more, but all together"

    def stored(self) -> StudyReport:
        """The report of what the storage holds, without timing anything.

        Raises:
            UsageError: if the study was never begun.
        """
        return self.report(load_study(self.storage, self.name)[1])

    def so_far(self) -> Sequence[Trial]:
        """What earlier runs have evaluated."""
        try:
            return load_study(self.storage, self.name)[1]
        except UsageError:
            return ()

    def space(self) -> SearchSpace:
        """The templates' parameters and the segment length."""
        space = self.backend.space(self.case.problem)
        lengths = self.case.segment_lengths
        if not lengths:
            return space
        return space.with_param(Int(SEGMENT_LENGTH, lengths, "C: tokens of a segment"), lengths[len(lengths) // 2])

    def rules(self) -> tuple[Rule, ...]:
        """The space's constraints, each for the problem at the configuration's segment length."""
        problem, target = cache(self._at_length), self.request.target

        def rule(constraint: Constraint) -> Rule:
            return lambda config: constraint.holds(config, problem(_length(config)), target)

        return tuple(rule(constraint) for constraint in self.backend.space(self.case.problem).constraints)

    def _known_already(self, space: SearchSpace, listener: Listener) -> tuple[Config, ...]:
        """What a study that has no trial yet begins with, besides its defaults; ``listener`` is told."""
        request = self.request
        if not request.warm:
            return ()
        machine, rules = Machine.of(request.target), self.rules()
        home = Home(self.case, machine, self.backend.identity()["name"], request.measure, space, rules)
        found = seeds(home, (*recorded(self.storage, self.name, home), *request.known))
        if found:
            listener.note(begun_from(found))
        return tuple(seed.config for seed in found)

    def _without_point(self, space: SearchSpace) -> Iterator[str]:
        """What is to be said of each segment length that no configuration is valid with, or of the problem."""
        points, fixed = Feasible(space, self.rules()), self.case.segment_lengths or (None,)
        for position, length in enumerate(fixed):
            stratum = None if length is None else (len(space.params) - 1, position)
            if next(points.ordered(stratum), None) is None:
                with_it = "" if length is None else f" with segments of {length} tokens"
                broken = space.nearest(self._at_length(length), self.request.target)
                why = "; ".join(f"{one.name}: {one.reason}" for one in broken)
                yield f"no configuration is valid{with_it}; the nearest default breaks {why or 'nothing'}"

    def problem(self, config: Config) -> Problem:
        """The problem at the configuration's segment length."""
        return self._at_length(_length(config))

    def _at_length(self, length: int | None) -> Problem:
        return self.case.problem if length is None else self.case.problem.replace(segment_length=length)

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
            "how": "measured" if self.request.measure else "predicted",
        }

    def candidate(self, config: Config) -> dict[str, Any]:
        problem = self.problem(config).to_dict()
        return {"problem": problem, "config": config.to_dict(), "maker": self.backend.maker}

    def _groups(self, trials: Sequence[Trial]) -> dict[int, list[Trial]]:
        """Trials that have a time, by segment length, shortest first."""
        groups: dict[int, list[Trial]] = {}
        for trial in trials:
            if trial.ms is not None:
                groups.setdefault(self._at(trial), []).append(trial)
        return dict(sorted(groups.items()))

    def _at(self, trial: Trial) -> int:
        return self.problem(trial.config).segment_length or 0

    def report(self, trials: Sequence[Trial], leaders: Mapping[int, Leader] | None = None) -> StudyReport:
        """The frontier and the recommendation; with ``leaders``, they alone stand for their segment lengths."""
        groups = self._groups(trials)
        kept = [trial for group in groups.values() for trial in group]
        if leaders is not None:
            alone = [leaders[length].trial for length in groups if length in leaders]
            # Finalists' times replace earlier ones; a candidate counts only once it was held as a finalist.
            kept = alone
        ties = {leader.trial.config: leader.ties for leader in (leaders or {}).values()}
        counted = Counter(kind(trial.outcome) for trial in trials)
        outcomes = tuple(sorted(counted.items(), key=lambda item: (-item[1], item[0])))
        points = frontier(kept, self.case.problem)
        if not points:
            return StudyReport(self.case, outcomes, (), None, maker=self.backend.maker)
        best = recommend(points, self.request.max_slowdown)
        spare = self._next_best(groups, points) if self.request.measure else ()
        return StudyReport(self.case, outcomes, points, best, ties.get(best.config, ()), spare, self.backend.maker)

    def _next_best(
        self, groups: Mapping[int, Sequence[Trial]], points: Sequence[FrontierPoint]
    ) -> tuple[FrontierPoint, ...]:
        """The ``_SPARE`` fastest candidates of every segment length after those that stand for it."""
        found: list[FrontierPoint] = []
        for _ in range(_SPARE):
            taken = {point.config for point in (*points, *found)}
            left = [trial for group in groups.values() for trial in group if trial.config not in taken]
            found += frontier(left, self.case.problem)
        return tuple(found)


@dataclass
class _Candidates:
    """The evaluation of one run's candidates, in threads: a machine that fails them all is not what they are."""

    workers: Workers
    study: OneStudy
    until: float | None
    at_most: float | None
    """What takes the place of ``until`` as long as no candidate has a time."""
    got_one: bool
    first_timed: dict[int | None, Beside] = field(default_factory=dict)
    """By segment length, what all later candidates are timed beside: the first that has a time."""
    alike: int = 0
    """Failures of one kind since the run began; negative once there was anything else."""
    first: str = ""

    def go_on_from(self, trials: Sequence[Trial]) -> None:
        """Take up what earlier runs have timed first."""
        for trial in trials:
            self._take_up(trial.config, trial.outcome)

    def _take_up(self, config: Config, outcome: Outcome | None) -> None:
        """Time later ones beside this one, where it is the first that has a time."""
        if isinstance(outcome, Timed):
            self.first_timed.setdefault(_length(config), Beside(config, outcome.ms / outcome.pace))

    def evaluate(self, config: Config) -> Outcome | None:
        """What became of one; ``None`` if there was no time for it.

        Raises:
            DeviceError: if the machine is at fault.
        """
        limit_s = self.study.request.trial_timeout_s
        until = self.until if self.got_one else self.at_most
        measure = self.study.request.measure
        outcome = evaluated(self.workers, self._beside(config), limit_s, until, measure=measure)
        self._take_up(config, outcome)
        self.got_one = self.got_one or (outcome is not None and cost(outcome) is not None)
        if outcome is None or self.alike < 0:
            return outcome
        name = kind(outcome)
        fails = isinstance(outcome, FailedBuild | Crashed | TimedOut) and name == (self.first or name)
        self.alike, self.first = self.alike + 1 if fails else -1, name
        if self.alike >= _ALIKE:
            raise DeviceError(
                f"the first {_ALIKE} candidates {describe(outcome)}; that looks like the machine's fault, not theirs: "
                "the same command tries them again"
            )
        return outcome

    def _beside(self, config: Config) -> dict[str, Any]:
        """What workers take for a candidate, with what it is timed beside: on a CPU, where others may be at work."""
        found = self.study.candidate(config)
        beside = self.first_timed.get(_length(config)) if self.study.request.target.on_cpu else None
        return found if beside is None or beside.config == config else found | {"beside": beside.to_dict()}


def _length(config: Config) -> int | None:
    return config.integer(SEGMENT_LENGTH) if SEGMENT_LENGTH in config else None
