"""The study: candidates are proposed, evaluated and recorded in an Optuna storage.

Parameters are stored as integer indices with static ranges. A candidate that fails in any way is a COMPLETE trial with
the constraint ``failed`` above zero and an infinite value, never a FAIL one; FAIL marks only a candidate whose
evaluation was cut off, which is not counted and may be tried again. Configurations that break the space's constraints
never become trials.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from mctune.core import outcome as outcomes
from mctune.core.config import Config
from mctune.core.errors import MctuneError, UsageError
from mctune.core.interrupt import Held, held
from mctune.core.outcome import Crashed, FailedBuild, Outcome, TimedOut
from mctune.core.remark import redacted
from mctune.core.space import SearchSpace
from mctune.study.rules import Rule
from mctune.study.samplers import START, DiscreteSampler, sampler_of
from mctune.study.samplers.discrete import AT_FAULT, PARTS
from mctune.study.storage import ABOUT, BROKEN, ILLEGIBLE, alone, legible, opened, patiently, reason

_FIRST = "mctune_first"
_UNPROVEN = (FailedBuild, Crashed, TimedOut)
"""What a machine may do to any candidate."""
_Result = TypeVar("_Result")
PATIENCE_S = 60.0
"""For others that read or copy the SQLite file that a search writes to, and for a server that is started again."""


@dataclass(frozen=True)
class Trial:
    """One evaluated candidate; ``number`` is Optuna's, ``seconds`` what evaluating it took."""

    number: int
    config: Config
    outcome: Outcome
    seconds: float

    @property
    def ms(self) -> float | None:
        """Milliseconds, or ``None`` if the candidate cannot win."""
        return outcomes.cost(self.outcome)


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


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest of ``trials`` (the earlier one of equals), ``None`` if none has a time."""
    timed = [(trial.ms, trial.number, trial) for trial in trials if trial.ms is not None]
    return min(timed)[2] if timed else None


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
) -> StudyResult:
    """Search ``space``, or go on searching it.

    Called again with the same arguments after any interruption (``kill -9`` included), it loses no evaluated candidate,
    repeats none, and proposes what an uninterrupted run would have proposed. One process at a time may search a study:
    whatever is found running at the start counts as cut off.

    Args:
        space: the parameters. Their names and values are part of what a study is about.
        rules: the constraints, each a function of a configuration (or just one); what meets all of them may be tried.
        evaluate: builds, verifies and times a configuration; failures are returned, not raised. ``None`` says that the
            time was over before it was done: the candidate counts as cut off, and the run ends.
        trials: evaluated candidates in all, those of earlier runs included.
        timeout: seconds after which no further candidate is started in this run; ``None`` for no limit.
        sampler, seed, balance, start: see :func:`mctune.study.samplers.sampler_of`; they may change between runs.
        storage: an Optuna storage URL such as ``sqlite:///search.db``; ``None`` keeps the study in memory.
        study_name: name of the study in its storage.
        attrs: what the study is about (problem, target, versions), JSON-able; must be equal on every resumption.
        on_trial: called after each candidate has been recorded.
        first: what is tried right after the space's defaults, as far as it is valid. A study keeps those that it was
            begun with: on a resumption they are read from it.
        at_once: candidates that are proposed together and evaluated side by side, in threads; only for evaluations
            that do not disturb each other. The second is proposed as if the first were of middling speed.
        guard: whether to keep other processes from a SQLite file meanwhile; without it the caller does.

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
            study = _open(storage, study_name, chooser, _about(space, attrs or {}), first)
        run = _Run(space, evaluate, study, chooser, on_trial, ctrl_c, storage)
        try:
            with _failing(storage):
                stopped = run.until(trials, timeout, at_once)
        except MctuneError as error:
            raise CutShort(error, run.found) from error
        return StudyResult(tuple(run.found), stopped)


@dataclass(frozen=True)
class _Run:
    """One run of a study. Ctrl-C comes while candidates are proposed or evaluated, and never into the storage."""

    space: SearchSpace
    evaluate: Callable[[Config], Outcome | None]
    study: optuna.Study
    sampler: DiscreteSampler
    on_trial: Callable[[Trial], None] | None
    ctrl_c: Held
    storage: str | None
    found: list[Trial] = field(default_factory=list)
    name: str = field(default_factory=lambda: secrets.token_hex(4))

    def until(self, trials: int, timeout: float | None, at_once: int) -> str:
        """Evaluate until there are so many trials; why it ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with legible(self.storage):
                self.begin()
            stopped = self.rounds(trials, deadline, at_once)
            self.ctrl_c.check()
        except KeyboardInterrupt:
            with suppress(*BROKEN, *ILLEGIBLE):  # the next run does it
                _settle(self.study)
            return "interrupted"
        except MctuneError:
            with suppress(*BROKEN, *ILLEGIBLE):
                _settle(self.study)
            raise
        return stopped

    def begin(self) -> None:
        """Take up what earlier runs have left."""
        self.patiently(lambda: _settle(self.study))
        all_ = self.patiently(lambda: _recorded(self.study))
        doubtful = _doubtful(all_)
        self.sampler.disregard(doubtful)
        self.found[:] = [trial for trial, _ in all_ if trial.number not in doubtful]

    def rounds(self, trials: int, deadline: float | None, at_once: int) -> str:
        """Rounds of up to ``at_once`` candidates until there are so many trials; why they ended."""
        while len(self.found) < trials:
            if deadline is not None and time.monotonic() >= deadline:
                return "timeout"
            asked: list[tuple[optuna.Trial, Config]] = []
            while len(asked) < min(at_once, trials - len(self.found)) and (trial := self.ask()) is not None:
                asked.append(trial)
            if not asked:
                return "exhausted"
            if self.round(asked) < len(asked):
                return "timeout"
        return "trials"

    def round(self, asked: Sequence[tuple[optuna.Trial, Config]]) -> int:
        """Evaluate these side by side; how many were done before the time was over."""
        outcomes_ = _all(self.evaluate, [config for _, config in asked])
        done = 0
        for trial_, config in asked:
            with self.ctrl_c.let_in():
                outcome, seconds = next(outcomes_)
            if outcome is None:
                self.patiently(lambda: _tell(self.study, trial_.number, None))  # noqa: B023
                continue
            trial = Trial(trial_.number, config, outcome, seconds)
            self.patiently(lambda: self.record(trial_, trial))  # noqa: B023
            self.found.append(trial)
            done += 1
            if self.on_trial is not None:
                with self.ctrl_c.let_in():
                    self.on_trial(trial)
        return done

    def ask(self) -> tuple[optuna.Trial, Config] | None:
        """A trial in the storage, running, and its configuration; ``None`` if none is left."""
        history = self.patiently(lambda: self.sampler.history(self.study))
        with self.ctrl_c.let_in():  # it may think for seconds, and keeps what it proposed
            point = self.sampler.propose(history)
        if point is None:
            return None
        return self.patiently(self.begun)

    def begun(self) -> tuple[optuna.Trial, Config]:
        """The next trial, in the storage."""
        asked = self.study.ask()
        config = self.sampler.suggest(asked)
        asked.set_user_attr("config", config.to_json())
        return asked, config

    def record(self, asked: optuna.Trial, trial: Trial) -> None:
        """Record one candidate. The outcome is written last but one: :func:`_settle` finishes the rest."""
        with suppress(UpdateFinishedTrialError):  # somebody else has told it
            asked.set_user_attr("seconds", trial.seconds)
            asked.set_user_attr("run", self.name)
            if parts := outcomes.parts(trial.outcome):
                asked.set_user_attr(PARTS, parts)
            if at_fault := outcomes.at_fault(trial.outcome):
                asked.set_user_attr(AT_FAULT, at_fault)
            asked.set_constraint("failed", 1.0 if trial.ms is None else 0.0)
            asked.set_user_attr("outcome", outcomes.to_json(trial.outcome))
        _tell(self.study, asked.number, trial.outcome)

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
        about: dict[str, Any] = study.user_attrs.get(ABOUT, {})
        recorded = _recorded(study)
        doubtful = _doubtful(recorded)
        return dict(about.get("attrs", {})), tuple(trial for trial, _ in recorded if trial.number not in doubtful)


def _about(space: SearchSpace, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """A study's description, as it reads back from JSON."""
    about = {"attrs": dict(attrs), "space": {param.name: list(param.values) for param in space.params}}
    plain: dict[str, Any] = json.loads(json.dumps(about, sort_keys=True))
    return plain


def _open(
    storage: str | None, name: str, sampler: DiscreteSampler, about: dict[str, Any], first: Sequence[Config]
) -> optuna.Study:
    """Create the study or find it, and refuse one that is about something else. Its sampler begins as it began."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the caller reports progress, through on_trial
    study = optuna.create_study(
        storage=opened(storage, PATIENCE_S), study_name=name, sampler=sampler, direction="minimize", load_if_exists=True
    )
    found = study.user_attrs.get(ABOUT)
    if found is None and not study.get_trials(deepcopy=False):
        study.set_user_attr(_FIRST, [config.to_dict() for config in first])
        study.set_user_attr(ABOUT, about)
    elif found != about:
        raise UsageError(
            f"the study {name!r} in {redacted(str(storage))} is about something else "
            f"({_difference(found or {}, about)}); a study never mixes problems, targets or spaces: give another study "
            "name, storage or output directory"
        )
    sampler.begin_with([Config.of(values) for values in study.user_attrs.get(_FIRST, ())])
    return study


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first thing in which two descriptions differ, for a person."""
    if not found:
        return "mctune did not make it"
    for part in ("attrs", "space"):
        old, new = found.get(part, {}), wanted[part]
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                return f"{name} is {json.dumps(old.get(name))} there and {json.dumps(new.get(name))} here"
    return "what it says of itself cannot be read"


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


def _tell(study: optuna.Study, number: int, outcome: Outcome | None) -> None:
    """Finish a trial, as FAIL without an outcome; told twice, or by somebody else, it stays as it is."""
    ms = None if outcome is None else outcomes.cost(outcome)
    try:
        if outcome is None:
            study.tell(number, state=TrialState.FAIL)
        else:
            study.tell(number, math.inf if ms is None else ms)
    except (UpdateFinishedTrialError, ValueError):
        if not study.get_trials(deepcopy=False)[number].state.is_finished():
            raise


def _settle(study: optuna.Study) -> None:
    """Finish the trials that were cut off after their outcome was written; mark the others FAIL."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        text = trial.user_attrs.get("outcome")
        _tell(study, trial.number, None if text is None else outcomes.from_json(text))


def _recorded(study: optuna.Study) -> list[tuple[Trial, str]]:
    """The evaluated candidates, and the runs that evaluated them; what others put into a study is not ours."""
    found = (_trial(one) for one in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    return [trial for trial in found if trial is not None]


def _trial(found: FrozenTrial) -> tuple[Trial, str] | None:
    attrs = found.user_attrs
    try:
        config, outcome = Config.from_json(attrs["config"]), outcomes.from_json(attrs["outcome"])
        return Trial(found.number, config, outcome, attrs["seconds"]), attrs.get("run", "")
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def _doubtful(recorded: Sequence[tuple[Trial, str]]) -> frozenset[int]:
    """Trials whose failures say nothing: of a run in which nothing was built and run, whatever was tried, or of one
    that did not look whether anything could be. Who fails in a second such run has failed."""
    proven = {run for trial, run in recorded if run and not isinstance(trial.outcome, _UNPROVEN)}
    doubted: dict[Config, str] = {}
    doubtful = set()
    for trial, run in recorded:
        if isinstance(trial.outcome, _UNPROVEN) and run not in proven and doubted.get(trial.config, run) == run:
            doubted[trial.config] = run
            doubtful.add(trial.number)
    return frozenset(doubtful)
