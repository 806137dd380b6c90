"""The last round: the best candidates are timed against each other, and what noise cannot tell apart is a tie."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mctune.core.config import Config
from mctune.core.errors import NoValidConfigError
from mctune.core.signs import tied
from mctune.study.record import Trial

_SURE = 3  # so many fastest are not all wrong

Rounds = Callable[[Sequence[Config]], Sequence[Sequence[float]]]
"""Times configurations in rotated order: milliseconds ``[configuration][round]``, empty for one that failed."""


@dataclass(frozen=True)
class Finalist:
    """A candidate that was timed again: median milliseconds, the samples, and whether it ties with the fastest."""

    config: Config
    ms: float
    samples: tuple[float, ...]
    tied: bool


@dataclass(frozen=True)
class Decision:
    """The winner and every finalist that has a time, fastest median first; ``dropped`` failed in the last round."""

    winner: Finalist
    finalists: tuple[Finalist, ...]
    dropped: tuple[Config, ...]

    @property
    def tie(self) -> bool:
        """Whether others are as fast as the winner, within noise."""
        return sum(finalist.tied for finalist in self.finalists) > 1


def shortlist(trials: Sequence[Trial], within: float = 1.10, most: int = 8) -> tuple[Config, ...]:
    """The configurations within ``within`` of the third fastest trial, fastest first, at most ``most``.

    Of the third, since a time that is too good to be true must not be alone here: only being timed again shows it.
    """
    timed = sorted((trial.ms, trial.config.key, trial.config) for trial in trials if trial.ms is not None)
    bound = within * timed[:_SURE][-1][0] if timed else 0.0
    return tuple(config for ms, _, config in timed[:most] if ms <= bound)


def decide(candidates: Sequence[Config], rounds: Rounds) -> Decision:
    """Time ``candidates`` together and choose.

    The leader has the lowest median. Another ties with it unless a one-sided sign test over the rounds, in which both
    were timed moments apart, says otherwise at 5%: with fewer than 5 rounds everything ties. Among those that tie, the
    smallest canonical JSON form wins, so that a repeated run chooses the same one whichever happened to lead.

    Raises:
        NoValidConfigError: if none of them has a time.
    """
    timed: list[tuple[float, str, Config, tuple[float, ...]]] = []
    dropped = []
    for config, samples in zip(candidates, rounds(candidates), strict=True):
        if samples and all(math.isfinite(ms) for ms in samples):
            timed.append((statistics.median(samples), config.to_json(), config, tuple(samples)))
        else:
            dropped.append(config)
    if not timed:
        raise NoValidConfigError(f"none of the {len(candidates)} finalists could be timed again")
    timed.sort()
    lead = timed[0][3]
    finalists = tuple(Finalist(config, ms, samples, tied(lead, samples)) for ms, _, config, samples in timed)
    winner = min((finalist for finalist in finalists if finalist.tied), key=lambda finalist: finalist.config.to_json())
    return Decision(winner, finalists, tuple(dropped))
