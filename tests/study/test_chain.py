"""Operations of a pass are searched one by one: what is known of each, and what is put together from it."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctune.core.config import Config
from mctune.core.outcome import FailedBuild, Timed
from mctune.core.space import Block, Choice, Pow2, SearchSpace
from mctune.study.samplers import DiscreteSampler, sampler_of
from mctune.study.samplers.chain import APART
from mctune.study.samplers.parts import Parts, judged
from mctune.study.samplers.reading import Tried
from mctune.study.study import run_study

OPERATIONS = ("states", "read", "write")
SPACE = SearchSpace(
    (
        Choice("form", ("dense", "gather")),
        *(Pow2(f"{name}_{letter}", 1, 16) for name in OPERATIONS for letter in "abcd"),
    ),
    default=Config.of({"form": "dense", **{f"{name}_{letter}": 1 for name in OPERATIONS for letter in "abcd"}}),
).chained({name: (name,) for name in OPERATIONS})


def parts_of(config: Config, seed: int) -> dict[str, float]:
    """Each operation's own time: a bowl in its own parameters, which lies elsewhere for each form."""
    found = {}
    for number, name in enumerate(OPERATIONS):
        rng = np.random.default_rng([seed, number, config["form"] == "dense"])
        off = sum(abs(math.log2(config.integer(f"{name}_{letter}")) - int(rng.integers(5))) for letter in "abcd")
        found[name] = (number + 1) * float(1 + rng.random() / 4) * 1.2**off
    return found


def searched(sampler: str, seed: int, trials: int, crossed: float = 0.0) -> list[Tried]:
    """Trials of a pass whose operations disturb each other by the factor ``crossed``."""
    chooser, history = sampler_of(sampler, SPACE, (), seed=seed, start=12), list[Tried]()
    for _ in range(trials):
        point = chooser.propose(history)
        assert point is not None
        parts = parts_of(SPACE.at(point), seed)
        whole = sum(parts.values()) * (1 + crossed * (hash(point) % 100) / 100)
        history.append(Tried(point, whole, {}, parts if not crossed else _spread(parts, whole)))
    return history


def _spread(parts: dict[str, float], whole: float) -> dict[str, float]:
    """What a clock between the operations shows: parts that add up to the whole."""
    return {name: ms * whole / sum(parts.values()) for name, ms in parts.items()}


def best(history: list[Tried]) -> float:
    return min(tried.cost for tried in history if tried.cost is not None)


def test_operations_by_themselves_are_found_sooner_than_all_together() -> None:
    chain, joint = ([best(searched(name, seed, 45)) for seed in range(6)] for name in ("chain", "mix"))
    assert statistics.median(chain) < statistics.median(joint)


def test_what_was_tried_is_proposed_once_and_the_same_again() -> None:
    history = searched("chain", 3, 30)
    assert len({tried.point for tried in history}) == 30
    for count in (5, 13, 22, 29):
        assert sampler_of("chain", SPACE, (), seed=3, start=12).propose(history[:count]) == history[count].point


def test_operations_that_do_not_add_up_are_searched_together() -> None:
    history = searched("chain", 1, 40, crossed=4.0)
    misses = Parts(SPACE, history).misses
    assert misses is not None and misses > APART
    joint = sampler_of("mix", SPACE, (), seed=1, start=12)
    assert sampler_of("chain", SPACE, (), seed=1, start=12).propose(history) == joint.propose(history)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 20))
def test_the_best_of_each_operation_make_the_best_of_a_setting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [len(param.values) for param in SPACE.params]
    history = []
    for drawn in rng.integers(0, sizes, size=(12, len(sizes))).tolist():
        parts = parts_of(SPACE.at(drawn), seed)
        failed = bool(rng.random() < 0.2)
        whole = None if failed else sum(parts.values()) + 0.5
        history.append(Tried(tuple(drawn), whole, {}, {} if failed else parts, "read" if failed else ""))
    parts = Parts(SPACE, history)
    for setting in parts.settings.values():
        alike = [one for one in history if parts.shared(one.point) == parts.shared(setting.point) and one.cost]
        if alike:
            expected = 0.5 + sum(min(one.parts[name] for one in alike) for name in OPERATIONS)
            assert setting.composed() == pytest.approx(expected)
        for block, points in zip(setting.blocks, setting.points, strict=True):
            for known in points.values():
                assert not known.failed or block.name == "read"
    assert all(size < 1e-6 for size in parts._sums)


def test_a_failure_without_a_culprit_is_laid_on_what_was_not_seen_to_work() -> None:
    point = SPACE.indices(SPACE.default)
    right = Tried(point, 6.0, {}, {name: 2.0 for name in OPERATIONS})
    changed = SPACE.indices(SPACE.default.replace(write_a=4))
    both = SPACE.indices(SPACE.default.replace(write_b=4, read_b=4))
    parts = Parts(SPACE, [right, Tried(changed, None), Tried(both, None)])
    (setting,) = parts.settings.values()
    by_name = dict(zip((block.name for block in setting.blocks), setting.points, strict=True))
    assert sorted(known.failed for known in by_name["write"].values()) == [0, 0, 1]
    assert [known.doubtful for known in by_name["read"].values()] == [0, 1]


def test_a_study_keeps_the_times_of_operations() -> None:
    def evaluate(config: Config) -> Timed | FailedBuild:
        if config["form"] == "gather" and config["read_a"] == 16:
            return FailedBuild("no", "read")
        parts = parts_of(config, 0)
        whole = sum(parts.values())
        return Timed(whole, whole, whole, 1, 0.0, parts=tuple(parts.items()))

    result = run_study(SPACE, (), evaluate, trials=30, seed=0, start=10)
    tried = [(trial.config, trial.outcome) for trial in result.trials]
    found = judged(SPACE, tried)
    assert found is not None and (found.misses is None or found.misses < 1e-9)
    own = {(tuple(config[name] for name in (*SPACE.shared, *block.params)), block.name) for config, _ in tried
           for block in SPACE.chain(config)}  # fmt: skip
    assert found.variants == len(own)
    assert all(dict(outcome.parts).keys() == set(OPERATIONS) for _, outcome in tried if isinstance(outcome, Timed))


def test_blocks_are_active_by_shared_values() -> None:
    space = SearchSpace(
        (Choice("parallel", ("head", "segment")), Pow2("rows", 1, 4), Pow2("chunk", 16, 32)),
        blocks=(
            Block("states", ("segment_states",), ("chunk",), {"parallel": ("segment",)}),
            Block("read", ("read_forward",), ("rows",), {"parallel": ("segment",)}),
            Block("head", ("read_forward",), ("rows", "chunk"), {"parallel": ("head",)}),
        ),
    )
    config = Config.of({"parallel": "head", "rows": 2, "chunk": 16})
    assert space.shared == ("parallel",)
    assert [block.name for block in space.chain(config)] == ["head"]
    assert space.seen_by("read_forward", config) == config
    assert "chunk" not in space.seen_by("read_forward", config.replace(parallel="segment"))
    assert isinstance(sampler_of("chain", space, ()), DiscreteSampler)
