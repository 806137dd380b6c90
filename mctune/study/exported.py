"""A stored study, for whoever writes it down elsewhere: what it is about, its trials, its space and constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from mctune.backends.registry import get_backend, maker_of
from mctune.core.errors import MctuneError, UsageError
from mctune.core.known import Machine
from mctune.core.remark import redacted
from mctune.core.space import Param, SearchSpace
from mctune.core.target import Target, resolve
from mctune.core.workload import Case
from mctune.study.events import SearchRequest
from mctune.study.one import OneStudy
from mctune.study.record import Trial
from mctune.study.rules import Rule, Trees
from mctune.study.storage import ABOUT, BROKEN, legible, opened, reason, studies_in
from mctune.study.study import PATIENCE_S, load_study


@dataclass(frozen=True)
class Exported:
    """One study.

    Attributes:
        name: in its storage.
        attrs: what it is about, as :func:`mctune.study.study.run_study` was told.
        trials: its evaluated candidates, in order.
        finished: when each of them was, by number.
        begun: when the first one was asked for.
        space: its parameters.
        conditions: (parameters, expression) of the constraints; ``None`` where they are not to be had, because the
            templates or the machine of today are not the study's.
        unsaid: how many more there are, which read too much for an expression.
    """

    name: str
    attrs: Mapping[str, Any]
    trials: tuple[Trial, ...]
    finished: Mapping[int, datetime]
    begun: datetime | None
    space: SearchSpace
    conditions: tuple[tuple[tuple[str, ...], str], ...] | None
    unsaid: int = 0

    @property
    def machine(self) -> Machine:
        """What it was searched for."""
        return Machine(*self.attrs["target"])


def exported(url: str, constraints: bool = True) -> tuple[Exported, ...]:
    """Every study of a storage; without ``constraints``, which take long to write down, ``conditions`` is ``None``.

    Raises:
        UsageError: if it cannot be read, or has none.
    """
    names = sorted(studies_in(url, PATIENCE_S))
    if not names:
        raise UsageError(f"{redacted(url)} holds no study; run mctune search first")
    return tuple(_exported(url, name, constraints) for name in names)


def _exported(url: str, name: str, constraints: bool) -> Exported:
    attrs, trials = load_study(url, name)
    try:
        with legible(url):
            study = optuna.load_study(study_name=name, storage=opened(url, PATIENCE_S))
            found = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            stored: dict[str, list[Any]] = study.user_attrs[ABOUT]["space"]
    except BROKEN as error:
        raise UsageError(f"the studies in {redacted(url)} cannot be read: {reason(error)}") from error
    finished = {one.number: one.datetime_complete.astimezone() for one in found if one.datetime_complete}
    started = [one.datetime_start.astimezone() for one in found if one.datetime_start]
    plain = SearchSpace(tuple(Param(key, tuple(values), _numbers(values)) for key, values in stored.items()))
    space, rules = (_today(attrs, url) if constraints else None) or (plain, None)
    if {param.name: list(param.values) for param in space.params} != stored:
        space, rules = plain, None
    conditions, unsaid = (None, 0) if rules is None else conditions_of(space, rules)
    return Exported(name, attrs, trials, finished, min(started, default=None), space, conditions, unsaid)


def _numbers(values: Sequence[Any]) -> bool:
    return all(type(value) is int for value in values)


def _today(attrs: Mapping[str, Any], url: str) -> tuple[SearchSpace, tuple[Rule, ...]] | None:
    """The space and the rules that a study of that would have now, if it is the same: templates, compiler, machine."""
    try:
        target, _ = resolve(attrs["target"][0])
        case = Case.of(attrs["problem"], tuple(attrs["segment_lengths"]))
        backend = get_backend(maker_of(target, case.problem, attrs["backend"]["name"]) or "")
        backend = backend.measuring() if attrs["how"] == "measured" else backend
        if list(attrs["target"]) != _named(target) or backend.identity() != attrs["backend"]:
            return None
        study = OneStudy(SearchRequest(target=target, cases=(case,), out=Path(), trials=1), backend, case, url)
        return study.space(), study.rules()
    except (MctuneError, ImportError, LookupError, TypeError, ValueError):
        return None


def _named(target: Target) -> list[Any]:
    return [target.name, target.title, target.arch, target.cores]


def conditions_of(space: SearchSpace, rules: Sequence[Rule]) -> tuple[tuple[tuple[tuple[str, ...], str], ...], int]:
    """The rules as expressions over the space's parameters, without those that hold everywhere.

    Returns:
        (parameters, expression) of each, and how many rules have none, because they read too much at once.
    """
    trees = Trees(space)
    found = [trees.of(rule) for rule in rules]
    said = {(trees.names(tree), trees.expression(tree)): None for tree in found if tree is not None}
    return tuple(one for one in said if one[1] != "True"), found.count(None)
