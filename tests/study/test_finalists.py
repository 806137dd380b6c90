"""Who wins the last round."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from mctune.core.config import Config
from mctune.core.errors import NoValidConfigError
from mctune.core.outcome import Crashed
from mctune.study.finalists import Rounds, decide, shortlist
from mctune.study.record import Trial
from tests.study.spaces import timed

A, B, C = (Config.of({"BT": bt}) for bt in (1, 2, 3))


def fixed(samples: dict[Config, Sequence[float]]) -> Rounds:
    return lambda configs: [samples[config] for config in configs]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_shortlist_is_what_is_near_the_fastest_that_may_be_believed(wrong: int) -> None:
    times = [3.0, 1.0, 1.16, 1.05, 1.1, 1.02]
    times[1:1] = [0.2 + n / 10 for n in range(wrong)]
    trials = [Trial(n, Config.of({"BT": times[n]}), timed(ms), 0.1) for n, ms in enumerate(times)]
    trials.append(Trial(9, C, Crashed("x"), 0.1))
    assert [config["BT"] for config in shortlist(trials)][wrong:] == [1.0, 1.02, 1.05, 1.1]
    assert [config["BT"] for config in shortlist(trials, within=10.0, most=wrong + 2)][wrong:] == [1.0, 1.02]
    assert shortlist(trials[-1:]) == ()


def test_a_clear_winner_wins_whatever_the_order() -> None:
    rounds = fixed({A: [2.0, 2.1, 2.0, 2.2, 2.1], B: [1.0, 1.1, 1.0, 1.2, 1.1]})
    for order in ((A, B), (B, A)):
        decision = decide(order, rounds)
        assert decision.winner.config == B and not decision.tie
        assert [(f.config, f.ms, f.tied) for f in decision.finalists] == [(B, 1.1, True), (A, 2.1, False)]


def test_drift_that_both_share_is_not_noise() -> None:
    """The samples overlap, but in every round A was slower."""
    drift = [1.0, 1.5, 2.0, 2.5, 3.0]
    decision = decide((A, B), fixed({A: [1.01 * ms for ms in drift], B: drift}))
    assert decision.winner.config == B and not decision.tie


def test_what_noise_cannot_tell_apart_ties_and_the_choice_does_not_depend_on_who_led() -> None:
    one, other, slow = [1.0, 1.2, 1.0, 1.1, 1.0], [1.1, 1.0, 1.1, 1.0, 1.3], [9.0] * 5
    for fast, behind in ((one, other), (other, one)):
        decision = decide((C, B, A), fixed({A: fast, B: behind, C: slow}))
        assert decision.tie and decision.winner.config == A
        assert [f.config for f in decision.finalists if f.tied] in ([A, B], [B, A])


def test_equal_samples_and_few_rounds_tie() -> None:
    assert decide((B, A), fixed({A: [1.0] * 9, B: [1.0] * 9})).winner.config == A
    assert decide((B, A), fixed({A: [2.0] * 4, B: [1.0] * 4})).tie


def test_a_finalist_that_fails_is_dropped() -> None:
    decision = decide((A, B, C), fixed({A: [], B: [1.0] * 5, C: [math.nan, 1.0, 1.0, 1.0, 1.0]}))
    assert decision.winner.config == B and decision.dropped == (A, C)
    with pytest.raises(NoValidConfigError, match="none of the 1 finalists"):
        decide((A,), fixed({A: []}))
