"""The study: candidates are proposed, evaluated and recorded in an Optuna storage.

Parameters are stored as their values, with static ranges (:mod:`mctune.study.record` says what else a trial holds).
Configurations that break the space's constraints never become trials. Several workers may share a study over a storage
that is a server's (:mod:`mctune.study.claim`); a file in SQLite has one at a time.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from mctune.core.config import Config
from mctune.core.errors import MctuneError, UsageError
from mctune.core.interrupt import Held, held
from mctune.core.outcome import Outcome
from mctune.core.remark import redacted
from mctune.core.space import SearchSpace
from mctune.study.claim import USUAL, Claims, Timing
from mctune.study.feasible import Point
from mctune.study.record import Look, Records, Trial, about, agree, best, finish, give_way, record, settle
from mctune.study.rules import Rule
from mctune.study.samplers import START, DiscreteSampler, sampler_of
from mctune.study.storage import ABOUT, BROKEN, ILLEGIBLE, alone, legible, opened, patiently, reason, shared

_FIRST = "mctune_first"
_Result = TypeVar("_Result")
_Asked = tuple[FrozenTrial, Config]
PATIENCE_S = 60.0
"""For others that read or copy the SQLite file that a search writes to, and for a server that is started again."""
_PAUSE_S = 1.0
"""Between two looks at what other workers are about, where there is nothing else to do."""


class CutShort(MctuneError):
    """A run ended by what is no candidate's fault: the storage, or the machine. ``trials`` are what it had by then."""

    def __init__(self, error: MctuneError, trials: Sequence[Trial]) -> None:
        super().__init__(str(error))
        self.exit_code, self.trials = error.exit_code, tuple(trials)


@dataclass(frozen=True)
class StudyResult:
    """Every evaluated candidate of the study, earlier runs' included, in order.

    ``stopped`` says why this run ended: ``trials`` (the total was reached), ``timeout``, ``exhausted`` (no valid
    configuration is left) or ``interrupted`` (Ctrl-C).
    """

    trials: tuple[Trial, ...]
    stopped: str

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return self.stopped == "interrupted"

    @property
    def best(self) -> Trial | None:
        """The fastest trial; the earlier one of equals."""
        return best(self.trials)


def run_study(
    space: SearchSpace,
    rules: Sequence[Rule] | Rule,
    evaluate: Callable[[Config], Outcome | None],
    *,
    trials: int,
    timeout: float | None = None,
    sampler: str = "chain",
    seed: int = 0,
    storage: str | None = None,
    study_name: str = "mctune",
    attrs: Mapping[str, Any] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    balance: str | None = None,
    start: int = START,
    first: Sequence[Config] = (),
    at_once: int = 1,
    guard: bool = True,
    timing: Timing = USUAL,
) -> StudyResult:
    """Search ``space``, or go on searching it.

    Called again with the same arguments after any interruption (``kill -9`` included), it loses no evaluated candidate,
    repeats none, and proposes what an uninterrupted run would have proposed.

    Over a server's storage (PostgreSQL, MySQL) any number of processes may call it for one study at the same time, on
    any number of machines: each candidate is evaluated by one of them, and each returns what all of them have found.
    Over a SQLite file there is one process at a time: whatever is found running at the start counts as cut off.

    Args:
        space: the parameters. Their names and values are part of what a study is about.
        rules: the constraints, each a function of a configuration (or just one); what meets all of them may be tried.
        evaluate: builds, verifies and times a configuration; failures are returned, not raised. ``None`` says that the
            time was over before it was done: the candidate counts as cut off, and the run ends.
        trials: evaluated candidates in all, those of earlier runs and of other workers included.
        timeout: seconds after which no further candidate is started in this run; ``None`` for no limit.
        sampler, seed, balance, start: see :func:`mctune.study.samplers.sampler_of`; they may change between runs.
        storage: an Optuna storage URL such as ``sqlite:///search.db``; ``None`` keeps the study in memory.
        study_name: name of the study in its storage.
        attrs: what the study is about (problem, target, versions), JSON-able; must be equal on every resumption.
        on_trial: called after each candidate has been recorded, by whichever worker.
        first: what is tried right after the space's defaults, as far as it is valid. A study keeps those that it was
            begun with: on a resumption they are read from it.
        at_once: candidates that are proposed together and evaluated side by side, in threads; only for evaluations
            that do not disturb each other. The second is proposed as if the first were of middling speed.
        guard: whether to keep other processes from a SQLite file meanwhile; without it the caller does.
        timing: how soon a worker that is gone is noticed, where several share the study.

    Raises:
        UsageError: if the storage cannot be opened, is searched by another process, or holds under this name a study
            about something else.
        CutShort: if it cannot be written any more (a full disk, a lock that another program keeps), or ``evaluate``
            raised an :class:`~mctune.core.errors.MctuneError`. What was found until then is in it.
    """
    if trials < 1:
        raise UsageError(f"trials={trials}: at least one candidate must be evaluated")
    rules = (rules,) if callable(rules) else rules
    chooser = sampler_of(sampler, space, rules, seed=seed, balance=balance, retry_failed=True, start=start)
    with held() as ctrl_c, alone(storage if guard else None):
        with _failing(storage), legible(storage):
            study = _open(storage, study_name, chooser, about(space, attrs or {}), first)
        claims = Claims(study, secrets.token_hex(4), timing, shared(storage))
        run = _Run(evaluate, study, chooser, on_trial, ctrl_c, storage, claims, Records(study))
        try:
            with _failing(storage):
                stopped = run.until(trials, timeout, at_once)
        except MctuneError as error:
            raise CutShort(error, run.in_order()) from error
        return StudyResult(run.in_order(), stopped)


@dataclass
class _Run:
    """One run of a study. Ctrl-C comes while candidates are proposed or evaluated, and never into the storage."""

    evaluate: Callable[[Config], Outcome | None]
    study: optuna.Study
    sampler: DiscreteSampler
    on_trial: Callable[[Trial], None] | None
    ctrl_c: Held
    storage: str | None
    claims: Claims
    records: Records
    found: dict[int, Trial] = field(default_factory=dict)
    doubted: frozenset[int] = frozenset()

    def in_order(self) -> tuple[Trial, ...]:
        """What was found, by number."""
        return tuple(self.found[number] for number in sorted(self.found))

    def until(self, trials: int, timeout: float | None, at_once: int) -> str:
        """Evaluate until there are so many trials; why it ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with self.claims:
                try:
                    self.begin()
                    stopped = self.rounds(trials, deadline, at_once)
                    self.ctrl_c.check()
                except (KeyboardInterrupt, MctuneError):
                    with suppress(*BROKEN, *ILLEGIBLE):  # or whoever looks next does it
                        settle(self.study, self.claims.all_mine(self.records.look()))
                    raise
        except KeyboardInterrupt:
            return "interrupted"
        return stopped

    def begin(self) -> None:
        """Take up what earlier runs have left, and what other workers have done so far."""
        look = self.patiently(self.read)
        if not self.claims.shared:
            self.patiently(lambda: settle(self.study, look.running))
            look = self.patiently(self.read)
        self.doubt(self.records.doubtful(self.claims.over(look)))
        self.found.update((n, trial) for n, (trial, _) in self.records.evaluated.items() if n not in self.doubted)

    def doubt(self, numbers: frozenset[int]) -> None:
        """Take no notice of the trials of these numbers, and of all others."""
        if numbers != self.doubted:
            for number in numbers:
                self.found.pop(number, None)
            self.found.update((number, self.records.evaluated[number][0]) for number in self.doubted - numbers)
            self.doubted = numbers
            self.sampler.disregard(numbers)

    def rounds(self, trials: int, deadline: float | None, at_once: int) -> str:
        """Rounds of up to ``at_once`` candidates until there are so many trials; why they ended."""
        while len(self.found) < trials:
            if deadline is not None and time.monotonic() >= deadline:
                return "timeout"
            asked: list[_Asked] = []
            alone = not (self.claims.shared and self.look().running)
            while len(asked) < at_once and (claimed := self.ask(trials)) is not None:
                asked.append(claimed)
            if asked:
                if self.round(asked) < len(asked):
                    return "timeout"
            elif len(self.found) < trials:
                # Without others at work before and after, there was no other reason why nothing could be claimed.
                if alone and not self.look().running and len(self.found) < trials:
                    return "exhausted"
                with self.ctrl_c.let_in():  # others evaluate what is left; should they die, it comes free again
                    time.sleep(min(_PAUSE_S, self.claims.timing.beat_s / 5))
        return "trials"

    def round(self, asked: Sequence[_Asked]) -> int:
        """Evaluate these side by side; how many were done before the time was over."""
        outcomes_ = _all(self.evaluate, [config for _, config in asked])
        done = 0
        for running, config in asked:
            with self.ctrl_c.let_in():
                outcome, seconds = next(outcomes_)
            if outcome is None:
                self.patiently(partial(finish, self.study, running, None))
            else:
                done += 1
                trial = Trial(running.number, config, outcome, seconds)
                if self.patiently(partial(record, self.study, self.sampler, running, trial)):
                    self.count(trial)
            self.claims.leave(running._trial_id)
        return done

    def count(self, trial: Trial) -> None:
        """Count a candidate, whoever has evaluated it."""
        if trial.number not in self.found and trial.number not in self.doubted:
            self.found[trial.number] = trial
            if self.on_trial is not None:
                with self.ctrl_c.let_in():
                    self.on_trial(trial)

    def ask(self, trials: int) -> _Asked | None:
        """A trial in the storage that this run alone evaluates; ``None`` if there is no point for one, or enough run.

        One that turns out to be the second about its point, or one too many, gives way.
        """
        while True:
            before = self.look()
            if len(self.found) + len(before.running) >= trials:
                return None
            others = any(not self.claims.is_mine(trial) for trial in before.running)
            with legible(self.storage):
                history = self.sampler.history(self.study, trials=before.trials)
            with self.ctrl_c.let_in():  # it may think for seconds, and keeps what it proposed
                point = self.sampler.propose(history, int(self.claims.run, 16) if others else 0)
            if point is None:
                return None
            number = self.patiently(partial(self.create, before, point))
            after = self.look()
            claimed = next(trial for trial in reversed(after.trials) if trial._trial_id == number)
            self.sampler.begun(self.study, claimed.number, point)
            if self.second(claimed, before, after) or self.too_many(claimed, after, trials):
                self.patiently(partial(give_way, self.study, claimed))
            elif claimed.state == TrialState.RUNNING:
                return claimed, self.sampler.space.at(point)
            self.claims.leave(number)

    def create(self, before: Look, point: Point) -> int:
        """Claim a point: the id of a running trial that has it."""
        attrs = {"config": self.sampler.space.at(point).to_json(), **self.claims.attrs()}
        template = self.sampler.trial(self.study, before.trials, point, attrs)
        number = self.study._storage.create_new_trial(self.study._study_id, template)
        self.claims.take(number)
        return number

    def second(self, claimed: FrozenTrial, before: Look, after: Look) -> bool:
        """Whether somebody has claimed the same point, first, since it was proposed."""
        since = after.trials[len(before.trials) : claimed.number]
        return any(trial.params == claimed.params and trial.state != TrialState.FAIL for trial in since)

    def too_many(self, claimed: FrozenTrial, after: Look, trials: int) -> bool:
        """Whether there are as many trials as there are to be without this one."""
        numbers = (*self.found, *(trial.number for trial in after.running))
        return len(numbers) > trials and sum(number < claimed.number for number in numbers) >= trials

    def look(self) -> Look:
        """The study as it is now: what others have finished is counted, what they have abandoned has ended."""
        while True:
            look = self.patiently(self.read)
            for trial in look.news:
                self.count(trial)
            left = self.claims.abandoned(look)
            if not left:
                break
            self.patiently(partial(settle, self.study, left))
        if self.claims.shared:
            self.doubt(self.records.doubtful(self.claims.over(look)))
        return look

    def read(self) -> Look:
        """The study, read; while it cannot be, others cannot show that they are alive."""
        try:
            look = self.records.look()
        except BROKEN:
            self.claims.shaken()
            raise
        self.claims.note(look)
        return look

    def patiently(self, do: Callable[[], _Result]) -> _Result:
        """See :func:`mctune.study.storage.patiently`, and :func:`mctune.study.storage.legible`."""
        with legible(self.storage):
            return patiently(do, self.ctrl_c, PATIENCE_S)


@contextmanager
def _failing(storage: str | None) -> Iterator[None]:
    """Turn a storage that can no longer be used into an error of one line."""
    try:
        yield
    except BROKEN as error:
        raise MctuneError(
            f"the study in {redacted(str(storage))} cannot be written: {reason(error)}; what was recorded before is "
            "there: see that its disk has room and no other program holds it, then search again"
        ) from error


def load_study(storage: str, study_name: str = "mctune") -> tuple[dict[str, Any], tuple[Trial, ...]]:
    """What a stored study is about (the ``attrs`` it was run with) and its evaluated candidates.

    Raises:
        UsageError: if there is no such study.
    """
    with held(), _failing(storage), legible(storage):
        try:
            study = optuna.load_study(study_name=study_name, storage=opened(storage, PATIENCE_S))
        except KeyError:
            raise UsageError(f"{redacted(storage)} holds no study {study_name!r}; run mctune search first") from None
        what: dict[str, Any] = study.user_attrs.get(ABOUT, {})
        records = Records(study)
        records.look()
        doubtful = records.doubtful()
        trials = (records.evaluated[number][0] for number in sorted(records.evaluated) if number not in doubtful)
        return dict(what.get("attrs", {})), tuple(trials)


def _open(
    storage: str | None, name: str, sampler: DiscreteSampler, what: dict[str, Any], first: Sequence[Config]
) -> optuna.Study:
    """Create the study or find it, and refuse one that is about something else.

    Of several workers that begin at once, one creates the study, and that one says what it is about.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the caller reports progress, through on_trial
    place = opened(storage, PATIENCE_S)
    try:
        study = optuna.create_study(storage=place, study_name=name, sampler=sampler, direction="minimize")
        study.set_user_attr(_FIRST, [config.to_dict() for config in first])
        study.set_user_attr(ABOUT, what)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=place, study_name=name, sampler=sampler)
        agree(study, storage, name, what)
    sampler.begin_with([Config.of(values) for values in study.user_attrs.get(_FIRST, ())])
    return study


def _all(
    evaluate: Callable[[Config], Outcome | None], configs: Sequence[Config]
) -> Iterator[tuple[Outcome | None, float]]:
    """The outcome of each, and the seconds that it took; side by side if there are several."""

    def timed(config: Config) -> tuple[Outcome | None, float]:
        started = time.monotonic()
        return evaluate(config), time.monotonic() - started

    if len(configs) == 1:
        yield timed(configs[0])
        return
    pool = ThreadPoolExecutor(len(configs))
    try:
        yield from pool.map(timed, configs)
    finally:
        # After Ctrl-C, do not wait for the others.
        pool.shutdown(wait=False, cancel_futures=True)
