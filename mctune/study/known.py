"""What a new study begins with: configurations that did well on problems and machines like its own.

They come from the other studies of its storage and from what a request brings along (published tables, files). They
are ranked by how far away they are (:mod:`mctune.study.nearness`), and on top of that: 1/2 between a measured and a
predicted time; 5 for each factor of 2 by which a configuration was slower than the best known of the same problem; 1/4
for each parameter that it does not have, 1/2 for each that had to be changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mctune.core.config import Config, Scalar
from mctune.core.errors import MctuneError
from mctune.core.known import Known, Machine
from mctune.core.problem import Problem
from mctune.core.space import Param, SearchSpace
from mctune.core.workload import Case
from mctune.study.feasible import Point, Stratum
from mctune.study.frontier import SEGMENT_LENGTH
from mctune.study.nearness import between, distance, doublings
from mctune.study.record import Trial
from mctune.study.rules import Rule
from mctune.study.samplers.points import Points, within
from mctune.study.storage import studies_in
from mctune.study.study import PATIENCE_S, load_study

MOST = 5
"""Configurations that a study begins with besides the defaults."""
_FARTHEST = 6.0
_UNSAID = 1.0  # the distance of a problem, and of a machine, that a source does not name
_STUDIES = 8  # neighbours of a storage that are read, the nearest
_BEST = 5  # trials of each segment length that are taken from one
_FITTED = 40  # configurations that are fitted to a space for one segment length, the nearest


@dataclass(frozen=True)
class Home:
    """What the study to be begun is about: ``rules`` and ``space`` as :func:`mctune.study.study.run_study` has them."""

    case: Case
    machine: Machine
    backend: str
    measured: bool
    space: SearchSpace
    rules: tuple[Rule, ...]

    def at(self, length: int | None) -> Problem:
        """The problem at a segment length."""
        return self.case.problem if length is None else self.case.problem.replace(segment_length=length)


@dataclass(frozen=True)
class Seed:
    """A point of the study's space, what it was made from, and how far away that is."""

    config: Config
    distance: float
    known: Known


def seeds(home: Home, known: Sequence[Known], most: int = MOST) -> tuple[Seed, ...]:
    """Up to ``most`` different valid points, the nearest first, by turns over the segment lengths.

    What the study tries anyway (its defaults) is not among them.
    """
    points = Points(home.space, home.rules, SEGMENT_LENGTH if home.case.segment_lengths else None)
    slowdowns = _slowdowns(known)
    queues: list[Iterator[Seed]] = []
    lengths: tuple[int | None, ...] = home.case.segment_lengths or (None,)
    ranked = [_ranked(home, points, position, length, known, slowdowns) for position, length in enumerate(lengths)]
    for one in sorted((one for one in ranked if one), key=lambda one: one[0].distance):
        queues.append(iter(one))
    taken = {home.space.at(point) for point in points.defaults}
    found: list[Seed] = []
    while queues and len(found) < most:
        for queue in tuple(queues):
            seed = next((seed for seed in queue if seed.config not in taken), None)
            if seed is None:
                queues.remove(queue)
            elif len(found) < most:
                taken.add(seed.config)
                found.append(seed)
    return tuple(found)


def begun_from(found: Sequence[Seed]) -> str:
    """One line of what seeds a study."""
    sources = list(dict.fromkeys(seed.known.source for seed in found))
    more = f" and {len(sources) - 2} more" if len(sources) > 2 else ""
    many = "s" * (len(found) != 1)
    return f"starting from {len(found)} configuration{many} of {', '.join(sources[:2])}{more}"


def recorded(storage: str, but: str, home: Home) -> tuple[Known, ...]:
    """The best trials of the nearest studies in a storage, without the one named ``but``.

    What cannot be read is left out: nobody has asked for it.
    """
    found: list[tuple[float, str, dict[str, Any]]] = []
    try:
        for name, attrs in studies_in(storage, PATIENCE_S).items():
            away = _away(home, attrs) if name != but else None
            if away is not None:
                found.append((away, name, attrs))
    except MctuneError:
        return ()
    known: list[Known] = []
    for _, name, attrs in sorted(found, key=lambda one: one[:2])[:_STUDIES]:
        try:
            known += _best_of(f"the study {name}", attrs, load_study(storage, name)[1])
        except (MctuneError, KeyError, TypeError, ValueError):
            continue
    return tuple(known)


def known_of(source: str, attrs: Mapping[str, Any], trials: Sequence[Trial]) -> Iterator[Known]:
    """Every trial of a study that has a time; ``attrs`` are what :func:`mctune.study.study.load_study` returns.

    Raises:
        KeyError, TypeError, ValueError: if they are not those of a search.
    """
    machine, measured = Machine(*attrs["target"]), attrs["how"] == "measured"
    for trial in trials:
        if trial.ms is None:
            continue
        length = {SEGMENT_LENGTH: trial.config[SEGMENT_LENGTH]} if SEGMENT_LENGTH in trial.config else {}
        problem = Problem.from_dict({**attrs["problem"], **length})
        yield Known(trial.config, trial.ms, measured, source, problem, machine, str(attrs["backend"]["name"]))


def _away(home: Home, attrs: Mapping[str, Any]) -> float | None:
    """How far a stored study is, at the segment lengths that are nearest; ``None`` if it is no neighbour."""
    try:
        if attrs["backend"]["name"] != home.backend:
            return None
        machine = between(home.machine, Machine(*attrs["target"]))
        lengths: Sequence[int | None] = attrs["segment_lengths"] or (None,)
        theirs = [
            Problem.from_dict({**attrs["problem"], **({} if length is None else {SEGMENT_LENGTH: length})})
            for length in lengths
        ]
    except (MctuneError, KeyError, TypeError, ValueError):
        return None
    ours = [home.at(length) for length in home.case.segment_lengths or (None,)]
    aways = [away for here in ours for there in theirs if (away := distance(here, there)) is not None]
    return None if machine is None or not aways else machine + min(aways)


def _best_of(source: str, attrs: Mapping[str, Any], trials: Sequence[Trial]) -> Iterator[Known]:
    """The fastest trials of each segment length."""
    groups: dict[str, list[Known]] = {}
    for known in known_of(source, attrs, trials):
        groups.setdefault(str(known.problem), []).append(known)
    for group in groups.values():
        yield from sorted(group, key=lambda known: known.ms)[:_BEST]


def _slowdowns(known: Sequence[Known]) -> list[float]:
    """Doublings of the time of each over the best that is known of the same problem on the same machine."""
    best: dict[tuple[object, ...], float] = {}
    keys = [(one.source, one.problem, one.machine, one.measured) for one in known]
    for key, one in zip(keys, known, strict=True):
        best[key] = min(best.get(key, math.inf), one.ms)
    return [_ratio(one.ms, best[key]) for key, one in zip(keys, known, strict=True)]


def _ratio(ms: float, best: float) -> float:
    return math.log2(ms / best) if 0 < best <= ms < math.inf else math.inf


def _ranked(
    home: Home,
    points: Points,
    position: int,
    length: int | None,
    known: Sequence[Known],
    slowdowns: Sequence[float],
) -> list[Seed]:
    """Points with one segment length, the nearest first."""
    stratum = None if points.balance is None else (points.balance, position)
    problem = home.at(length)
    near: list[tuple[float, int]] = []
    for number, one in enumerate(known):
        away = _from(home, problem, one)
        if away is not None and (whole := away + 5.0 * slowdowns[number]) <= _FARTHEST:
            near.append((whole, number))
    default = _default(points, stratum)
    found: list[Seed] = []
    for away, number in sorted(near)[:_FITTED]:
        fitted = fit(points, stratum, default, known[number].config)
        if fitted is not None and away + fitted[1] <= _FARTHEST:
            found.append(Seed(home.space.at(fitted[0]), away + fitted[1], known[number]))
    return sorted(found, key=lambda seed: seed.distance)


def _from(home: Home, problem: Problem, known: Known) -> float | None:
    """How far from home something known was tried."""
    if known.backend not in ("", home.backend):
        return None
    away = _UNSAID if known.problem is None else distance(problem, known.problem)
    machine = _UNSAID if known.machine is None else between(home.machine, known.machine)
    return None if away is None or machine is None else away + machine + 0.5 * (known.measured != home.measured)


def _default(points: Points, stratum: Stratum | None) -> Config:
    """The default that is valid with the segment length, or failing that the first."""
    for point in points.defaults:
        if point == within(stratum, point):
            return points.space.at(point)
    return points.space.default


def fit(points: Points, stratum: Stratum | None, default: Config, config: Config) -> tuple[Point, float] | None:
    """The valid point of a stratum that is nearest to a configuration of another space or version, and what that costs.

    Parameters that the space lacks are dropped; one that the configuration lacks has the value that was meant before it
    was added, else the default's; a value that the space lacks, or that breaks a constraint, gives way to the nearest.

    Returns:
        ``None`` if the configuration names less than half of the parameters, or nothing valid is near.
    """
    space, point, cost, named = points.space, [], 0.0, 0
    confined = -1 if stratum is None else stratum[0]
    for p, param in enumerate(space.params):
        if p == confined and stratum is not None:
            point.append(stratum[1])
            continue
        named += param.name in config
        if param.name not in config and param.name not in space.before:
            cost += 0.25
        given = next((one for one in (config, space.before, default) if param.name in one), None)
        value, changed = _position(param, param.values[0] if given is None else given[param.name])
        if value is None:
            value = _position(param, default[param.name])[0] or 0 if param.name in default else 0
        cost += 0.5 * changed
        point.append(value)
    if 2 * named < len(space.params) - (stratum is not None):
        return None
    nearest = points.feasible.nearest(tuple(point), stratum)
    if nearest is None:
        return None
    return nearest, cost + 0.5 * sum(one != other for one, other in zip(point, nearest, strict=True))


def _position(param: Param, value: Scalar) -> tuple[int | None, bool]:
    """Where a parameter has a value, or of an ordered one the value nearest to it; and whether that is another.

    ``None`` if there is none.
    """
    alike = [type(one) is type(value) and one == value for one in param.values]
    if any(alike):
        return alike.index(True), False
    numbers = [one for one in (*param.values, value) if not isinstance(one, int) or isinstance(one, bool) or one <= 0]
    if not param.ordered or numbers:
        return None, True
    return min(range(len(param.values)), key=lambda p: doublings(int(param.values[p]), int(value))), True
