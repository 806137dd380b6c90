"""`make gpu` without a GPU: what it unpacks, what it refuses, and how its stages end."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
OWN = f"cp{sys.version_info.major}{sys.version_info.minor}"


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
    # Again: it is there now.
    on_gpu.unpack_missing(tmp_path / "nowhere", site)


@pytest.mark.parametrize(
    ("tag", "said"), [(None, "has no wheel of it;"), ("cp27-cp27mu-any", "cp27-cp27mu-any.whl is for another python")]
)
def test_what_nobody_has_is_named_with_the_remedy(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str | None, said: str
) -> None:
    monkeypatch.setattr(on_gpu, "NEEDED", {"planted_absent": "planted_absent"})
    if tag:
        wheel(tmp_path / "wheels", "planted_absent", tag)
    with pytest.raises(SystemExit) as ended:
        on_gpu.unpack_missing(tmp_path / "wheels", tmp_path / "site")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert "planted_absent is missing" in str(ended.value) and said in str(ended.value)
    assert f"make wheelhouse PYTHON_OF_GPU={python}" in str(ended.value)


def test_every_wheel_that_may_be_needed_is_fetched(on_gpu: ModuleType) -> None:
    text = (BENCHMARKS.parent / "Makefile").read_text()
    listed = text.split("WHEELS := ")[1].split("\n\n")[0].replace("\\\n", " ").split()
    fetched = {name.partition("==")[0].replace("-", "_") for name in listed}
    assert fetched == {wheel for wheel in on_gpu.NEEDED.values() if wheel}


def test_stages_are_logged_and_end(on_gpu: ModuleType, tmp_path: Path) -> None:
    run = on_gpu.Run(tmp_path, minutes=1.0)
    assert 55 < run.left <= 60
    assert run.stage("good", "-c", "print('hello'); import mctune, sys; print(mctune.__file__)") == 0
    assert run.stage("bad", "-c", "raise SystemExit('planted')") == 1
    assert run.stage("hangs", "-c", "print('begun', flush=True); import time; time.sleep(60)", limit_s=3.0) != 0
    assert run.failed == ["bad", "hangs"]
    log = (tmp_path / "log.txt").read_text()
    for text in ("hello", str(BENCHMARKS.parent / "mctune"), "planted", "begun", "killed after 3 s", "== good: exit 0"):
        assert text in log


def test_without_a_gpu_it_says_so(on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mctune.search import presence

    monkeypatch.setattr(presence, "seen", lambda: None)
    with pytest.raises(SystemExit, match=r"there is no GPU here that `mctune targets` lists; --rehearse needs none"):
        on_gpu.stages(on_gpu.Run(tmp_path, minutes=1.0), rehearse=False)
