"""The samplers: better than chance, bounded in time, fair to what is balanced, at home in awkward spaces."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from mctune.core.config import Config
from mctune.core.space import Choice, Int, SearchSpace
from mctune.study.samplers import MixSampler, Tried, sampler_of
from mctune.study.study import run_study
from tests.study.spaces import SPACE, evaluate, milliseconds, timed, valid

ROOT = Path(__file__).parents[2]

WIDE = SearchSpace((*(Int(f"p{i}", range(10)) for i in range(5)), Choice("form", ("a", "b", "c", "d"))))
"""400,000 points."""


def bowl(config: Config) -> float:
    away = sum((config.integer(f"p{i}") - 2 - i) ** 2 for i in range(5))
    return 1.0 + away / 20 + (config["form"] != "c")


def test_the_default_beats_chance() -> None:
    def mean_best(name: str) -> float:
        found = []
        for seed in range(4):
            result = run_study(
                WIDE, [lambda config: True], lambda config: timed(bowl(config)), trials=70, sampler=name, seed=seed
            )
            assert result.best is not None and result.best.ms is not None
            found.append(result.best.ms)
        return statistics.fmean(found)

    chance, guided = mean_best("random"), mean_best("mix")
    assert guided < 1.15 and guided < chance - 0.2


def test_the_default_configuration_is_tried_first() -> None:
    default = SPACE.at([1, 2, 3, 2])
    space = SearchSpace(SPACE.params, default=default)
    result = run_study(space, [valid], evaluate, trials=3, seed=9)
    assert result.trials[0].config == default
    broken = SearchSpace(SPACE.params, default=SPACE.at([5, 4, 0, 0]))
    assert not valid(broken.default)
    assert run_study(broken, [valid], evaluate, trials=3, seed=9).trials[0].config != broken.default


def test_a_needle_in_a_large_space_is_found_by_scanning() -> None:
    space = SearchSpace(tuple(Int(f"p{i}", range(10)) for i in range(5)))
    needles = [space.at([0, 3, 7, 7, i]) for i in range(3)]
    result = run_study(space, [needles.__contains__], lambda config: timed(1.0), trials=10)
    assert result.stopped == "exhausted" and {trial.config for trial in result.trials} == set(needles)


@pytest.mark.parametrize("sampler", ["mix", "tpe", "cmaes", "random", "grid"])
def test_few_valid_points_in_an_endless_space_are_made(sampler: str) -> None:
    """Most parameters of the last eight must keep their first value: one point in a hundred million is valid."""
    space = SearchSpace(tuple(Int(f"p{i}", range(10)) for i in range(12)))

    def allowed(config: Config) -> bool:
        return all(config[f"p{i}"] == 0 for i in range(4, 12)) and config.integer("p0") <= config.integer("p1")

    before = time.process_time()
    result = run_study(
        space, [allowed], lambda config: timed(1.0 + abs(config.integer("p2") - 7)), trials=30, sampler=sampler,
        balance="p3",
    )  # fmt: skip
    assert len({trial.config for trial in result.trials}) == 30 and all(allowed(t.config) for t in result.trials)
    assert {trial.config["p3"] for trial in result.trials} == set(range(10))
    if sampler != "grid":
        assert len({(t.config["p0"], t.config["p1"], t.config["p2"]) for t in result.trials}) > 15
    assert time.process_time() - before < 60  # 0.5 s measured; a scan would take days


def test_every_balanced_value_begins_with_the_first_default_that_is_valid_with_it() -> None:
    """``rows`` must divide the balanced ``chunk``: the default's own does for 64 alone, and no default's for 27."""
    params = (Int("rows", (4, 6, 8, 9, 64)), Choice("form", ("a", "b")), Int("chunk", (18, 27, 48, 64)))
    default, *fallbacks = (Config.of({"rows": rows, "form": "b", "chunk": 64}) for rows in (64, 8, 6))
    space = SearchSpace(params, default=default, fallbacks=tuple(fallbacks))

    def divides(config: Config) -> bool:
        return config.integer("chunk") % config.integer("rows") == 0

    result = run_study(space, [divides], lambda config: timed(1.0), trials=8, seed=1, balance="chunk")
    first = [(trial.config["chunk"], trial.config["rows"]) for trial in result.trials[:4]]
    assert first == [(64, 64), (18, 6), (48, 8), (27, 9)]
    assert all(trial.config["form"] == "b" for trial in result.trials[:3])
    assert sorted(trial.config.integer("chunk") for trial in result.trials) == [18, 18, 27, 27, 48, 48, 64, 64]


def test_a_formulation_with_parameters_of_its_own_does_not_crowd_out_the_others() -> None:
    """One valid point in 1,001 is plain."""
    tiles = (Int(f"tile{i}", range(10)) for i in range(3))
    space = SearchSpace((*tiles, Choice("form", ("plain", "tiled")), Int("unroll", range(50))))

    def unused(config: Config) -> bool:
        return config["form"] == "tiled" or all(config[f"tile{i}"] == 0 for i in range(3))

    result = run_study(space, [unused], lambda config: timed(1.0), trials=40, sampler="random")
    assert 10 <= sum(trial.config["form"] == "plain" for trial in result.trials) <= 30


def proposal_seconds(count: int) -> float:
    """Median processor seconds of ten proposals after ``count`` random points."""
    sampler = MixSampler(WIDE, seed=0)
    chance = sampler_of("random", WIDE, seed=0)
    history: list[Tried] = []
    moments = []
    while len(history) < count + 10:
        point = chance.propose(history)
        assert point is not None
        history.append(Tried(point, bowl(WIDE.at(point))))
    for step in range(count, count + 11):
        moments.append(time.process_time())
        assert sampler.propose(history[:step]) is not None
    return statistics.median(after - before for before, after in pairwise(moments))


@pytest.mark.parametrize("count", [200, 600])
def test_a_proposal_takes_little_time(count: int) -> None:
    """In a process of one BLAS thread: on a machine that is busy, threads that wait for each other are all one sees."""
    code = f"from tests.study.test_sampler import proposal_seconds; print(proposal_seconds({count}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.15  # 0.01 s measured


def test_balance_gives_every_value_its_share_and_its_own_best() -> None:
    """Without it the search flocks to BT=64, which is fastest."""

    def count(balance: str | None) -> dict[int, int]:
        result = run_study(SPACE, [valid], evaluate, trials=90, seed=4, balance=balance)
        lengths = [trial.config.integer("BT") for trial in result.trials]
        if balance:
            for bt in set(lengths):
                reachable = [c for c in SPACE.points() if c["BT"] == bt and valid(c)]
                found = min(t.ms for t in result.trials if t.config["BT"] == bt and t.ms is not None)
                assert found <= 1.06 * min(milliseconds(config) for config in reachable)
        return {bt: lengths.count(bt) for bt in set(lengths)}

    assert set(count("BT").values()) == {15}
    assert min(count(None).values()) < 10
