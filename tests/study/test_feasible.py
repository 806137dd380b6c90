"""Valid points are made from what rules read: held to a brute-force search on random spaces, and on the real ones."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mctune.backends import get_backend
from mctune.backends.spaces import load_space
from mctune.core.config import Config
from mctune.core.outcome import TooLarge, to_json
from mctune.core.space import Constraint, Int, SearchSpace
from mctune.core.target import Target, resolve
from mctune.core.workload import Case
from mctune.study.events import SearchRequest
from mctune.study.feasible import Feasible, Point
from mctune.study.one import OneStudy
from mctune.study.rules import Rule, Trees
from mctune.study.samplers import DiscreteSampler, MixSampler, Tried, sampler_of
from mctune.study.samplers.points import Points

VALUES = (1, 2, 3, 4, 6, 8, 12, 16)


def divides(part: str, whole: str) -> Rule:
    return lambda config: config.integer(whole) % config.integer(part) == 0


def at_most(part: str, whole: str, default: int) -> Rule:
    return lambda config: config.integer(part) <= config.integer(whole) or config[part] == default


def unused(part: str, switch: str, value: int, default: int) -> Rule:
    return lambda config: config[switch] != value or config[part] == default


def fits(part: str, whole: str, most: int) -> Rule:
    return lambda config: config.integer(part) * config.integer(whole) <= most


def other_than(items: tuple[tuple[str, int], ...]) -> Rule:
    """It compares configurations as a whole, so nothing is known of its parts."""
    return lambda config: config != Config.of(dict(items))


@st.composite
def spaces(draw: st.DrawFn) -> tuple[SearchSpace, list[Rule]]:
    """At most about 1,500 points, of which rules leave few, or none."""
    some = st.lists(st.sampled_from(VALUES), min_size=1, max_size=4, unique=True).map(sorted)
    params = tuple(Int(f"p{i}", draw(some)) for i in range(draw(st.integers(2, 5))))
    name = st.sampled_from([param.name for param in params])
    value = st.sampled_from(VALUES)
    rule = st.one_of(
        st.builds(divides, name, name),
        st.builds(at_most, name, name, value),
        st.builds(unused, name, name, value, value),
        st.builds(fits, name, name, st.sampled_from((4, 12, 32, 64))),
        st.tuples(*(st.tuples(st.just(p.name), st.sampled_from(p.values)) for p in params)).map(other_than),
    )
    space = SearchSpace(params)
    defaults = draw(st.lists(st.sampled_from(list(space.points())), min_size=1, max_size=4))
    return replace(space, default=defaults[0], fallbacks=tuple(defaults[1:])), draw(st.lists(rule, max_size=6))


def valid_points(space: SearchSpace, rules: list[Rule]) -> list[Point]:
    return [point for point in np.ndindex(*map(len, (p.values for p in space.params))) if ok(space, rules, point)]


def ok(space: SearchSpace, rules: list[Rule], point: Point) -> bool:
    return all(rule(space.at(point)) for rule in rules)


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 2**32), st.integers(1, 60), st.sets(st.integers(0, 2000)))
def test_a_pool_has_what_is_free_and_all_of_it_where_that_is_little(
    drawn: tuple[SearchSpace, list[Rule]], seed: int, count: int, numbers: set[int]
) -> None:
    space, rules = drawn
    wanted = valid_points(space, rules)
    seen = {wanted[number] for number in numbers if number < len(wanted)}
    points = Points(space, rules)
    free = set(wanted) - seen
    pool = points.random(np.random.default_rng(seed), seen, None, count, 2048)
    assert len(set(pool)) == len(pool) <= count and set(pool) <= free
    if points.feasible.settled and len(wanted) <= 4 * count and len(free) <= count > 1:
        assert set(pool) == free


@settings(max_examples=60)
@given(spaces())
def test_every_valid_point_and_no_other_is_made(drawn: tuple[SearchSpace, list[Rule]]) -> None:
    space, rules = drawn
    feasible, wanted = Feasible(space, rules), valid_points(space, rules)
    everything = list(np.ndindex(*(len(param.values) for param in space.params)))
    assert [point for point in everything if point in feasible] == wanted
    assert list(feasible.ordered()) == wanted
    for p, param in enumerate(space.params):
        for value in range(len(param.values)):
            within = [point for point in wanted if point[p] == value]
            assert list(feasible.ordered((p, value))) == within
            made = feasible.repair((0,) * len(space.params), np.random.default_rng(0), (p, value))
            assert made is None or made[p] == value
            assert made is not None or not within
            assert not feasible.settled or made in within or (made is None and not within)
    rng = np.random.default_rng(1)
    made_of = {point: feasible.repair(point, rng) for point in everything}
    # What is valid stays, so every valid point is drawn as often as the draws beneath draw it, or more often.
    assert all(made_of[point] == point for point in wanted)
    assert not feasible.settled or set(made_of.values()) <= {*wanted, *([] if wanted else [None])}


@settings(max_examples=40)
@given(spaces(), st.data(), st.sampled_from(("mix", "random")))
def test_balanced_values_take_turns_until_the_space_is_exhausted(
    drawn: tuple[SearchSpace, list[Rule]], data: st.DataObject, sampler: str
) -> None:
    space, rules = drawn
    b = data.draw(st.integers(0, len(space.params) - 1))
    wanted = valid_points(space, rules)

    def made() -> DiscreteSampler:
        return sampler_of(sampler, space, rules, seed=3, balance=space.params[b].name, start=4)

    proposer = made()
    most = len(wanted) + 1 if sampler == "random" else 25
    history: list[Tried] = []
    while len(history) < most:
        point = proposer.propose(history)
        if len(history) in (1, 5, 20, len(wanted)):  # killed, and gone on
            assert point == made().propose(history)
        seen = {tried.point for tried in history}
        tried = Counter(point[b] for point in seen)
        open_ = {point[b] for point in wanted if point not in seen}
        assert (point is None) == (not open_)
        if point is None:
            break
        assert point in wanted and point not in seen
        assert tried[point[b]] == min(tried[value] for value in open_)
        history.append(Tried(point, None if sum(point) % 3 == 0 else 1.0 + sum(point)))
    if sampler == "random" or len(wanted) < most:
        assert sorted(tried.point for tried in history) == wanted


READ_LAST = SearchSpace((*(Int(name, range(1, 5)) for name in "abcd"), Int("C", (1, 2, 3))))
"""What is left of the second rule is the same for C = 1 and C = 2, so the first of them is asked of both."""
READING_LAST: list[Rule] = [
    lambda config: (config.integer("a") + config.integer("b")) % config.integer("C") == 0,
    lambda config: config.integer("c") < config.integer("d") or config["C"] == 3,
]


@settings(max_examples=30)
@example((READ_LAST, READING_LAST))
@given(spaces())
def test_what_was_asked_before_changes_nothing(drawn: tuple[SearchSpace, list[Rule]]) -> None:
    """A search that goes on asks its first question in the middle."""
    space, rules = drawn
    strata = [(p, value) for p, param in enumerate(space.params) for value in range(len(param.values))]
    points = list(np.ndindex(*(len(param.values) for param in space.params)))[:: len(space.params) + 1]

    def made(order: list[tuple[int, int]]) -> dict[tuple[int, int], list[Point | None]]:
        feasible, found = Feasible(space, rules), {}
        for stratum in order:
            rng = np.random.default_rng(stratum)
            found[stratum] = [feasible.repair(point, rng, stratum) for point in points]
        return found

    assert made(strata) == made(strata[::-1])


def test_each_value_is_drawn_evenly_among_those_that_leave_a_point() -> None:
    params = (Int("part", (1, 2, 3, 4, 5)), Int("whole", (4, 6, 7)))
    feasible = Feasible(SearchSpace(params), [divides("part", "whole")])
    rng = np.random.default_rng(0)
    drawn = Counter(feasible.repair(tuple(rng.integers(0, (5, 3)).tolist()), rng) for _ in range(6000))
    divisors = {0: (0, 1, 3), 1: (0, 1, 2), 2: (0,)}  # of 4, 6 and 7
    assert set(drawn) == {(part, whole) for whole, parts in divisors.items() for part in parts}
    for (_, whole), count in drawn.items():
        assert abs(count - 2000 / len(divisors[whole])) < 200


def test_a_tree_looks_at_what_its_rule_reads() -> None:
    space = SearchSpace(tuple(Int(name, range(1, 5)) for name in "abcd"))
    trees = Trees(space)
    switched = trees.of(lambda config: config["c"] == 1 or config.integer("a") < 3)
    assert switched is not None and trees.first(switched) == 2 and trees.reads(switched) == 0b101
    assert trees.of(lambda config: config["c"] != 1 and config["c"] == 1) == trees.given(switched, 2, 1) * 0
    assert trees.reads(trees.given(switched, 2, 0)) == 0  # c is 1: a is not looked at
    assert trees.of(lambda config: "a" in config and sorted(config) == list("abcd")) == 1
    for whole in (
        lambda config: config == Config.of(dict.fromkeys("abcd", 1)),
        lambda config: config in {1: 2},
        lambda config: config.to_dict()["a"] == 1,
        lambda config: config.replace(a=1)["b"] == 1,
    ):
        assert trees.of(whole) is None
    with pytest.raises(KeyError, match=r"no parameter 'rows'.*a, b, c, d"):
        trees.of(lambda config: config["rows"] == 1)


def test_a_rule_of_too_many_combinations_is_asked_about_whole_points() -> None:
    space = SearchSpace(tuple(Int(f"p{i}", range(8)) for i in range(6)))

    def even(config: Config) -> bool:
        return sum(config.integer(f"p{i}") for i in range(6)) % 2 == 0

    feasible = Feasible(space, [even, lambda config: config["p0"] == 3])
    assert not feasible.settled
    assert (3, 0, 0, 0, 0, 1) in feasible and (3, 0, 0, 0, 0, 0) not in feasible and (1,) * 6 not in feasible
    point = sampler_of("random", space, [even, lambda config: config["p0"] == 3], seed=0).propose([])
    assert point is not None and point in feasible


def cpu(arch: str, vector_floats: int) -> Target:
    return replace(resolve("cpu")[0], arch=arch, vector_floats=vector_floats)


CPUS = (cpu("x86-64-v3", 8), cpu("x86-64-v4", 16))
GPUS = tuple(resolve(name)[0] for name in ("a100", "l4", "h100", "b200", "rtx5090", "mi300x"))
NARROW = ({"T": 256, "H": 2, "Dk": 16, "Dv": 16}, (32, 64))
MIDDLE = ({"T": 4096, "H": 4, "Dk": 40, "Dv": 96}, (48, 100, 512))
WIDE = ({"T": 16384, "H": 16, "Dk": 128, "Dv": 128, "dtype": "bfloat16"}, (64, 128, 256, 512))


@pytest.mark.parametrize("target", (*CPUS, *GPUS), ids=lambda target: target.arch)
@pytest.mark.parametrize("pass_", ("forward", "backward", "decode"))
def test_every_segment_length_of_the_real_spaces_gets_its_first_candidates(target: Target, pass_: str) -> None:
    backend = get_backend("tvm" if target.on_cpu else "triton")
    for (fields, lengths), aggregation in product(
        (NARROW, MIDDLE) if target.on_cpu else (MIDDLE, WIDE), ("residual", "grm", "ssc")
    ):
        case = Case.of({**fields, "pass": pass_, "aggregation": aggregation}, lengths)
        request = SearchRequest(cases=(case,), target=target, out=Path(), trials=1)
        study = OneStudy(request, backend, case, "sqlite://")
        space, rules = study.space(), study.rules()
        assert Feasible(space, rules).settled
        proposer = MixSampler(space, rules, seed=0, balance="segment_length", start=len(lengths))
        history: list[Tried] = []
        for turn in (1, 2):  # the defaults, and then what a model likes
            for _ in lengths:
                point = proposer.propose(history)
                assert point is not None and point not in {tried.point for tried in history}
                config = space.at(point)
                assert space.valid(config, study.problem(config), target)
                history.append(Tried(point, 1.0 + math.fmod(sum(point), 5)))
            tried = Counter(space.at(tried.point)["segment_length"] for tried in history)
            assert tried == dict.fromkeys(lengths, turn)
        # A default that somebody thought about, for each.
        assert all(
            any(config.replace(segment_length=length) == first for config in (space.default, *space.fallbacks))
            for first in (space.at(tried.point) for tried in history[: len(lengths)])
            for length in (first["segment_length"],)
        )


class Refusing:
    """Workers that hold no candidate."""

    count, tried = 2, 0

    def evaluate(
        self, candidate: dict[str, object], limit_s: float, until: float | None, *, measure: bool
    ) -> dict[str, object]:
        self.tried += 1
        return {"outcome": to_json(TooLarge("needs 2 B", 2, 1, "B"))}


def test_a_segment_length_without_a_valid_configuration_is_named(tmp_path: Path) -> None:
    case = Case.of(dict(NARROW[0]), (32, 64))
    space = load_space("tvm", "matrix", "forward")
    long = Constraint("long", lambda c, p, t: p.segment_length != 32, "32 tokens are too few")

    class Backend:
        maker = "tvm"

        def identity(self) -> dict[str, str]:
            return {"name": "short of space"}

        def space(self, problem: object) -> SearchSpace:
            return replace(space, constraints=(*space.constraints, long))

    class Listener:
        notes: tuple[str, ...] = ()

        def note(self, text: str) -> None:
            self.notes = (*self.notes, text)

        def study_started(self, *about: object) -> None: ...

        def trial_done(self, *about: object) -> None: ...

    request = SearchRequest(cases=(case,), target=CPUS[0], out=tmp_path, trials=4, measure=False)
    study, workers, listener = OneStudy(request, Backend(), case, "sqlite://"), Refusing(), Listener()  # type: ignore[arg-type]
    study.run(workers, listener, None)  # type: ignore[arg-type]
    why = "the nearest default breaks long: 32 tokens are too few"
    assert listener.notes[0] == f"no configuration is valid with segments of 32 tokens; {why}"
    assert workers.tried == 4
