"""`mctune bench` on a GPU, rehearsed: checked, timed, written row by row, gone on with, and read by `mctune report`."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mctune.core.target import resolve
from mctune.report.rows import read_csv
from mctune.report.write import read_document, write_results

ROOT = Path(__file__).parent.parent.parent.parent
TARGET, _ = resolve("h200")


def tiny(gpu: ModuleType, kind: str) -> Any:
    return gpu.Shape(kind, 1, 41, 1, 16, 16, "float16")


@pytest.mark.parametrize("kind", ["forward", "training", "decode"])
def test_what_is_right_is_timed_and_what_is_not_is_left_out(
    gpu: ModuleType, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [
        c for c in gpu.contenders(tiny(gpu, kind), TARGET, None, tmp_path) if "grm" in c.name or "flash" in c.name
    ]
    ours = next(c for c in chosen if c.name == "mctune grm, defaults")

    def off(shape: Any, data: Any) -> Any:
        call = ours.make(shape, data)
        return lambda: {name: 1.05 * x for name, x in call().items()}

    wrong = replace(ours, name="mctune grm, planted", make=off)
    trying = gpu.Trying(tmp_path / "trying")
    found = gpu.measured(tiny(gpu, kind), [*chosen, wrong], 2, trying)
    assert trying.now() is None
    said = capsys.readouterr().err
    assert re.search(r"mctune grm, planted left out: MctuneError: wrong: error (4\.9|5\.0)\de-02 over [25]e-03", said)
    times = {timing.name: timing for timing in found}
    narrow_ = {"mctune grm, 16-bit states"} if kind == "decode" else set()
    assert set(times) == {"mctune grm, defaults", "sdpa, flash"} | narrow_
    grm = times["mctune grm, defaults"]
    assert grm.timed.ms > 0 and grm.host_ms > 0 and 0 < grm.timed.error < 2e-3 and grm.config
    reached = gpu.Rates(1e12, 1e11)
    fraction = sys.modules["mctune.measure.gpu.goals"].fraction
    assert fraction(tiny(gpu, kind), grm, reached) > 0
    assert fraction(tiny(gpu, kind), times["sdpa, flash"], reached) is None
    if kind == "decode":
        narrow = times["mctune grm, 16-bit states"]
        assert grm.timed.error < narrow.timed.error < 2e-3
        at_once = replace(narrow, timed=grm.timed)
        assert fraction(tiny(gpu, kind), at_once, gpu.Rates(1e15, 1e11)) < fraction(
            tiny(gpu, kind), grm, gpu.Rates(1e15, 1e11)
        )


def test_what_the_contenders_are_given(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, other, shape = (
        sys.modules["mctune.measure.gpu.contenders"],
        sys.modules["mctune.measure.gpu.others"],
        tiny(gpu, "forward"),
    )
    data, given = module.Data.of(shape), dict[str, Any]()

    def log_linear(q: Any, k: Any, v: Any, g: Any, scales: Any, scale: None) -> Any:
        given["scales"] = scales
        return v, None

    fla = ModuleType("fla.ops.log_linear_attn")
    fla.chunk_log_linear_attn = log_linear  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fla.ops.log_linear_attn", fla)
    other.fla_log_linear(shape, data)()
    # Its kernels multiply q by them; a sequence of 41 has 7 levels.
    assert given["scales"].dtype == data.q.dtype and given["scales"].shape == (1, 41, 1, 7)
    monkeypatch.setattr(other.torch, "compile", lambda function, **options: given.update(options) or function)
    other.compiled("grm")(shape, data)
    assert given["dynamic"] is False
    # A package that has no kernel for a step: the defaults show what states in 16 bits give.
    monkeypatch.setattr(module, "_tuned", lambda *_: None)
    step, package = tiny(gpu, "decode"), tmp_path / "package"
    assert module.Kernels("grm", TARGET, package, tmp_path, narrow=True).config(step)
    with pytest.raises(gpu.MctuneError, match="has no kernel for decode"):
        module.Kernels("grm", TARGET, package, tmp_path).config(step)


def options_of(out: Path, **others: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"out": out, "package": None, "small": True, "budget": None, "rounds": 2,
                                 "again": False, **others})  # fmt: skip


class Planted:
    """Contenders of a tiny forward that do at once what ``does`` says, and what was asked to be compiled."""

    def __init__(self, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, **does: Any) -> None:
        self.gpu, self.does, self.warmed = gpu, does, list[list[str]]()
        self.shape, self.cut_off = tiny(gpu, "forward"), dict[Any, str]()
        monkeypatch.setattr(gpu, "contenders", lambda *_: [self.contender(name) for name in self.does])
        monkeypatch.setattr(gpu, "shapes", lambda small: [self.shape])
        monkeypatch.setattr(gpu, "warm", self.warm)

    def contender(self, name: str) -> Any:
        late = name.startswith("torch")
        return self.gpu.Contender(name, "grm" if late or "grm" in name else "", self.make(name), late=late)

    def make(self, name: str) -> Any:
        ours = sys.modules["mctune.measure.gpu.contenders"].eager

        def make(shape: Any, data: Any) -> Any:
            call = ours(shape, data, "grm")
            turns = iter(self.does[name] if isinstance(self.does[name], list) else [])

            def run() -> Any:
                error = next(turns, None) if isinstance(self.does[name], list) else self.does[name]
                if error is not None:
                    raise error
                return call()

            return run

        return make

    def warm(self, chosen: Any, package: Any, small: bool, limit_s: float) -> dict[Any, str]:
        self.warmed.append([contender.name for _, contender in chosen])
        return {(shape, one.name): self.cut_off[one.name] for shape, one in chosen if one.name in self.cut_off}


def names_in(gpu: ModuleType, out: Path) -> list[str]:
    found = gpu.Record.read(out.with_suffix(".jsonl"), gpu.identity(None), []).everything()
    return [timing.name for timings in found.values() for timing in timings]


def test_what_takes_longest_to_compile_comes_last(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = Planted(gpu, monkeypatch, **{"mctune grm": None, "sdpa": None, "torch.compile": None})
    out = tmp_path / "benchmark.json"
    assert gpu.run(options_of(out)) == 0
    assert planted.warmed == [["mctune grm", "sdpa"], ["mctune grm", "torch.compile"]]
    assert names_in(gpu, out) == ["mctune grm", "sdpa", "torch.compile"]
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row["baselines"]) == {"sdpa", "torch.compile"}
    # Another package is no reason to compile it again.
    late = gpu.Record.read(out.with_suffix(".jsonl"), {**gpu.identity(None), "package": "x"}, [planted.shape])
    assert not late.found and [t.name for t in late.late[planted.shape]] == ["torch.compile"]
    gpu.run(options_of(out))
    assert len(planted.warmed) == 2


def test_what_does_not_compile_in_time_is_left_out(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = Planted(gpu, monkeypatch, **{"mctune grm": None, "sdpa": None, "torch.compile": None})
    planted.cut_off = {"torch.compile": "not compiled", "sdpa": "not compiled"}
    out = tmp_path / "benchmark.json"
    # Little time: it may be tried again, and is not even begun for what takes longest.
    gpu.run(options_of(out, budget=60.0))
    assert names_in(gpu, out) == ["mctune grm"] and len(planted.warmed) == 1
    # With enough of it they are given up the second time.
    for _ in range(2):
        gpu.run(options_of(out, budget=None))
    assert names_in(gpu, out) == ["mctune grm"] and len(planted.warmed) == 5
    gpu.run(options_of(out, budget=None))
    assert len(planted.warmed) == 5 and "left out: torch.compile at forward" in capsys.readouterr().out


STICKY = "CUDA error: an illegal memory access was encountered\nadvice\nTORCH_USE_CUDA_DSA"


@pytest.mark.parametrize("text", [STICKY, "Triton Error [CUDA]: an illegal memory access was encountered"])
@pytest.mark.parametrize("turns", [0, 3])
def test_after_a_fault_another_process_goes_on_without_it(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, turns: int
) -> None:
    faults = [*[None] * turns, RuntimeError(text)]
    Planted(gpu, monkeypatch, **{"mctune grm": None, "fla": faults, "sdpa": None})
    out = tmp_path / "benchmark.json"
    assert gpu.run(options_of(out)) == gpu.AGAIN and not out.is_file()
    assert gpu.run(options_of(out)) == 0
    assert names_in(gpu, out) == ["mctune grm", "sdpa"]


def test_what_has_no_room_beside_the_others_is_left_out(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_room = [None, None, RuntimeError("CUDA out of memory. Tried\nto allocate\nthe last line")]
    Planted(gpu, monkeypatch, **{"mctune grm": None, "fla": no_room, "sdpa": None})
    out = tmp_path / "benchmark.json"
    assert gpu.run(options_of(out)) == 0 and names_in(gpu, out) == ["mctune grm", "sdpa"]
    assert "fla left out: RuntimeError: CUDA out of memory. Tried ... the last line" in capsys.readouterr().err
    # Nor does a shape that has none at all end it.
    monkeypatch.setattr(sys.modules["mctune.measure.gpu.timings"], "clock_and_heat", lambda _: [][1])
    (tmp_path / "benchmark.jsonl").unlink()
    assert gpu.run(options_of(out)) == 0 and names_in(gpu, out) == []
    assert "everything at forward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("inside", "bad", "status"),
    [
        ("os.abort()", ["it ended its process: SIGABRT"], 0),
        ("time.sleep(60)", ["it ended its process: SIGKILL"], 0),
        ("trying.end(); record.leave_out(shape, {'planted': 'CUDA error'}); sys.exit(75)", ["CUDA error"], 0),
        ("trying.end(); sys.exit(3)", [], 3),
        ("trying.end(); os.abort()", [], 1),
    ],
)
def test_what_ends_the_process_is_recorded_and_the_others_go_on(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, bad: list[str], status: int
) -> None:
    supervise = sys.modules["mctune.measure.gpu.supervise"]
    script, out = tmp_path / "script.py", tmp_path / "benchmark.json"
    script.write_text(
        f"import os, sys, time; from pathlib import Path; sys.path.insert(0, {str(ROOT)!r})\n"
        "from mctune.measure.gpu.shapes import Shape; from mctune.measure.gpu.record import Record, Trying\n"
        f"out = Path({str(out)!r}); trying = Trying(out.with_suffix('.trying'))\n"
        "shape = Shape('forward', 1, 41, 1, 16, 16, 'float16')\n"
        "record = Record.read(out.with_suffix('.jsonl'), {'package': None}, [])\n"
        "assert '--inside' in sys.argv and float(sys.argv[-1]) <= 99 and bool(record.bad) == ('--again' in sys.argv)\n"
        f"trying.begin(shape, 'planted')\nif not record.bad:\n    {inside}\ntrying.end()\n"
    )
    monkeypatch.setattr(supervise, "HANG_S", 0.3)
    assert supervise.supervise([sys.executable, str(script)], 99.0, out, {"package": None}, True) == status
    found = gpu.Record.read(out.with_suffix(".jsonl"), {"package": None}, [])
    assert list(found.bad.values()) == bad and (not bad or next(iter(found.bad))[1] == "planted")
    assert not out.with_suffix(".trying").exists()


def test_ctrl_c_twice_is_once(gpu: ModuleType, tmp_path: Path) -> None:
    script, begun, told = (tmp_path / name for name in ("script.py", "begun", "told"))
    script.write_text(
        f"import signal, time\ntry:\n    open({str(begun)!r}, 'w')\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        f"    signal.signal(2, signal.SIG_IGN)\n    time.sleep(1)\n    open({str(told)!r}, 'w')\n"
        "    raise SystemExit(130)\n"
    )
    code = (
        # Whoever runs the tests in the background has it ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(ROOT)!r})\n"
        "import mctune.measure.gpu.supervise as s\n"
        f"out = Path({str(tmp_path / 'benchmark.json')!r})\n"
        f"sys.exit(s.supervise([sys.executable, {str(script)!r}], 99.0, out, {{}}, True))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.4)
        assert process.wait(30) == 130 and told.exists()
    finally:
        process.kill()
        process.wait()


def test_compiling_beforehand(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = sys.modules["mctune.measure.gpu.warm"]
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys, time\nshape, name, part, parts = json.loads(sys.argv[2])\n"
        "assert os.environ['FLA_CACHE_RESULTS'] == '0' and (part, parts) == (0, 1)\n"
        f"open({str(tmp_path)!r} + f'/{{name}} {{shape[\"T\"]}} {{shape[\"C\"]}}', 'w')\n"
        "if name == 'slow': time.sleep(60)\nif name == 'fla': raise SystemExit('planted: no such kernel')\n"
    )
    monkeypatch.setattr(module, "COMMAND", (sys.executable, str(script)))
    long, short, other = (gpu.Shape("forward", 1, T, 16, 128, C) for T, C in ((65536, 256), (16384, 256), (16384, 64)))
    made = {name: gpu.Contender(name, "", lambda *_: None, exact=name == "exact")  # type: ignore[arg-type,return-value]
            for name in ("mctune grm", "fla", "exact", "slow")}  # fmt: skip
    made["sdpa"] = replace(made["fla"], name="sdpa", built=True)
    chosen = [(shape, made[name]) for name in ("mctune grm", "fla", "exact", "sdpa") for shape in (long, short, other)]
    assert module.warm(chosen, None, False, 60.0) == {}
    ran = sorted(path.name for path in tmp_path.iterdir() if " " in path.name)
    assert ran == sorted(
        ["exact 16384 256", "exact 16384 64", "exact 65536 256", "fla 2048 256", "mctune grm 2048 256",
         "mctune grm 2048 64"]
    )  # fmt: skip
    assert "planted: no such kernel" in capsys.readouterr().err
    late = module.warm([(long, made["slow"]), (short, made["slow"])], None, False, 1.0)
    assert set(late) == {(long, "slow"), (short, "slow")} and "after 1 s" in late[long, "slow"]
    assert module.warm([(long, made["slow"])], None, True, 1.0) == {}


def test_rows_are_kept_and_reported(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = tiny(gpu, "forward")
    some = [c for c in gpu.contenders(shape, TARGET, None, tmp_path) if "base" in c.name or "flash" in c.name]
    monkeypatch.setattr(gpu, "contenders", lambda *_: some)
    monkeypatch.setattr(gpu, "shapes", lambda small: [shape])
    monkeypatch.setattr(gpu, "warm", lambda *_: {})
    out = tmp_path / "benchmark.json"
    options = options_of(out)
    assert gpu.run(options) == 0
    written = out.with_suffix(".jsonl").read_text()
    monkeypatch.setattr(gpu, "measured", lambda *_: pytest.fail("it is measured already"))
    gpu.run(options)
    assert out.with_suffix(".jsonl").read_text() == written
    # Another package: the decisive shapes are measured again, others are not.
    made_by = {**gpu.identity(None), "package": "another"}
    assert gpu.Record.read(out.with_suffix(".jsonl"), made_by, [shape]).found == {}
    assert list(gpu.Record.read(out.with_suffix(".jsonl"), made_by, []).found) == [shape]
    assert gpu.Record.read(out.with_suffix(".jsonl"), {**made_by, "gpu": "another"}, []).found == {}
    data = json.loads(out.read_text())
    assert "rehearsal" in data["environment"]
    (row,) = data["rows"]
    assert (
        row["backend"] == "triton, defaults" and set(row["baselines"]) == {"sdpa, flash"} and row["how"] == "measured"
    )
    (folder,) = write_results([read_document(out)], tmp_path / "results")
    (read,) = read_csv(folder / "rows.csv")
    assert read.fraction_of_bound is not None and read.best_baseline is not None


def test_the_decisive_shapes_come_first_and_none_twice(gpu: ModuleType) -> None:
    every = list(gpu.shapes(False))
    assert len(every) == len(set(every)) == 2 * 7 * 2 * 4 + 4
    assert str(every[0]) == "training B1 T16384 H16 D128 C256 bfloat16" and every[3].kind == "decode"
