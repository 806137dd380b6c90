"""Every sampler, in a plain Optuna study over a constrained space: valid points, none twice, to the last."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from mctune.core.config import Config
from mctune.core.errors import MctuneError, UsageError
from mctune.core.outcome import Timed
from mctune.core.space import Choice, Int, Pow2, SearchSpace
from mctune.study.events import SAMPLERS
from mctune.study.rules import Rule
from mctune.study.samplers import DiscreteSampler, MixSampler, sampler_of
from mctune.study.study import run_study
from tests.study.test_feasible import spaces

ROOT = Path(__file__).parents[2]
QUASI_RANDOM = "optuna.samplers:QMCSampler"
EVERY = (*SAMPLERS, QUASI_RANDOM)
NOT_GP = tuple(name for name in EVERY if name != "gp")

TILES = SearchSpace((Pow2("rows", 1, 16), Pow2("cols", 1, 16), Choice("order", ("rows", "cols", "both"))))


def fits(config: Config) -> bool:
    return config.integer("rows") * config.integer("cols") <= 16


def whole(config: Config) -> bool:
    """The same, of which a sampler can only know what it is told of a point."""
    return len(config.to_json()) > 0 and fits(config)


VALID = [config for config in TILES.points() if fits(config)]


def cost(config: Config) -> float:
    rows, cols = math.log2(config.integer("rows")), math.log2(config.integer("cols"))
    return 1.0 + (rows - 1) ** 2 + (cols - 2) ** 2 + (config["order"] != "cols")


@pytest.fixture(autouse=True)
def quiet() -> Any:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's, about what is experimental
        yield


def configs(study: optuna.Study, space: SearchSpace) -> list[Config]:
    return [Config.of(trial.params) for trial in study.trials]


def searched(sampler: DiscreteSampler, trials: int, value: Callable[[Config], float] = cost) -> list[Config]:
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: value(sampler.suggest(trial)), n_trials=trials)
    return configs(study, sampler.space)


@pytest.mark.parametrize("name", NOT_GP)
@settings(max_examples=5, deadline=None)
@given(spaces(), st.randoms(use_true_random=False))
def test_a_random_space_is_exhausted_without_a_point_twice_whatever_fails(
    name: str, drawn: tuple[SearchSpace, list[Rule]], chance: Any
) -> None:
    space, rules = drawn
    wanted = {config for config in space.points() if all(rule(config) for rule in rules)}
    sampler = sampler_of(name, space, rules, seed=1)
    study = optuna.create_study(sampler=sampler, direction=chance.choice(("minimize", "maximize")))
    fates: dict[Config, str] = {}

    def objective(trial: optuna.Trial) -> float:
        config = sampler.suggest(trial)
        assert config in wanted and config not in fates, "invalid, or twice"
        fates[config] = chance.choice(("raise", "prune", "inf", "constraint", "time", "time", "time"))
        match fates[config]:
            case "raise":
                raise ZeroDivisionError
            case "prune":
                raise optuna.TrialPruned
            case "inf":
                return math.inf
            case "constraint":
                trial.set_constraint("memory", 1.0)
        return float(sum(map(int, config.to_dict().values())) - 8)

    few = 16
    if wanted:
        study.optimize(objective, n_trials=few, catch=ZeroDivisionError)
    assert len(fates) == min(few, len(wanted))
    if len(wanted) <= few:
        assert set(fates) == wanted
        study.optimize(objective, n_trials=1)
        assert study.trials[-1].state == TrialState.PRUNED and not study.trials[-1].params
    assert wanted or not sampler.left(study)


@pytest.mark.parametrize("rule", [fits, whole])
@pytest.mark.parametrize("name", NOT_GP)
def test_optimize_ends_when_every_valid_point_was_tried(name: str, rule: Rule) -> None:
    found = searched(sampler_of(name, TILES, [rule], seed=0), 1000)
    assert len(found) == len(VALID) and set(found) == set(VALID)


def test_the_gaussian_process_of_optuna_goes_through_a_small_space_in_which_much_fails() -> None:
    space = SearchSpace((Int("x", range(8)), Choice("y", ("a", "b"))))

    def value(config: Config) -> float:
        return math.inf if config.integer("x") % 3 == 0 else 1.0 + abs(config.integer("x") - 5)

    found = searched(sampler_of("gp", space, [lambda c: c["y"] == "a" or c.integer("x") > 1], seed=0), 100, value)
    assert len(found) == len(set(found)) == 14


@pytest.mark.parametrize("name", EVERY)
def test_equal_seeds_are_equal_and_a_study_goes_on_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    few, more = {"gp": (11, 12), "cmaes": (9, 14)}.get(name, (14, 24))
    once = searched(sampler_of(name, TILES, [fits], seed=5), more)
    assert once == searched(sampler_of(name, TILES, [fits], seed=5), more)
    if name != "grid":
        assert once != searched(sampler_of(name, TILES, [fits], seed=6), more)
    if name == QUASI_RANDOM:
        return  # it keeps state of its own
    # CMA-ES keeps its state in the storage, in pieces that a database takes.
    storage = f"sqlite:///{tmp_path / 'study.db'}" if name == "cmaes" else optuna.storages.InMemoryStorage()
    for total in (few, more):
        sampler = sampler_of(name, TILES, [fits], seed=5)
        study = optuna.create_study(storage=storage, study_name="it", sampler=sampler, load_if_exists=True)
        study.optimize(lambda trial: cost(sampler.suggest(trial)), n_trials=total - len(study.trials))  # noqa: B023
    assert configs(study, TILES) == once


@pytest.mark.parametrize("name", ("mix", "tpe", "cmaes"))
def test_a_model_beats_chance(name: str) -> None:
    space = SearchSpace((*(Int(f"p{i}", range(12)) for i in range(4)), Choice("form", ("a", "b", "c"))))

    def away(config: Config) -> float:
        return 1.0 + sum((config.integer(f"p{i}") - 2 - i) ** 2 for i in range(4)) + 9 * (config["form"] != "b")

    def mean(name: str) -> float:
        return sum(min(map(away, searched(sampler_of(name, space, seed=seed), 50, away))) for seed in range(3))

    assert mean(name) < 0.8 * mean("random")


@pytest.mark.parametrize("name", ("mix", "random", "grid"))
def test_values_and_positions_may_be_suggested(name: str) -> None:
    sampler = sampler_of(name, TILES, [fits], seed=0)
    study = optuna.create_study(sampler=sampler, direction="maximize")

    def objective(trial: optuna.Trial) -> float:
        rows = trial.suggest_categorical("rows", [1, 2, 4, 8, 16])
        cols = 2 ** trial.suggest_int("cols", 0, 4)
        return float(rows * cols) if trial.suggest_categorical("order", ["both", "rows", "cols"]) == "both" else 0.0

    study.optimize(objective, n_trials=200)
    assert len(study.trials) == len(VALID) and study.best_value == 16
    with pytest.raises(UsageError, match=r"'cols' is suggested with other values.*\[1, 2, 4, 8, 16\]"):
        optuna.create_study(sampler=sampler).ask().suggest_int("cols", 1, 16)
    with pytest.raises(UsageError, match="no parameter 'depth'; the space has rows, cols, order"):
        optuna.create_study(sampler=sampler).ask().suggest_int("depth", 0, 3)
    with pytest.raises(UsageError, match="minimizes or maximizes one value, not 2"):
        optuna.create_study(sampler=sampler, directions=["minimize"] * 2).ask()


def test_trials_side_by_side_get_different_points() -> None:
    sampler = MixSampler(TILES, [fits], seed=0)
    study = optuna.create_study(sampler=sampler)
    asked = [study.ask() for _ in range(40)]
    assert len({sampler.suggest(trial) for trial in asked}) == 40
    threads = MixSampler(TILES, [fits], seed=0)
    study = optuna.create_study(sampler=threads)
    study.optimize(lambda trial: cost(threads.suggest(trial)), n_trials=500, n_jobs=4)
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert len(complete) == len(VALID) == len({tuple(trial.params.values()) for trial in complete})


def test_what_failed_may_be_tried_again() -> None:
    sampler = MixSampler(SearchSpace((Int("x", range(4)),)), seed=0, retry_failed=True)
    study = optuna.create_study(sampler=sampler)
    for state in (TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE, TrialState.FAIL):
        trial = study.ask()
        sampler.suggest(trial)
        study.tell(trial, 1.0 if state == TrialState.COMPLETE else None, state=state)
    assert sampler.left(study)
    study.optimize(lambda trial: float(sampler.suggest(trial).integer("x")), n_trials=50)
    done = [trial.params["x"] for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ("mix", "tpe", "gp", "cmaes", "random"))
def test_values_that_are_balanced_take_turns(name: str) -> None:
    sampler = sampler_of(name, TILES, [fits], seed=0, balance="rows")
    rows = [config["rows"] for config in searched(sampler, 10)]
    assert sorted(rows) == sorted([1, 2, 4, 8, 16] * 2)


@pytest.mark.parametrize("name", ("mix", "tpe"))
def test_a_study_of_an_earlier_version_goes_on(name: str, tmp_path: Path) -> None:
    """It was searched with ``--sampler tpe``, which was today's ``mix``; the sampler is no part of a study."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    space = {param.name: list(param.values) for param in TILES.params}
    ranges: dict[str, BaseDistribution] = {n: IntDistribution(0, len(v) - 1) for n, v in space.items()}
    study = optuna.create_study(storage=url, study_name="mctune", sampler=optuna.samplers.RandomSampler(seed=0))
    study.set_user_attr("mctune", {"attrs": {}, "space": space})
    config = VALID[7]
    study.enqueue_trial(dict(zip(ranges, TILES.indices(config), strict=True)))
    trial = study.ask(ranges)
    trial.set_user_attr("config", config.to_json())
    trial.set_user_attr("seconds", 0.1)
    trial.set_constraint("failed", 0.0)
    trial.set_user_attr("outcome", '{"kind": "timed", "ms": 0.5, "low": 0.5, "high": 0.5, "repeats": 3, "error": 0.0}')
    study.tell(trial, 0.5)
    result = run_study(
        TILES, [fits], lambda config: Timed(cost(config), 0.0, 0.0, 1, 0.0), trials=9, sampler=name, storage=url
    )
    assert len({trial.config for trial in result.trials}) == 9
    assert result.best is not None and result.best.config == config


class Remembering(optuna.samplers.RandomSampler):
    """Counts what it is told."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.told: list[Any] = []

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self.told.append(values)


class Bare(optuna.samplers.RandomSampler):
    """Takes no seed."""

    def __init__(self) -> None:
        super().__init__(3)


class Greedy(optuna.samplers.RandomSampler):
    """Wants more than a seed."""

    def __init__(self, model: str, seed: int = 0) -> None: ...


class Unwilling(optuna.samplers.RandomSampler):
    """Its library is missing."""

    def __init__(self, seed: int = 0) -> None:
        raise OSError("no licence\nfor this machine")


class Failing(optuna.samplers.RandomSampler):
    """Starts, and fails."""

    def sample_independent(self, *arguments: Any) -> Any:
        raise RuntimeError("out of ideas\nentirely")


def test_a_class_of_somebody_else_is_told_how_trials_end() -> None:
    sampler = sampler_of(f"{__name__}:Remembering", TILES, [fits], seed=0)
    searched(sampler, 10, lambda config: math.inf if config["order"] == "both" else cost(config))
    told = [values for values in sampler._one.told if values is not None]  # type: ignore[attr-defined]
    assert len(told) >= 9 and all(math.isfinite(value) for values in told for value in values)
    assert len(searched(sampler_of(f"{__name__}:Bare", TILES, [fits]), 10)) == 10


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("annealing", "'annealing' is not one of chain, mix, tpe, gp, cmaes, random, grid, nor module:Class"),
        ("no.such.module:Sampler", "No module named 'no'.*installed"),
        ("optuna.samplers:Nothing", "optuna.samplers has no 'Nothing'"),
        ("mctune.core.config:Config", "is no optuna.samplers.BaseSampler"),
        ("optuna:create_study", "is no optuna.samplers.BaseSampler"),
        ("optuna.samplers:GridSampler", "cannot be constructed: .*search_space.*derive a class"),
        ("optuna.samplers:BaseSampler", "cannot be constructed: .*abstract"),
        (f"{__name__}:Greedy", "cannot be constructed: .*'model'.*derive a class"),
        (f"{__name__}:Unwilling", "cannot be constructed: no licence$"),
    ],
)
def test_a_sampler_that_cannot_be_had_is_said_in_one_line(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        sampler_of(name, TILES)
    assert len(str(raised.value).splitlines()) == 1 and name in str(raised.value)


def test_a_sampler_that_fails_is_named() -> None:
    with pytest.raises(MctuneError, match=r"the sampler Failing failed: out of ideas; choose another$"):
        searched(sampler_of(f"{__name__}:Failing", TILES), 3)


@pytest.mark.parametrize(("name", "needed"), [("gp", "scipy"), ("cmaes", "cmaes")])
def test_what_a_sampler_needs_is_named(name: str, needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mctune.study.samplers.named.find_spec", lambda module: None if module == needed else module)
    with pytest.raises(UsageError, match=rf"sampler '{name}' needs {needed}: pip install {needed}$"):
        sampler_of(name, TILES)


def test_the_example_of_the_page_runs() -> None:
    page = (ROOT / "docs" / "searching.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(example, scope)
    valid = [config for config in scope["space"].points() if all(rule(config) for rule in scope["rules"])]
    assert len(scope["study"].trials) == len(valid)
    assert scope["study"].best_value == min(map(scope["milliseconds"], valid))
