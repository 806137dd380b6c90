"""A table of what was tuned, as the report of a search that would have found just that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mctune.backends.registry import get_backend, maker_of, makers
from mctune.core.errors import UsageError
from mctune.core.known import Tuned
from mctune.core.outcome import Timed
from mctune.core.target import Target
from mctune.core.work import cached_state_bytes, cached_states
from mctune.core.workload import Case
from mctune.study.events import FrontierPoint, SearchReport, StudyReport
from mctune.study.frontier import recommend


def tabled(
    target: Target, out: Path, entries: Sequence[Tuned], max_slowdown: float
) -> tuple[SearchReport, tuple[str, ...]]:
    """A study for each problem and backend, its frontier the table's segment lengths; and what is left out, and why.

    Entries of one problem whose times are measured are apart from those whose times are predicted.
    """
    groups: dict[tuple[str, str, bool], list[Tuned]] = {}
    left_out: list[str] = []
    for entry in entries:
        why = _unfit(target, entry)
        if why is not None:
            left_out.append(f"left out: {entry.problem} by {entry.backend}: {why}")
            continue
        fields = {name: value for name, value in entry.problem.to_dict().items() if name != "segment_length"}
        key = (repr(sorted(fields.items())), entry.backend, isinstance(entry.outcome, Timed))
        groups.setdefault(key, []).append(entry)
    studies = tuple(_study(target, group, max_slowdown) for group in groups.values())
    return SearchReport(target, out, studies, 0.0), tuple(left_out)


def _unfit(target: Target, entry: Tuned) -> str | None:
    """Why an entry has no kernel for a target, if it has none."""
    try:
        of_backend = makers(target, entry.backend)
    except UsageError as error:
        return str(error)
    maker = maker_of(target, entry.problem, entry.backend)
    if maker is None or maker not in of_backend:
        return f"{entry.backend} has no templates for it on {target.name}"
    return get_backend(maker).supports(entry.problem, target).reason


def _study(target: Target, group: Sequence[Tuned], max_slowdown: float) -> StudyReport:
    fastest: dict[int | None, Tuned] = {}
    for entry in sorted(group, key=lambda entry: -entry.outcome.ms):
        fastest[entry.problem.segment_length] = entry
    points = tuple(
        FrontierPoint(one.problem, cached_states(one.problem), cached_state_bytes(one.problem), one.config, one.outcome)
        for one in sorted(fastest.values(), key=lambda one: one.problem.segment_length or 0)
    )
    lengths = tuple(length for point in points if (length := point.problem.segment_length) is not None)
    case = Case(points[0].problem, lengths)
    maker = maker_of(target, case.problem, group[0].backend) or ""
    return StudyReport(case, (), points, recommend(points, max_slowdown), maker=maker)
