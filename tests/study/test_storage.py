"""Files as URLs, one search a file, and no password in what is said."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, IntDistribution

from mctune.core.child import command, search_path
from mctune.core.config import Config
from mctune.core.errors import MctuneError, UsageError
from mctune.core.outcome import to_json
from mctune.core.remark import redacted, redacted_url
from mctune.core.space import Int, SearchSpace
from mctune.study.feasible import _ASKED_MOST, Feasible
from mctune.study.record import about
from mctune.study.storage import ABOUT, sqlite_path, sqlite_url, url_of
from mctune.study.study import load_study, run_study
from tests.study.spaces import SPACE, evaluate, timed, valid

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES | st.sampled_from(("what?v=1", "run%41", "a #1", "{SCHEMA_VERSION}", "ü&b=c", "x@y:z")))
def test_a_study_is_where_its_path_says(tmp_path: Path, name: str) -> None:
    folder = tmp_path / f"d{name}"
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return
    file = folder / "study.db"
    url = sqlite_url(file)
    assert sqlite_path(url) == sqlite_path(url_of(str(file))) == file
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.create_study(storage=url, study_name="s", load_if_exists=True)
    assert file.is_file()


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_journal_is_emptied_but_where_a_file_has_chosen_another(tmp_path: Path, mode: str) -> None:
    """To delete it takes ten times as long on some file systems."""
    file = tmp_path / "search.db"
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute(f"pragma journal_mode = {mode}")
    run_study(SPACE, [valid], evaluate, trials=3, storage=sqlite_url(file))
    assert (tmp_path / "search.db-journal").exists() == (mode == "delete")
    with contextlib.closing(sqlite3.connect(file)) as connection:
        assert connection.execute("pragma journal_mode").fetchone() == (mode,)
    assert len(load_study(sqlite_url(file))[1]) == 3


def test_a_second_search_of_a_file_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "search.db")
    refused: list[str] = []

    def disturbed(config: object) -> object:
        if not refused:
            with pytest.raises(UsageError, match=f"searched by process {os.getpid()}") as raised:
                run_study(SPACE, [valid], evaluate, trials=3, storage=url)
            refused.append(str(raised.value))
        return timed(1.0)

    assert len(run_study(SPACE, [valid], disturbed, trials=3, storage=url).trials) == 3  # type: ignore[arg-type]
    assert len(run_study(SPACE, [valid], evaluate, trials=4, storage=url).trials) == 4


def test_what_others_put_into_a_study_is_not_counted(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "search.db")
    run_study(SPACE, [valid], evaluate, trials=3, storage=url)
    study = optuna.load_study(study_name="mctune", storage=url)
    study.tell(study.ask(), 0.5)
    assert len(run_study(SPACE, [valid], evaluate, trials=5, storage=url).trials) == 5


def test_a_study_of_an_earlier_version_is_read_and_goes_on(tmp_path: Path) -> None:
    """It stored positions, a parameter at a time; what is proposed does not depend on the form."""
    url, whole = sqlite_url(tmp_path / "search.db"), run_study(SPACE, [valid], evaluate, trials=40, seed=3)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=url, study_name="mctune")
    study.set_user_attr(ABOUT, about(SPACE, {}))
    for trial in whole.trials[:30]:
        asked = study.ask()
        for param, position in zip(SPACE.params, SPACE.indices(trial.config), strict=True):
            study._storage.set_trial_param(
                asked._trial_id, param.name, position, IntDistribution(0, len(param.values) - 1)
            )
        asked.set_user_attr("config", trial.config.to_json())
        asked.set_user_attr("seconds", trial.seconds)
        asked.set_user_attr("run", "earlier")
        asked.set_constraint("failed", float(trial.ms is None))
        asked.set_user_attr("outcome", to_json(trial.outcome))
        study.tell(asked, float("inf") if trial.ms is None else trial.ms)
    assert [trial.config for trial in load_study(url)[1]] == [trial.config for trial in whole.trials[:30]]
    result = run_study(SPACE, [valid], evaluate, trials=40, seed=3, storage=url)
    assert [trial.config for trial in result.trials] == [trial.config for trial in whole.trials]


def test_what_is_stored_are_values_that_a_person_knows(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "search.db")
    result = run_study(SPACE, [valid], evaluate, trials=5, storage=url)
    stored = optuna.load_study(study_name="mctune", storage=url).trials
    assert [Config.of(trial.params) for trial in stored] == [trial.config for trial in result.trials]
    for trial in stored:
        for param in SPACE.params:
            assert trial.distributions[param.name] == CategoricalDistribution(param.values)


@pytest.mark.parametrize("damage", (b"", b"not a database, and long enough to be looked at as one" * 40))
def test_a_file_that_is_no_study_is_one_line(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "search.db").write_bytes(damage)
    if damage:
        with pytest.raises(UsageError, match="cannot open the storage"):
            run_study(SPACE, [valid], evaluate, trials=1, storage=sqlite_url(tmp_path / "search.db"))
    else:
        run_study(SPACE, [valid], evaluate, trials=1, storage=sqlite_url(tmp_path / "search.db"))


def test_a_study_with_a_damaged_row_is_read_or_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 times another value in a column of any table, drawn from the printed seed; 3 s."""
    monkeypatch.setattr("mctune.study.study.PATIENCE_S", 1.0)
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng, file = random.Random(seed), tmp_path / "search.db"
    run_study(SPACE, [valid], evaluate, trials=3, storage=sqlite_url(file))
    sound = file.read_bytes()
    for _ in range(12):
        file.write_bytes(sound)
        what = _damage(file, rng)
        for read in (
            lambda: load_study(sqlite_url(file)),
            lambda: run_study(SPACE, [valid], evaluate, trials=4, storage=sqlite_url(file)),
        ):
            try:
                read()
            except MctuneError as error:
                assert "\n" not in str(error), what
            except Exception as error:
                raise AssertionError(f"seed {seed}: {what}") from error


def _damage(file: Path, rng: random.Random) -> str:
    """Write another value into a column of a table; what that was."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        full = sorted(name for name in tables if database.execute(f"select * from {name}").fetchone())
        table = rng.choice(full)
        column = rng.choice([row[1] for row in database.execute(f"pragma table_info({table})")])
        value = rng.choice(
            ('{"a":', "[3]", "null", "", "x", -1, 9999, 1.5, 1e308, b"\xff\xfe", None, "1e999", "{}", "[[]]")
        )
        with contextlib.suppress(sqlite3.Error):  # a constraint
            database.execute(f"update {table} set {column} = ?", (value,))
            database.commit()
    return f"{table}.{column} = {value!r}"


@given(st.text(st.characters(categories=("L", "N", "P")), min_size=3).filter(lambda word: not set(word) & set("'\"")))
def test_no_password_is_shown(word: str) -> None:
    secret = f"Zq{word}"
    assert secret not in redacted_url(
        f"postgresql+psycopg2://user:{word} {secret}'@host:5432/db?password={secret} {secret}"
    )
    assert secret not in redacted(f"cannot open postgresql+psycopg2://user:{secret}@host:5432/db: refused")
    with pytest.raises(UsageError) as raised:
        run_study(SPACE, [valid], evaluate, trials=1, storage="nothing://user:Zq%40secret@host/db")
    assert "secret" not in str(raised.value)


def test_a_child_imports_nothing_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("queue", "json", "mctune", "tempfile"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    monkeypatch.chdir(tmp_path)
    for first in ("", str(tmp_path)):
        monkeypatch.setattr(sys, "path", [first, *(path for path in sys.path if path not in ("", str(tmp_path)))])
        assert search_path()[-1] == str(tmp_path)
        assert subprocess.run(command("mctune", "--version")).returncode == 0
    assert capfd.readouterr().out.count("mctune ") == 2


def test_what_is_remembered_of_drawn_points_is_bounded() -> None:
    space = SearchSpace((Int("x", range(400)), Int("y", range(400))))
    feasible = Feasible(space, [lambda config: sum(value for _, value in config.items) % 2 == 0])  # type: ignore[misc]
    assert not feasible.settled
    for x in range(400):
        for y in range(0, 400, 4):
            assert ((x, y) in feasible) == ((x + y) % 2 == 0)
    assert len(feasible._asked) <= _ASKED_MOST
