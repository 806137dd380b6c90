"""Two results beside each other: what is slower, what is faster, what noise cannot tell apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mctune.core.errors import UsageError
from mctune.core.problem import Problem
from mctune.core.signs import DOUBT, chance, tied
from mctune.report.machines import machine_differences, other_differences
from mctune.report.rows import Row, sort_key
from mctune.report.sides import Side, fastest, target_of
from mctune.report.write import Document

SLOWER, FASTER, NOISE = "slower", "faster", "within noise"
ONLY_OLD, ONLY_NEW = "only in OLD", "only in NEW"
VERDICTS = (SLOWER, FASTER, NOISE, ONLY_OLD, ONLY_NEW)
THRESHOLD = 0.05
_LOG = 700.0  # e to that is a float still


@dataclass(frozen=True)
class Pair:
    """One problem by one backend: its fastest row on each side, ``None`` on a side that has none.

    Args:
        ratio: how many times as long the new one takes, where both are there.
    """

    old: Row | None
    new: Row | None
    ratio: float | None
    verdict: str

    @property
    def row(self) -> Row:
        """Either of them: they agree in problem, backend and how."""
        row = self.new or self.old
        assert row is not None
        return row

    @property
    def problem(self) -> Problem:
        """What is computed."""
        return self.row.problem

    @property
    def how(self) -> str:
        """``measured`` or ``predicted``, both sides."""
        return self.row.how


@dataclass(frozen=True)
class Overall:
    """All pairs that are there on both sides, of one ``how``.

    Args:
        count: how many they are.
        ratio: the geometric mean of theirs.
        slower, faster: how many have a larger, and a smaller time than before, within noise or not.
        chance: how likely so few would have gone the other way, if nothing had changed.
        verdict: slower or faster, if that is unlikely and the ratio beyond the threshold.
    """

    how: str
    count: int
    ratio: float
    slower: int
    faster: int
    chance: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Pairs in reading order; ``remarks`` are lines for a person: how the sides differ, what was left out."""

    old: str
    new: str
    threshold: float
    pairs: tuple[Pair, ...]
    remarks: tuple[str, ...] = ()
    overall: tuple[Overall, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "overall", tuple(_overall(self.pairs, self.threshold)))

    def count(self, verdict: str) -> int:
        """How many pairs have that verdict."""
        return sum(pair.verdict == verdict for pair in self.pairs)

    @property
    def regressed(self) -> bool:
        """Whether a pair is slower, or all together are."""
        return SLOWER in [pair.verdict for pair in self.pairs] + [one.verdict for one in self.overall]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "old": self.old,
            "new": self.new,
            "threshold": self.threshold,
            "rows": [_pair_dict(pair) for pair in self.pairs],
            "overall": [dict(vars(one)) for one in self.overall],
            "remarks": list(self.remarks),
            "regressed": self.regressed,
        }


def _pair_dict(pair: Pair) -> dict[str, Any]:
    sides = {
        name: None if row is None else {"target": row.target, "ms": row.ms, "low": row.low, "high": row.high,
                                        "repeats": row.repeats, "config": row.config.to_dict()}
        for name, row in (("old", pair.old), ("new", pair.new))
    }  # fmt: skip
    return {
        "target": pair.row.target, "problem": pair.problem.to_dict(), "backend": pair.row.backend, "how": pair.how,
        **sides, "ratio": pair.ratio, "verdict": pair.verdict,
    }  # fmt: skip


def compare(old: Side, new: Side, *, threshold: float = THRESHOLD, across: bool = False) -> Comparison:
    """Compare the fastest kernels of two sides, problem by problem and backend by backend.

    A row is beyond noise if its time differs by more than the share ``threshold`` and the two spreads, 20th to 80th
    percentile, do not overlap. Predicted times are compared with predicted ones only, and have no noise.

    Raises:
        UsageError: if the sides have nothing in common, or are of different machines and not compared ``across``.
    """
    pairs: list[Pair] = []
    remarks: list[str] = []
    for before, after in _targets(old, new, remarks, across):
        if unlike := machine_differences(before.environment, after.environment):
            if not across:
                raise UsageError(
                    f"{old.called} and {new.called} are of different machines ({'; '.join(unlike)}): their times do "
                    "not tell what a change has done; --across compares them all the same"
                )
            remarks += [f"different machines: {what}" for what in unlike]
        remarks += other_differences(before.environment, after.environment, threshold)
        pairs += _pairs(before.rows, after.rows, threshold, remarks)
    if not any(pair.ratio is not None for pair in pairs):
        why = f" ({'; '.join(remarks)})" if remarks else ""
        raise UsageError(f"{old.called} and {new.called} have no problem and backend in common{why}")
    remarks += _on_noise(pairs, threshold)
    return Comparison(old.called, new.called, threshold, tuple(pairs), tuple(remarks))


def _targets(old: Side, new: Side, remarks: list[str], across: bool) -> Iterator[tuple[Document, Document]]:
    """Documents of the same target; of two targets, where each side has one and that is asked for."""
    if len(old.documents) == len(new.documents) == 1 and across:
        yield old.documents[0], new.documents[0]
        return
    names = [[target_of(one) for one in side.documents] for side in (old, new)]
    both = [name for name in names[0] if name in names[1]]
    for side, mine in ((old, names[0]), (new, names[1])):
        if other := [name for name in mine if name not in both]:
            remarks.append(f"only {side.called} has results of {', '.join(other)}")
    if not both and len(names[0]) == len(names[1]) == 1:
        raise UsageError(
            f"{old.called} is of {names[0][0]}, {new.called} of {names[1][0]}; --across compares different machines"
        )
    for name in both:
        before, after = old.of(name), new.of(name)
        assert before is not None and after is not None
        yield before, after


def _pairs(old: tuple[Row, ...], new: tuple[Row, ...], threshold: float, remarks: list[str]) -> list[Pair]:
    before, after = fastest(old), fastest(new)
    pairs: list[Pair] = []
    mixed = 0
    for key in {**before, **after}:
        mine, theirs = before.get(key, {}), after.get(key, {})
        if mine and theirs and not set(mine) & set(theirs):
            mixed += 1
            continue
        pairs += [judged(mine.get(how), theirs.get(how), threshold) for how in sorted({*mine, *theirs})]
    if mixed:
        remarks.append(f"left out: {mixed} measured on one side and predicted on the other, which is no comparison")
    return sorted(pairs, key=lambda pair: (*sort_key(pair.row)[1:-1], pair.how))


def judged(old: Row | None, new: Row | None, threshold: float) -> Pair:
    """The pair of two stored rows: beyond noise where the threshold is passed and spreads do not overlap.

    Raises:
        UsageError: if their ratio is no number.
    """
    if old is None or new is None:
        return Pair(old, new, None, ONLY_NEW if old is None else ONLY_OLD)
    if not 0 < new.ms / old.ms < math.inf:
        raise UsageError(f"{new.problem}: {old.ms:g} ms and {new.ms:g} ms have no ratio; no kernel takes one of them")
    verdict = NOISE
    if _beyond(new, old, threshold):
        verdict = SLOWER
    elif _beyond(old, new, threshold):
        verdict = FASTER
    return Pair(old, new, new.ms / old.ms, verdict)


def _beyond(slow: Row, fast: Row, threshold: float) -> bool:
    low = slow.ms if slow.low is None else min(slow.low, slow.ms)
    high = fast.ms if fast.high is None else max(fast.high, fast.ms)
    return slow.ms > (1 + threshold) * fast.ms and low > high


def timed_by_turns(
    old: Row, new: Row, samples: tuple[Sequence[float], Sequence[float]], ratio: float, threshold: float
) -> Pair:
    """The pair of two kernels that were timed in the same rounds: the sign test that decides between finalists.

    Args:
        samples: milliseconds of the old one and of the new one in each round.
        ratio: of the rounds, the new one's time over the old one's.
    """
    verdict = NOISE
    if ratio > 1 + threshold and not tied(*samples):
        verdict = SLOWER
    elif 1 / ratio > 1 + threshold and not tied(*reversed(samples)):
        verdict = FASTER
    return Pair(old, new, ratio, verdict)


def _overall(pairs: Sequence[Pair], threshold: float) -> Iterator[Overall]:
    for how in ("measured", "predicted"):
        ratios = [pair.ratio for pair in pairs if pair.ratio is not None and pair.how == how]
        if not ratios:
            continue
        mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        slower, faster = sum(one > 1 for one in ratios), sum(one < 1 for one in ratios)
        same = [1.0] * len(ratios)
        doubt = chance(same, ratios) if slower >= faster else chance(ratios, same)
        verdict = NOISE
        if doubt <= DOUBT and max(mean, 1 / mean) > 1 + threshold:
            verdict = SLOWER if mean > 1 and slower > faster else FASTER if mean < 1 and faster > slower else NOISE
        yield Overall(how, len(ratios), mean, slower, faster, doubt, verdict)


def _on_noise(pairs: Iterable[Pair], threshold: float) -> Iterator[str]:
    """What else may be why times differ, or is not known of them."""
    both = [(pair.old, pair.new) for pair in pairs if pair.old and pair.new and pair.how == "measured"]
    bare = sum(old.low is None or old.high is None or new.low is None or new.high is None for old, new in both)
    if bare:
        yield f"{bare} of {len(both)} measured pairs have no spread: the threshold alone decides there"
    logs = [statistics.fmean(of) for old, new in both if (of := _baselines(old, new))]
    pace = math.exp(max(-_LOG, min(statistics.median(logs), _LOG))) if logs else 1.0
    if max(pace, 1 / pace) > 1 + threshold:
        yield (
            f"the baselines of the same runs take {pace:.3g} times as long as before (median): the machine, or torch, "
            "has another pace"
        )


def _baselines(old: Row, new: Row) -> list[float]:
    before = dict(old.baselines)
    return [math.log(ms) - math.log(before[name]) for name, ms in new.baselines if name in before]
