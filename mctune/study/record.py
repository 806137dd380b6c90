"""What an evaluated candidate looks like in an Optuna study, and back.

A candidate that fails in any way is a COMPLETE trial with the constraint ``failed`` above zero and an infinite value,
never a FAIL one; FAIL marks only a candidate whose evaluation was cut off, which is not counted and may be tried again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from mctune.core import outcome as outcomes
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Crashed, FailedBuild, Outcome, TimedOut
from mctune.core.remark import redacted
from mctune.core.space import SearchSpace
from mctune.study.samplers import DiscreteSampler
from mctune.study.samplers.reading import AT_FAULT, FAILED, GAVE_WAY, PARTS
from mctune.study.storage import ABOUT, shared

_DESCRIBED_S = 10.0
"""How long who creates a study may take to say what it is about."""
_UNPROVEN = (FailedBuild, Crashed, TimedOut)
"""What a machine may do to any candidate."""


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


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest of ``trials`` (the earlier one of equals), ``None`` if none has a time."""
    timed = [(trial.ms, trial.number, trial) for trial in trials if trial.ms is not None]
    return min(timed)[2] if timed else None


@dataclass(frozen=True)
class Look:
    """A study at one moment.

    Args:
        at: that moment, or a little before, by the clock that never goes back.
        trials: all of its trials, by number; ``since`` are those that were not there, or not finished, the last time.
        news: candidates that were evaluated since.
    """

    at: float
    trials: Sequence[FrozenTrial]
    since: Sequence[FrozenTrial]
    news: Sequence[Trial]

    @property
    def running(self) -> list[FrozenTrial]:
        """Trials that somebody evaluates, or has abandoned."""
        return [trial for trial in self.since if trial.state == TrialState.RUNNING]


@dataclass
class Records:
    """The evaluated candidates of a study, each read once, with the runs that evaluated them.

    What others have put into the study is not among them.
    """

    study: optuna.Study
    evaluated: dict[int, tuple[Trial, str]] = field(default_factory=dict)
    _proven: set[str] = field(default_factory=set)
    _failing: set[str] = field(default_factory=set)
    _configs: set[Config] = field(default_factory=set)
    _finished: int = 0  # leading trials that never change any more

    def look(self) -> Look:
        """The study as it is now."""
        at = time.monotonic()
        trials = self.study.get_trials(deepcopy=False)
        since, news = trials[self._finished :], []
        for trial in since:
            if trial.number not in self.evaluated and (found := evaluated(trial)) is not None:
                self.evaluated[trial.number] = found
                news.append(found[0])
                self._configs.add(found[0].config)
                proves = found[1] and not isinstance(found[0].outcome, _UNPROVEN)
                (self._proven if proves else self._failing).add(found[1])
        for trial in since:
            if not trial.state.is_finished():
                break
            self._finished += 1
        return Look(at, trials, since, news)

    def doubtful(self, over: Callable[[str], bool] = lambda run: True) -> frozenset[int]:
        """See :func:`doubtful`; at no cost where every run has built something."""
        if not self._failing - self._proven and len(self._configs) == len(self.evaluated):
            return frozenset()
        return doubtful([self.evaluated[number] for number in sorted(self.evaluated)], over)


def evaluated(found: FrozenTrial) -> tuple[Trial, str] | None:
    """The candidate that a trial is about, and the run that evaluated it; ``None`` if it was not, or is not ours."""
    if found.state != TrialState.COMPLETE:
        return None
    attrs = found.user_attrs
    try:
        config, outcome = Config.from_json(attrs["config"]), outcomes.from_json(attrs["outcome"])
        return Trial(found.number, config, outcome, attrs["seconds"]), attrs.get("run", "")
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def doubtful(recorded: Sequence[tuple[Trial, str]], over: Callable[[str], bool] = lambda run: True) -> frozenset[int]:
    """Trials whose failures say nothing: of a run in which nothing was built and run, whatever was tried, or of one
    that did not look whether anything could be. Who fails in a second such run has failed.

    ``over`` says of a run whether it has ended: one that goes on may still build something. Where one that seemed to
    have ended goes on after all, what was tried again meanwhile counts once.
    """
    last = {trial.config: trial.number for trial, _ in recorded}
    proven = {run for trial, run in recorded if run and not isinstance(trial.outcome, _UNPROVEN)}
    doubted: dict[Config, str] = {}
    numbers = set()
    for trial, run in recorded:
        if isinstance(trial.outcome, _UNPROVEN) and last[trial.config] != trial.number:
            numbers.add(trial.number)
            doubted.setdefault(trial.config, run)
        elif isinstance(trial.outcome, _UNPROVEN) and run not in proven and doubted.get(trial.config, run) == run:
            if run and not over(run):
                continue
            doubted[trial.config] = run
            numbers.add(trial.number)
    return frozenset(numbers)


def settle(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Finish running trials that were cut off after their outcome was written; mark the others FAIL."""
    for trial in trials:
        text = trial.user_attrs.get("outcome")
        finish(study, trial, None if text is None else outcomes.from_json(text))


def record(study: optuna.Study, sampler: DiscreteSampler, running: FrozenTrial, trial: Trial) -> bool:
    """Record a candidate, and say whether that is what stands: another may have told its trial meanwhile.

    The outcome is written last but one: :func:`settle` does the rest where this is cut off. Each write is a
    transaction of some milliseconds, so what is so of most trials is said when they begin.
    """
    storage, number = study._storage, running._trial_id
    ms = trial.ms
    sampler.told(study, running, TrialState.COMPLETE, [math.inf if ms is None else ms])
    # In the form that Optuna gives a constraint; a trial is begun with one that is met.
    attrs = create_trial(value=0.0, constraints={FAILED: 1.0}).system_attrs if ms is None else {}
    try:
        storage.set_trial_user_attr(number, "seconds", trial.seconds)
        if parts := outcomes.parts(trial.outcome):
            storage.set_trial_user_attr(number, PARTS, parts)
        if at_fault := outcomes.at_fault(trial.outcome):
            storage.set_trial_user_attr(number, AT_FAULT, at_fault)
        for key, value in attrs.items():
            storage.set_trial_system_attr(number, key, value)
        storage.set_trial_user_attr(number, "outcome", outcomes.to_json(trial.outcome))
    except UpdateFinishedTrialError:
        return storage.get_trial(number).state == TrialState.COMPLETE
    return finish(study, running, trial.outcome)


def give_way(study: optuna.Study, running: FrozenTrial) -> None:
    """End a trial whose point another one has, or that is one too many."""
    with suppress(UpdateFinishedTrialError):
        study._storage.set_trial_system_attr(running._trial_id, GAVE_WAY, True)
    finish(study, running, None)


def finish(study: optuna.Study, running: FrozenTrial, outcome: Outcome | None) -> bool:
    """End a trial, as FAIL without an outcome; whether it has ended so. Who was told first stays told."""
    ms = None if outcome is None else outcomes.cost(outcome)
    state = TrialState.FAIL if outcome is None else TrialState.COMPLETE
    values = None if outcome is None else [math.inf if ms is None else ms]
    try:
        study._storage.set_trial_state_values(running._trial_id, state, values)
    except UpdateFinishedTrialError:
        return study._storage.get_trial(running._trial_id).state == state
    return True


def about(space: SearchSpace, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """A study's description, as it reads back from JSON."""
    whole = {"attrs": dict(attrs), "space": {param.name: list(param.values) for param in space.params}}
    plain: dict[str, Any] = json.loads(json.dumps(whole, sort_keys=True))
    return plain


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first thing in which two descriptions differ, for a person."""
    if not found:
        return "mctune did not make it"
    for part in ("attrs", "space"):
        old, new = found.get(part, {}), wanted[part]
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                return f"{name} is {json.dumps(old.get(name))} there and {json.dumps(new.get(name))} here"
    return "what it says of itself cannot be read"


def agree(study: optuna.Study, storage: str | None, name: str, what: dict[str, Any]) -> None:
    """Refuse a study that was found and is about something else; one whose creator is gone gets its description.

    Raises:
        UsageError: with the first thing in which they differ.
    """
    until = time.monotonic() + (_DESCRIBED_S if shared(storage) else 0.0)
    while True:
        found, used = study.user_attrs.get(ABOUT), bool(study.get_trials(deepcopy=False))
        if found is not None or used or time.monotonic() > until:
            break
        time.sleep(0.05)
    if found is None and not used:  # who created it is gone
        study.set_user_attr(ABOUT, what)
    elif found != what:
        raise UsageError(
            f"the study {name!r} in {redacted(str(storage))} is about something else "
            f"({difference(found or {}, what)}); a study never mixes problems, targets or spaces: give another study "
            "name, storage or output directory"
        )
