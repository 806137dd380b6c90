"""What a new study begins with: known configurations fit its space, the nearest come first, and it keeps them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mctune.backends import get_backend
from mctune.core.config import Config, Scalar
from mctune.core.known import Known, Machine
from mctune.core.outcome import Timed
from mctune.core.problem import AGGREGATIONS, Problem
from mctune.core.space import Choice, Int, Pow2, SearchSpace
from mctune.core.target import resolve
from mctune.core.workload import Case
from mctune.study.events import Listener, SearchRequest
from mctune.study.known import MOST, Home, begun_from, recorded, seeds
from mctune.study.nearness import between, distance
from mctune.study.one import OneStudy
from mctune.study.samplers import sampler_of
from mctune.study.samplers.points import Points
from mctune.study.storage import sqlite_url
from mctune.study.study import load_study, run_study
from mctune.workers.pool import Workers
from tests.study.spaces import SPACE, evaluate, timed, valid

CPU, A100, H100 = Machine("cpu", "Some CPU", "x86-64-v3", 8), Machine("a100-80g", "", "sm_80", 108), Machine(
    "h100-sxm", "", "sm_90", 132
)  # fmt: skip
PROBLEM = Problem(T=4096, H=4, Dk=64, Dv=64, segment_length=64)
LENGTHS = (64, 128, 256)
TILES = SearchSpace(
    (Pow2("rows", 1, 64), Pow2("cols", 8, 64), Choice("form", ("gemm", "loop", "gather")), Int("panel", (1, 2, 4))),
    default=Config.of({"rows": 4, "cols": 16, "form": "gemm", "panel": 1}),
    before=Config.of({"panel": 1}),
)


def rules(config: Config) -> bool:
    return config.integer("rows") * config.integer("cols") <= 512


def loop_has_one_panel(config: Config) -> bool:
    return config["form"] != "loop" or config["panel"] == 1


def home(lengths: tuple[int, ...] = LENGTHS, space: SearchSpace = TILES) -> Home:
    if lengths:
        space = space.with_param(Int("segment_length", lengths), lengths[len(lengths) // 2])
    return Home(Case(PROBLEM, lengths), CPU, "tvm", True, space, (rules, loop_has_one_panel))


def known(ms: float = 1.0, problem: Problem | None = PROBLEM, machine: Machine = CPU, **values: Scalar) -> Known:
    config = Config.of({"rows": 8, "cols": 16, "form": "gemm", "panel": 2, **values})
    return Known(config, ms, True, "elsewhere", problem, machine, "tvm")


sizes = st.sampled_from((1, 2, 4, 16, 64, 4096, 5000))
problems = st.builds(
    Problem, T=sizes, H=sizes, B=st.just(1), Dk=sizes, Dv=sizes, segment_length=sizes,
    aggregation=st.sampled_from(sorted(AGGREGATIONS)), recurrence=st.sampled_from(("linear", "swla", "dla")),
    pass_=st.sampled_from(("forward", "backward")), dtype=st.sampled_from(("float32", "bfloat16", "float16")),
)  # fmt: skip
values = st.dictionaries(
    st.sampled_from(("rows", "cols", "form", "panel", "segment_length", "gone")),
    st.one_of(st.sampled_from((1, 3, 4, 16, 64, 700, 0, -1)), st.sampled_from(("gemm", "loop", "none")), st.booleans()),
)


@given(problems, problems)
def test_the_distance_is_one(here: Problem, there: Problem) -> None:
    away = distance(here, there)
    assert away == distance(there, here)
    assert distance(here, here) == 0
    if away is None:
        assert (here.pass_, here.writes.family) != (there.pass_, there.writes.family)
    elif here != there:
        assert away > 0


def test_what_changes_more_is_farther() -> None:
    aways = [distance(PROBLEM, PROBLEM.replace(T=T)) for T in (4096, 5000, 8192, 65536)]
    assert aways == sorted(cast(list[float], aways)) and len(set(aways)) == 4
    # The same work in another batch is no other problem to a kernel, and widths matter more than lengths.
    assert distance(PROBLEM, PROBLEM.replace(B=4, H=1)) == 0
    longer, wider = distance(PROBLEM, PROBLEM.replace(T=8192)), distance(PROBLEM, PROBLEM.replace(Dk=128))
    assert longer is not None and wider is not None and longer < wider
    kinds = (CPU, H100, A100, Machine("mi300x", arch="gfx942"))
    assert [between(H100, other) for other in kinds] == [None, 0.0, 1.0, None]
    assert between(CPU, replace(CPU, cores=32)) == 0.5


@given(st.lists(st.tuples(values, problems, st.floats(0.1, 100.0)), max_size=12), st.booleans())
@settings(max_examples=150, deadline=None)
def test_seeds_are_valid_different_and_spread(drawn: list[Any], balanced: bool) -> None:
    here = home(LENGTHS if balanced else ())
    found = seeds(here, [Known(Config.of(v), ms, True, "there", p, CPU, "tvm") for v, p, ms in drawn])
    configs = [seed.config for seed in found]
    assert len(set(configs)) == len(configs) <= MOST
    assert all(config in here.space and all(rule(config) for rule in here.rules) for config in configs)
    points = Points(here.space, here.rules, "segment_length" if balanced else None)
    assert not {here.space.at(point) for point in points.defaults} & set(configs)
    if balanced:
        # A length gets another one only when all that had one to give have given it.
        counts = [sum(config["segment_length"] == length for config in configs) for length in LENGTHS]
        assert not any(counts) or len(configs) < MOST or max(counts) - min(count for count in counts if count) <= 1


def test_the_nearest_come_first() -> None:
    far, near = known(problem=PROBLEM.replace(T=65536), rows=16), known(problem=PROBLEM.replace(T=8192), rows=32)
    found = seeds(home(()), [far, near])
    assert [seed.config["rows"] for seed in found] == [32, 16]
    assert found[0].distance == pytest.approx(0.25) and found[1].distance == pytest.approx(1.0)
    assert begun_from(found) == "starting from 2 configurations of elsewhere"
    # Of one problem the faster, and one twice as slow is farther than another problem's best.
    found = seeds(home(()), [far, known(2.0, rows=2), known(1.0, rows=1)])
    assert [seed.config["rows"] for seed in found] == [1, 16, 2]


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ({"gone": 7}, {}),  # an unknown name is dropped
        ({"rows": 6}, {"rows": 8}),  # the nearest value of an ordered one
        ({"rows": 1000}, {"rows": 64, "cols": 8}),  # 64 x 16 breaks the constraint: the nearest that does not
        ({"form": "never"}, {"form": "gemm"}),  # another's place is the default's
        ({"form": "loop"}, {"form": "loop", "panel": 1}),
        ({"rows": True}, {"rows": 4}),  # True is not 1
    ],
)  # fmt: skip
def test_a_configuration_is_fitted_to_the_space(given: dict[str, Scalar], becomes: dict[str, Scalar]) -> None:
    (seed,) = seeds(home(()), [known(**given)])
    assert seed.config == Config.of({"rows": 8, "cols": 16, "form": "gemm", "panel": 2, **becomes})


def test_what_a_configuration_lacks_is_what_it_meant() -> None:
    plain = Known(Config.of({"rows": 8, "form": "loop"}), 1.0, True, "x", PROBLEM, CPU, "tvm")
    (seed,) = seeds(home(()), [plain])
    # panel was added later and meant 1; cols is the default's, a quarter away.
    assert seed.config == Config.of({"rows": 8, "cols": 16, "form": "loop", "panel": 1}) and seed.distance == 0.25
    assert not seeds(home(()), [replace(plain, config=Config.of({"rows": 8}))])


@pytest.mark.parametrize(
    "other",
    [
        {"backend": "triton"},
        {"machine": A100},
        {"problem": PROBLEM.replace(pass_="backward")},
        {"problem": PROBLEM.replace(recurrence="dla")},
        {"problem": PROBLEM.replace(T=1 << 40)},
        {"ms": math.inf},
    ],
)
def test_what_is_no_neighbour_seeds_nothing(other: dict[str, Any]) -> None:
    assert seeds(home(()), [known(rows=16)])
    assert not seeds(home(()), [replace(known(rows=16), **other)])


@pytest.mark.parametrize("name", ("mix", "tpe", "random"))
def test_a_search_begins_with_the_default_and_then_what_is_known(name: str) -> None:
    first = [Config.of({"BT": 64, "BK": 32, "unroll": unroll, "form": "gemm"}) for unroll in (4, 2, 4)]
    broken = Config.of({"BT": 256, "BK": 128, "unroll": 1, "form": "gemm"})
    default = Config.of({"BT": 8, "BK": 8, "unroll": 1, "form": "loop"})
    space = replace(SPACE, default=default)
    done = run_study(space, [valid], evaluate, trials=6, sampler=name, first=[default, broken, *first, Config(())])
    assert [trial.config for trial in done.trials][:3] == [default, first[0], first[1]]
    chosen = sampler_of(name, space, [valid], seed=0, first=first)
    assert chosen.propose([]) == space.indices(default)


def test_a_study_keeps_what_it_was_begun_with(tmp_path: Path) -> None:
    first = [Config.of({"BT": 64, "BK": 32, "unroll": unroll, "form": "gemm"}) for unroll in (4, 2, 1, 8)]
    whole = run_study(SPACE, [valid], evaluate, trials=30, seed=2, first=first)
    url = sqlite_url(tmp_path / "search.db")
    for trials in (2, 3, 9, 30):  # each run but the first is given something else, or nothing
        now = first if trials == 2 else first[: trials % 2]
        run_study(SPACE, [valid], evaluate, trials=trials, seed=2, storage=url, first=now)
    there = load_study(url)[1]
    assert [trial.config for trial in there] == [trial.config for trial in whole.trials]
    assert [trial.config for trial in there][:4] == first
    # One that was begun without stays without.
    cold = sqlite_url(tmp_path / "cold.db")
    for trials in (1, 12):
        run_study(SPACE, [valid], evaluate, trials=trials, seed=2, storage=cold, first=first if trials > 1 else ())
    assert [trial.config for trial in load_study(cold)[1]] == [
        trial.config for trial in run_study(SPACE, [valid], evaluate, trials=12, seed=2).trials
    ]


class Instant:
    """Stands in for the worker processes: every candidate is timed by its tile."""

    count, least_s = 1, 0.0

    def evaluate(self, candidate: dict[str, Any], limit_s: float) -> Any:
        raise NotImplementedError


def request_of(tmp_path: Path, case: Case, **more: Any) -> SearchRequest:
    return SearchRequest(target=resolve("cpu")[0], cases=(case,), out=tmp_path, trials=6, **more)


def searched(
    tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> tuple[list[Config], list[str]]:
    """The configurations that a study of mctune's own forward space tries, planted times, and what it says."""
    notes: list[str] = []

    def planted(workers: Workers, candidate: dict[str, Any], limit_s: float, until: float | None, **_: bool) -> Timed:
        return timed(1.0 + candidate["config"]["rows"] / 64 + candidate["config"]["chunk"] / 1024)

    monkeypatch.setattr("mctune.study.one.evaluated", planted)
    monkeypatch.setattr(OneStudy, "decided", lambda study, workers, listener, trials: study.report(trials))
    quiet: Any = SimpleNamespace(
        note=notes.append, study_started=lambda *_: None, trial_done=lambda *_: None, study_done=lambda *_: None
    )
    study = OneStudy(request_of(tmp_path, case, **more), get_backend("tvm"), case, sqlite_url(tmp_path / "s.db"))
    study.run(cast(Workers, Instant()), cast(Listener, quiet), None)
    return [trial.config for trial in study.so_far()], [note for note in notes if note.startswith("starting from")]


def test_a_neighbouring_study_of_the_same_storage_seeds_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, wide = Case(PROBLEM, (64,)), Case(PROBLEM.replace(T=16384), (64, 128))
    tried, said = searched(tmp_path, first, monkeypatch)
    assert said == []
    after, said = searched(tmp_path, wide, monkeypatch)
    (line,) = said
    assert line.startswith("starting from ") and "of the study forward-linear-grm-T4096-" in line
    best = min(tried[1:], key=lambda config: config.integer("rows") / 64 + config.integer("chunk") / 1024)
    assert best in after[:6]
    # The same again goes on, and says nothing; another one without a warm start begins cold.
    assert searched(tmp_path, wide, monkeypatch) == (after, [])
    assert searched(tmp_path, Case(PROBLEM.replace(T=8192), (64,)), monkeypatch, warm=False)[1] == []
    # Another pass finds no neighbour there.
    here = replace(home(()), case=Case(PROBLEM.replace(pass_="backward"), ()))
    assert not recorded(sqlite_url(tmp_path / "s.db"), "", here)
    assert recorded(sqlite_url(tmp_path / "s.db"), "", home(()))


def test_a_request_brings_what_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(PROBLEM, (64,))
    space = get_backend("tvm").space(PROBLEM)
    target = resolve("cpu")[0]
    default = space.first_valid(lambda config: space.valid(config, PROBLEM, target))
    assert default is not None
    others = (default.replace(**{param.name: value}) for param in space.params for value in param.values)
    good = [config for config in others if config != default and space.valid(config, PROBLEM, target)][:3]
    brought = tuple(Known(c, 1.0, True, "a friend", PROBLEM, Machine.of(target), "tvm") for c in good)
    tried, said = searched(tmp_path, case, monkeypatch, known=brought)
    assert said == ["starting from 3 configurations of a friend"]
    assert {config.replace(segment_length=64) for config in good} == set(tried[1:4])
    (tmp_path / "cold").mkdir()
    assert searched(tmp_path / "cold", case, monkeypatch, known=brought, warm=False)[1] == []
