"""`make gpu` without a GPU: what it unpacks, what it refuses, and how its stages end."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
OWN = f"cp{PYTHON.replace('.', '')}"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    import on_gpu

    yield on_gpu
    del sys.modules["on_gpu"]


def wheel(folder: Path, name: str, tag: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as file:
        file.writestr(f"{name}.py", f"TAG = {tag!r}\n")


def test_what_is_missing_comes_out_of_the_wheelhouse(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        on_gpu, "NEEDED", {"json": "json", "planted_pure": "planted_pure", "planted_own": "planted_own"}
    )
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheel(wheels, "json", "py3-none-any")
    wheel(wheels, "planted_pure", "py3-none-any")
    wheel(wheels, "planted_own", "cp27-cp27mu-manylinux2014_x86_64")
    wheel(wheels, "planted_own", f"{OWN}-{OWN}-manylinux2014_x86_64")
    on_gpu.unpack_missing(wheels, site)
    assert sorted(path.name for path in site.iterdir()) == ["planted_own.py", "planted_pure.py"]
    import planted_own  # type: ignore[import-not-found]

    assert planted_own.TAG.startswith(OWN)
    # The second time it is there.
    on_gpu.unpack_missing(tmp_path / "nowhere", site)


@pytest.mark.parametrize(
    ("tag", "said"), [(None, ";"), ("cp27-cp27mu-any", " (planted_absent-1.0-cp27-cp27mu-any.whl is for another")]
)
def test_what_nobody_has_is_named_with_the_remedy_and_the_rest_is_unpacked(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str | None, said: str
) -> None:
    needed = {"planted_theirs": ""} | {f"planted_{name}": f"planted_{name}" for name in ("absent", "cut", "late")}
    monkeypatch.setattr(on_gpu, "NEEDED", needed)
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    if tag:
        wheel(wheels, "planted_absent", tag)
    for name in ("planted_cut", "planted_late"):
        wheel(wheels, name, "py3-none-any")
    cut = wheels / "planted_cut-1.0-py3-none-any.whl"
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(SystemExit) as ended:
        on_gpu.unpack_missing(wheels, site)
    told = str(ended.value)
    assert f"planted_absent is missing and {wheels} has no wheel of it for python {PYTHON}{said}" in told
    assert "planted_cut-1.0-py3-none-any.whl is for another python, or broken" in told
    assert told.count(f"`make wheelhouse PYTHON_OF_GPU={PYTHON}`") == 1 and told.endswith("for this python")
    assert "planted_theirs is missing" in told and "install planted_theirs;" in told and len(told.splitlines()) == 1
    assert [path.name for path in site.iterdir()] == ["planted_late.py"]


def test_every_wheel_that_may_be_needed_is_fetched(on_gpu: ModuleType) -> None:
    text = (BENCHMARKS.parent / "Makefile").read_text()
    listed = text.split("WHEELS := ")[1].split("\n\n")[0].replace("\\\n", " ").split()
    fetched = {name.partition("==")[0].replace("-", "_") for name in listed}
    assert fetched == {wheel for wheel in on_gpu.NEEDED.values() if wheel}


@pytest.mark.alone
def test_stages_are_logged_and_end(on_gpu: ModuleType, tmp_path: Path) -> None:
    run = on_gpu.Run(tmp_path, minutes=1.0)
    assert 55 < run.left <= 60
    assert run.stage("good", "-c", "print('hello'); import mctune, sys; print(mctune.__file__)") == 0
    assert run.stage("bad", "-c", "raise SystemExit('planted')") == 1
    assert run.stage("hangs", "-c", "print('begun', flush=True); import time; time.sleep(60)", limit_s=3.0) != 0
    split = "import os, time; os.write(1, b'\\xc3'); time.sleep(0.5); os.write(1, b'\\xa9 \\xff')"
    assert run.stage("split", "-c", split) == 0
    assert run.failed == ["bad", "hangs"]
    log = (tmp_path / "log.txt").read_text()
    for text in (
        "hello",
        str(BENCHMARKS.parent / "mctune"),
        "planted",
        "begun",
        "ended after 3 s",
        "== good: exit 0",
        "é \ufffd",
    ):
        assert text in log


def test_without_a_gpu_it_says_so(on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mctune.backends import presence

    monkeypatch.setattr(presence, "seen", lambda: None)
    with pytest.raises(SystemExit, match=r"there is no GPU here that `mctune targets` lists; --rehearse needs none"):
        on_gpu.Stages(on_gpu.Run(tmp_path, minutes=1.0), rehearse=False)


@pytest.mark.alone
def test_a_stage_is_asked_to_end_then_killed(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(on_gpu, "ASKED_S", 1.0)
    run = on_gpu.Run(tmp_path, minutes=1.0)
    # A shell ignores Ctrl-C for background jobs, and the stage would inherit that.
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own))
    wait = "print('begun', flush=True)\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    "
    assert run.stage("polite", "-c", f"import time\n{wait}print('left what it had')", limit_s=2.0) == 0
    deaf = "import signal, time\nsignal.signal(2, lambda *_: print('asked', flush=True))\nwhile True: time.sleep(1)"
    assert run.stage("deaf", "-c", deaf, limit_s=2.0) == -9
    log = (tmp_path / "log.txt").read_text()
    assert "left what it had" in log and log.splitlines().count("asked") == on_gpu.ASKED


def test_the_time_is_shared_by_the_stages_to_come(on_gpu: ModuleType, tmp_path: Path) -> None:
    run = on_gpu.Run(tmp_path, minutes=10.0, chosen=("verify", "search", "report"))
    run.to_come.pop(0)
    part = on_gpu.SHARES["verify"] / (on_gpu.SHARES["verify"] + on_gpu.SHARES["search"])
    assert run.share("verify") == pytest.approx(part * (600 - on_gpu.FINISH_S), abs=1)
    run.to_come.pop(0)
    assert run.share("search") == pytest.approx(600 - on_gpu.FINISH_S, abs=1)
    assert set(on_gpu.SHARES) | {"faults", "report"} == set(on_gpu.STAGES)
    assert all(callable(getattr(on_gpu.Stages, name)) for name in on_gpu.STAGES)


def test_what_must_be_brought_back_is_in_one_archive_after_every_stage(on_gpu: ModuleType, tmp_path: Path) -> None:
    run = on_gpu.Run(tmp_path, minutes=1.0)
    for name in ("held.jsonl", "study.db", "mctune_h200/tuned.json", "mctune_h200/search/kernels/x.py", "site/x.py",
                 "triton/x", "results/h200/rows.csv"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for number in (1, 2):
        run.stage(f"stage{number}", "-c", f"open({str(tmp_path)!r} + '/benchmark.jsonl', 'a').write('{number}')")
        with tarfile.open(tmp_path / on_gpu.ARCHIVE) as archive:
            names = {entry.name for entry in archive if entry.isfile()}
            rows = archive.extractfile("benchmark.jsonl")
            assert rows is not None and rows.read() == b"12"[:number]
        assert names == {"log.txt", "held.jsonl", "benchmark.jsonl", "study.db", "mctune_h200/tuned.json",
                         "results/h200/rows.csv"}  # fmt: skip


def test_results_are_copied_while_a_stage_runs(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "COPY_S", 0.05)
    out, to = tmp_path / "gpu #1?%41", tmp_path / "OUT"
    run = on_gpu.Run(out, minutes=1.0, copy_to=to)
    with contextlib.closing(sqlite3.connect(out / "study.db")) as database:
        database.execute("create table trials (value)")
        database.execute("insert into trials values (1)")
        database.commit()
        # Another process is in the middle of writing.
        database.execute("insert into trials values (2)")
        (out / "held.jsonl").write_text("{}")
        (out / "site").mkdir()
        wait = f"import os, time\nwhile not os.path.exists({str(to / 'study.db')!r}): time.sleep(0.05)"
        assert run.stage("search", "-c", wait, limit_s=60.0) == 0
    with contextlib.closing(sqlite3.connect(to / "study.db")) as database:
        assert database.execute("select value from trials").fetchall() == [(1,)]
    assert {path.name for path in to.iterdir()} >= {"study.db", "held.jsonl", "log.txt", on_gpu.ARCHIVE}
    assert len({*on_gpu.COPIED, on_gpu.DATABASE}) <= 8
    assert "search: exit 0" in (to / "log.txt").read_text()
