"""benchmarks/gpu.py, rehearsed: checked, timed, written row by row, gone on with, and read by `mctune report`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mctune.core.target import resolve
from mctune.report.rows import read_csv
from mctune.report.write import read_document, write_results

BENCHMARKS = Path(__file__).parent.parent.parent.parent / "benchmarks"
TARGET, _ = resolve("h200")


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu

        yield gpu
        for name in ("gpu", "gpu_contenders", "gpu_report"):
            del sys.modules[name]


def tiny(gpu: ModuleType, kind: str) -> Any:
    return gpu.Shape(kind, 1, 41, 1, 16, 16, "float16")


@pytest.mark.parametrize("kind", ["forward", "training", "decode"])
def test_what_is_right_is_timed_and_what_is_not_is_left_out(
    gpu: ModuleType, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [
        c for c in gpu.contenders(tiny(gpu, kind), TARGET, None, tmp_path) if "grm" in c.name or "flash" in c.name
    ]
    ours = next(c for c in chosen if c.name == "mctune grm, defaults")

    def off(shape: Any, data: Any) -> Any:
        call = ours.make(shape, data)
        return lambda: {name: 1.05 * x for name, x in call().items()}

    wrong = replace(ours, name="mctune grm, planted", make=off)
    monkeypatch.setattr(gpu, "contenders", lambda *_: [*chosen, wrong])
    found = gpu.measured(tiny(gpu, kind), TARGET, None, tmp_path, rounds=2)
    said = capsys.readouterr().err
    assert re.search(r"mctune grm, planted left out: MctuneError: wrong: error (4\.9|5\.0)\de-02 over [25]e-03", said)
    times = {timing.name: timing for timing in found}
    narrow_ = {"mctune grm, 16-bit states"} if kind == "decode" else set()
    assert set(times) == {"mctune grm, defaults", "sdpa, flash"} | narrow_
    grm = times["mctune grm, defaults"]
    assert grm.timed.ms > 0 and grm.host_ms > 0 and 0 < grm.timed.error < 2e-3 and grm.config
    reached = gpu.Rates(1e12, 1e11)
    fraction = sys.modules["gpu_report"].fraction
    assert fraction(tiny(gpu, kind), grm, reached) > 0
    assert fraction(tiny(gpu, kind), times["sdpa, flash"], reached) is None
    if kind == "decode":
        narrow = times["mctune grm, 16-bit states"]
        assert grm.timed.error < narrow.timed.error < 2e-3
        at_once = replace(narrow, timed=grm.timed)
        assert fraction(tiny(gpu, kind), at_once, gpu.Rates(1e15, 1e11)) < fraction(
            tiny(gpu, kind), grm, gpu.Rates(1e15, 1e11)
        )


def test_rows_are_kept_and_reported(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = tiny(gpu, "forward")
    some = [c for c in gpu.contenders(shape, TARGET, None, tmp_path) if "base" in c.name or "flash" in c.name]
    monkeypatch.setattr(gpu, "contenders", lambda *_: some)
    monkeypatch.setattr(gpu, "shapes", lambda small: [shape])
    monkeypatch.setattr(gpu, "warm", lambda *_: None)
    out = tmp_path / "benchmark.json"
    options = argparse.Namespace(out=out, package=None, small=True, budget=None, rounds=2)
    gpu.run(options)
    written = out.with_suffix(".jsonl").read_text()
    monkeypatch.setattr(gpu, "measured", lambda *_: pytest.fail("it is measured already"))
    gpu.run(options)
    assert out.with_suffix(".jsonl").read_text() == written
    # Another package: the decisive shapes are measured again, others are not.
    made_by = {**gpu.identity(None), "package": "another"}
    assert gpu.read_rows(out.with_suffix(".jsonl"), made_by, [shape]) == {}
    assert list(gpu.read_rows(out.with_suffix(".jsonl"), made_by, [])) == [shape]
    assert gpu.read_rows(out.with_suffix(".jsonl"), {**made_by, "gpu": "another"}, []) == {}
    data = json.loads(out.read_text())
    assert "rehearsal" in data["environment"]
    (row,) = data["rows"]
    assert (
        row["backend"] == "triton, defaults" and set(row["baselines"]) == {"sdpa, flash"} and row["how"] == "measured"
    )
    (folder,) = write_results([read_document(out)], tmp_path / "results")
    (read,) = read_csv(folder / "rows.csv")
    assert read.fraction_of_bound is not None and read.best_baseline is not None


def test_goals_are_of_the_figures(gpu: ModuleType) -> None:
    def timings(**ms: float) -> list[Any]:
        return [
            gpu.Timing(name, computes, gpu.Timed(time, time, time, 9, 0.0), 0.1, {})
            for (name, computes), time in zip(
                [("mctune grm, defaults", "grm"), ("mctune ssc", "ssc"), ("mctune base", "base"), ("sdpa, flash", ""),
                 ("fla chunk_simple_gla", "")], ms.values(), strict=True,
            )
        ]  # fmt: skip

    def shape(kind: str, T: int) -> Any:
        return gpu.Shape(kind, 1, T, 16, 128, 256)

    found = {
        shape("training", 16384): timings(grm=2.0, ssc=1.5, base=1.0, flash=5.2, fla=0.9),
        shape("training", 65536): timings(grm=20.0, ssc=5.0, base=4.0, flash=90.0, fla=4.0),
        shape("decode", 16385): timings(grm=0.02, ssc=0.01, base=9.0, flash=0.035, fla=9.0),
    }
    judged = {goal["name"].split(",")[0]: goal for goal in gpu.goals(found, gpu.Rates(8e14, 4e12))}
    assert [goal["met"] for goal in judged.values()] == [True, False, True, False]
    assert [round(goal["figure"], 3) for goal in judged.values()] == [2.6, 0.9, 1.2, 1.75]


def test_the_decisive_shapes_come_first_and_none_twice(gpu: ModuleType) -> None:
    every = list(gpu.shapes(False))
    assert len(every) == len(set(every)) == 2 * 7 * 2 * 4 + 4
    assert str(every[0]) == "training B1 T16384 H16 D128 C256 bfloat16" and every[3].kind == "decode"
