"""Calibration finds the parameters that times were made with, and refuses what is too little."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from mctune.backends.protocol import Launch
from mctune.backends.triton.cost.calibrated import FILE, calibration, read_calibration, write_calibration
from mctune.backends.triton.cost.opcodes import Mix
from mctune.backends.triton.cost.parameters import Parameters
from mctune.backends.triton.cost.predict import Demand
from mctune.cli import main
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted, Timed, TooLarge
from mctune.core.problem import Problem
from mctune.core.space import Int, SearchSpace
from mctune.core.target import resolve
from mctune.report.rows import Row, write_csv
from mctune.report.write import read_document, write_results
from mctune.study import calibrate as module
from mctune.study.calibrate import LEAST, Measured, Sample, calibrate, compiled, measured_in_storage
from mctune.study.study import run_study

H100 = resolve("h100-sxm")[0]
GRM = Problem(T=4096, H=4, Dk=64, Dv=64, segment_length=256)
TRUTH = replace(Parameters(), matrix=0.4, dram=0.6, launch_us=9.0)


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """No calibration but the test's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mctune.backends.triton.cost.calibrated.search_spaces_dir", lambda: tmp_path / "none")


def demand(draw: random.Random) -> Demand:
    mix = Mix(
        matrix=10 ** draw.uniform(5, 8.5), issue=10 ** draw.uniform(3, 5), loaded=10 ** draw.uniform(3, 6),
        stored=1e4, shared=10 ** draw.uniform(4, 6),
    )  # fmt: skip
    chain = (mix.issue / 8, 4.0, 6.0)
    return Demand("k", mix, mix, chain, chain, draw.choice((132, 500, 2000)), True, 2, 8, 1e9)


def samples(count: int, truth: Parameters = TRUTH, noise: float = 0.0) -> list[Sample]:
    draw, made = random.Random(0), []
    for number in range(count):
        sample = Sample(Measured(GRM, Config.of({"x": number}), 1.0), (demand(draw), demand(draw)))
        ms = sample.predicted(H100, truth) * math.exp(draw.gauss(0, noise))
        made.append(replace(sample, measured=replace(sample.measured, ms=ms)))
    return made


def test_times_made_by_the_model_are_found_again() -> None:
    fitted = calibrate(samples(60), H100)
    (_, before), (_, after) = fitted.judged(fitted.before)[0], fitted.judged(fitted.after)[0]
    assert before.factor > 1.3 and after.factor < 1.03
    assert after.spearman is not None and before.spearman is not None and after.spearman >= before.spearman
    assert after.spearman > 0.99 and after.regret == 1.0
    assert fitted.after.matrix == pytest.approx(TRUTH.matrix, rel=0.15)
    assert fitted.after.launch_us == pytest.approx(TRUTH.launch_us, rel=0.15)


def test_what_is_right_already_stays() -> None:
    fitted = calibrate(samples(20, Parameters()), H100)
    for name in module.FITTED:
        assert getattr(fitted.after, name) == pytest.approx(getattr(Parameters(), name), rel=1e-3)


def test_noise_does_not_run_away() -> None:
    fitted = calibrate(samples(LEAST, noise=0.3), H100)
    for name in module.FITTED:
        assert 1 / 8.1 < getattr(fitted.after, name) / getattr(Parameters(), name) < 8.1


def test_too_few_are_refused() -> None:
    with pytest.raises(UsageError, match=f"7 measured rows .* for h100-sxm; calibrating takes at least {LEAST}"):
        calibrate(samples(7), H100)
    with pytest.raises(UsageError, match="0 measured rows for h100-sxm"):
        compiled([], H100, Path("x"))
    with pytest.raises(UsageError, match="nothing to calibrate"):
        compiled([], resolve("cpu")[0], Path("x"))


def test_a_calibration_is_read_back(tmp_path) -> None:
    assert calibration(H100) == (Parameters(), False)
    path = tmp_path / "results" / "h100-sxm" / FILE
    write_calibration(path, TRUTH, "about it")
    assert path.read_text().startswith("# about it\n[parameters]\n") and "issue" not in path.read_text()
    assert calibration(H100) == (TRUTH, True)
    assert calibration(resolve("h200")[0]) == (Parameters(), False)
    path.write_text("[parameters]\nmatrix = 0.123456\n")
    assert calibration(H100)[0].matrix == 0.123456


@pytest.mark.parametrize(("text", "message"), [("speed = 1.0", "no parameter 'speed'"), ("matrix = -1", "positive")])
def test_a_calibration_that_is_refused(tmp_path, text: str, message: str) -> None:
    (tmp_path / FILE).write_text(f"[parameters]\n{text}\n")
    with pytest.raises(UsageError, match=message):
        read_calibration(tmp_path / FILE)


class Backend:
    """Compiles nothing: ``x`` is how much a kernel does; 0 does not fit, 1 does not compile."""

    name = "triton"

    def ready(self, here: bool = True) -> None:
        pass

    def build(self, problem, config, target, folder):
        return config

    def compile(self, problem, config, built, target):
        x = config.integer("x")
        if x == 0:
            return TooLarge("needs 2 of 1", 2, 1, "B")
        if x == 1:
            raise RuntimeError("no such thing\nat line 3")
        body = "fma.rn.f32 %r1, %r2, %r3, %r4;\n" * (200 * x)
        asm = f".entry k()\n{{\n{body}ret;\n}}\n"
        return (Launch("k", (1320, 1, 1), 4, 2, 32, 0, 64, 0, asm, b"", (), ()),)


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(module, "get_backend", lambda name: Backend())


def row(x: int, ms: float, target: str = "h100-sxm") -> Row:
    return Row.of(target, GRM, "triton", Config.of({"x": x}), Timed(ms, ms, ms, 9, 1e-4))


def test_what_does_not_compile_is_left_out_and_said(backend) -> None:
    notes: list[str] = []
    rows = [Measured(GRM, Config.of({"x": x}), 1.0) for x in range(10)]
    assert len(compiled(rows, H100, Path("build"), notes.append)) == 8
    assert "needs 2 of 1" in notes[0] and notes[1].endswith("no such thing")
    with pytest.raises(UsageError, match="7 measured rows that compile"):
        compiled(rows[:9], H100, Path("build"))


def test_the_command(backend, tmp_path, capsys) -> None:
    write_csv(tmp_path / "rows.csv", [*(row(x, 0.02 * x) for x in range(2, 14)), row(2, 1.0, "h200")])
    assert main(["calibrate", "rows.csv", "--gpu", "h100"]) == 0
    out, err = capsys.readouterr()
    assert "rank correlation" in out and "1.00 -> 1.00" in out and " 12 " in out
    assert "h100 means h100-sxm" in err and "12 times" in err
    assert calibration(H100)[1]
    assert main(["calibrate", "rows.csv", "--gpu", "h200"]) == 2
    assert "1 measured rows for h200" in capsys.readouterr().err


def test_the_json_is_what_report_reads(backend, tmp_path, capsys) -> None:
    write_csv(tmp_path / "rows.csv", [row(x, 0.02 * x) for x in range(2, 14)])
    assert main(["calibrate", "rows.csv", "--gpu", "h100-sxm", "--json"]) == 0
    (tmp_path / "both.json").write_text(capsys.readouterr().out)
    rows = json.loads((tmp_path / "both.json").read_text())["rows"]
    assert [row["how"] for row in rows].count("predicted") == [row["how"] for row in rows].count("measured") == 12
    (folder,) = write_results([read_document(tmp_path / "both.json")], tmp_path / "out")
    text = (folder / "README.md").read_text()
    assert "## Accuracy of the cost model" in text and "| 12 " in text
    assert "rows are predicted" not in text


def test_a_storage_of_searches_that_measured(tmp_path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    space = SearchSpace((Int("segment_length", (64, 128)), Int("x", range(3))))
    fields = {name: value for name, value in GRM.to_dict().items() if name != "segment_length"}

    def outcome(config: Config) -> Timed | TooLarge:
        x = config.integer("x")
        return Timed(1.0 + x, 1.0, 2.0, 9, 1e-4) if x else TooLarge("m", 2, 1, "B")

    for name, how, target in (("a", "measured", "h100-sxm"), ("b", "predicted", "h100-sxm"), ("c", "measured", "l4")):
        attrs = {"how": how, "target": [target, "t", "sm", 1], "backend": {"name": "triton"}, "problem": fields}
        told = outcome if how == "measured" else lambda config: Predicted(1.0, "m")
        run_study(space, [lambda config: True], told, trials=6, storage=url, study_name=name, attrs=attrs)
    found = list(measured_in_storage(url, H100))
    assert len(found) == 4
    for backend, problem, config, timed in found:
        assert backend == "triton" and timed.ms == 1.0 + config.integer("x")
        assert problem == GRM.replace(segment_length=config.integer("segment_length"))
