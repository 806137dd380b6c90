"""The study: candidates are proposed, evaluated and recorded in an Optuna storage.

Parameters are stored as integer indices with static ranges. A candidate that fails in any way is a COMPLETE trial with
the constraint ``failed`` above zero and an infinite value, never a FAIL one; FAIL marks only a candidate whose
evaluation was cut off, which is not counted and may be tried again. Configurations that break the space's constraints
never become trials.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from mctune.core import outcome as outcomes
from mctune.core.config import Config
from mctune.core.errors import MctuneError, UsageError
from mctune.core.interrupt import Held, held
from mctune.core.outcome import Outcome
from mctune.core.space import SearchSpace
from mctune.study.rules import Rule
from mctune.study.samplers import START, DiscreteSampler, sampler_of

_ATTRS = "mctune"
PATIENCE_S = 60.0
"""For others that read or copy the SQLite file that a search writes to; the five that SQLite waits are soon over."""


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
    rules: Sequence[Rule],
    evaluate: Callable[[Config], Outcome | None],
    *,
    trials: int,
    timeout: float | None = None,
    sampler: str = "mix",
    seed: int = 0,
    storage: str | None = None,
    study_name: str = "mctune",
    attrs: Mapping[str, Any] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    balance: str | None = None,
    start: int = START,
    at_once: int = 1,
) -> StudyResult:
    """Search ``space``, or go on searching it.

    Called again with the same arguments after any interruption (``kill -9`` included), it loses no evaluated candidate,
    repeats none, and proposes what an uninterrupted run would have proposed. One process at a time may search a study:
    whatever is found running at the start counts as cut off.

    Args:
        space: the parameters. Their names and values are part of what a study is about.
        rules: the constraints, each a function of a configuration; what meets all of them may be tried.
        evaluate: builds, verifies and times a configuration; failures are returned, not raised. ``None`` says that the
            time was over before it was done: the candidate counts as cut off, and the run ends.
        trials: evaluated candidates in all, those of earlier runs included.
        timeout: seconds after which no further candidate is started in this run; ``None`` for no limit.
        sampler, seed, balance, start: see :func:`mctune.study.samplers.sampler_of`; they may change between runs.
        storage: an Optuna storage URL such as ``sqlite:///search.db``; ``None`` keeps the study in memory.
        study_name: name of the study in its storage.
        attrs: what the study is about (problem, target, versions), JSON-able; must be equal on every resumption.
        on_trial: called after each candidate has been recorded.
        at_once: candidates that are proposed together and evaluated side by side, in threads; only for evaluations
            that do not disturb each other. The second is proposed as if the first were of middling speed.

    Raises:
        UsageError: if the storage cannot be opened, or holds under this name a study about something else.
        MctuneError: if it cannot be written any more (a full disk, a lock that another program keeps).
    """
    if trials < 1:
        raise UsageError(f"trials={trials}: at least one candidate must be evaluated")
    chooser = sampler_of(sampler, space, rules, seed=seed, balance=balance, retry_failed=True, start=start)
    with held() as ctrl_c, _writing(storage):
        study = _open(storage, study_name, chooser, _about(space, attrs or {}))
        run = _Run(space, evaluate, study, chooser, on_trial, ctrl_c)
        stopped = run.until(trials, timeout, at_once)
        return StudyResult(tuple(_evaluated(run.study)), stopped)


@dataclass(frozen=True)
class _Run:
    """One run of a study. Ctrl-C comes while candidates are proposed or evaluated, and never into the storage."""

    space: SearchSpace
    evaluate: Callable[[Config], Outcome | None]
    study: optuna.Study
    sampler: DiscreteSampler
    on_trial: Callable[[Trial], None] | None
    ctrl_c: Held

    def until(self, trials: int, timeout: float | None, at_once: int) -> str:
        """Evaluate until there are so many trials; why it ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            stopped = self.rounds(trials, deadline, at_once)
            self.ctrl_c.check()
        except KeyboardInterrupt:
            _settle(self.study)
            return "interrupted"
        return stopped

    def rounds(self, trials: int, deadline: float | None, at_once: int) -> str:
        """Rounds of up to ``at_once`` candidates until there are so many trials; why they ended."""
        _settle(self.study)
        count = len(_evaluated(self.study))
        while count < trials:
            if deadline is not None and time.monotonic() >= deadline:
                return "timeout"
            asked: list[tuple[optuna.Trial, Config]] = []
            while len(asked) < min(at_once, trials - count) and (trial := self.ask()) is not None:
                asked.append(trial)
            if not asked:
                return "exhausted"
            done = self.round(asked)
            count += done
            if done < len(asked):
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
                self.study.tell(trial_.number, state=TrialState.FAIL)
                continue
            trial = _record(trial_, self.study, config, outcome, seconds)
            done += 1
            if self.on_trial is not None:
                with self.ctrl_c.let_in():
                    self.on_trial(trial)
        return done

    def ask(self) -> tuple[optuna.Trial, Config] | None:
        """A trial in the storage, running, and its configuration; ``None`` if none is left."""
        history = self.sampler.history(self.study)
        with self.ctrl_c.let_in():  # it may think for seconds, and keeps what it proposed
            point = self.sampler.propose(history)
        if point is None:
            return None
        asked = self.study.ask()
        config = self.sampler.suggest(asked)
        asked.set_user_attr("config", config.to_json())
        return asked, config


@contextmanager
def _writing(storage: str | None) -> Iterator[None]:
    """Turn a storage that can no longer be written into an error of one line."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        reasons = str(error.__cause__ or error).splitlines()
        raise MctuneError(
            f"the study in {storage} cannot be written: {reasons[0] if reasons else type(error).__name__}; what was "
            "recorded before is there: see that its disk has room and no other program holds it, then search again"
        ) from error


def load_study(storage: str, study_name: str = "mctune") -> tuple[dict[str, Any], tuple[Trial, ...]]:
    """What a stored study is about (the ``attrs`` it was run with) and its evaluated candidates.

    Raises:
        UsageError: if there is no such study.
    """
    with held():
        try:
            study = optuna.load_study(study_name=study_name, storage=_storage(storage))
        except KeyError:
            raise UsageError(f"{storage} holds no study {study_name!r}; run mctune search first") from None
        about: dict[str, Any] = study.user_attrs.get(_ATTRS, {})
        return dict(about.get("attrs", {})), tuple(_evaluated(study))


def _about(space: SearchSpace, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """A study's description, as it reads back from JSON."""
    about = {"attrs": dict(attrs), "space": {param.name: list(param.values) for param in space.params}}
    plain: dict[str, Any] = json.loads(json.dumps(about, sort_keys=True))
    return plain


def _storage(url: str | None) -> optuna.storages.BaseStorage:
    try:
        if url is None or not url.startswith("sqlite"):
            return optuna.storages.get_storage(url)
        waiting = {"connect_args": {"timeout": PATIENCE_S}}
        return optuna.storages.get_storage(optuna.storages.RDBStorage(url, engine_kwargs=waiting))
    except (SQLAlchemyError, ImportError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"cannot open the storage {url}: {reason}; give an Optuna URL such as sqlite:///search.db, and install the "
            "driver that it needs"
        ) from error


def _open(storage: str | None, name: str, sampler: DiscreteSampler, about: dict[str, Any]) -> optuna.Study:
    """Create the study or find it, and refuse one that is about something else."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the caller reports progress, through on_trial
    study = optuna.create_study(
        storage=_storage(storage), study_name=name, sampler=sampler, direction="minimize", load_if_exists=True
    )
    found = study.user_attrs.get(_ATTRS)
    if found is None and not study.get_trials(deepcopy=False):
        study.set_user_attr(_ATTRS, about)
    elif found != about:
        raise UsageError(
            f"the study {name!r} in {storage} is about something else ({_difference(found or {}, about)}); a study "
            "never mixes problems, targets or spaces: give another study name, storage or output directory"
        )
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


def _record(asked: optuna.Trial, study: optuna.Study, config: Config, outcome: Outcome, seconds: float) -> Trial:
    """Record one candidate. The outcome is written last but one: :func:`_settle` finishes the rest."""
    asked.set_user_attr("seconds", seconds)
    asked.set_constraint("failed", 1.0 if outcomes.cost(outcome) is None else 0.0)
    asked.set_user_attr("outcome", outcomes.to_json(outcome))
    study.tell(asked.number, _value(outcome))
    return Trial(asked.number, config, outcome, seconds)


def _value(outcome: Outcome) -> float:
    ms = outcomes.cost(outcome)
    return math.inf if ms is None else ms


def _settle(study: optuna.Study) -> None:
    """Finish the trials that were cut off after their outcome was written; mark the others FAIL."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        text = trial.user_attrs.get("outcome")
        if text is None:
            study.tell(trial.number, state=TrialState.FAIL)
        else:
            study.tell(trial.number, _value(outcomes.from_json(text)))


def _evaluated(study: optuna.Study) -> list[Trial]:
    return [
        Trial(
            found.number,
            Config.from_json(found.user_attrs["config"]),
            outcomes.from_json(found.user_attrs["outcome"]),
            found.user_attrs["seconds"],
        )
        for found in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]
