"""The search command: what its options ask for, what it prints, and what it returns. The search itself is planted."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from mctune.cli._cases import cases_of, parse_problem
from mctune.cli._progress import SearchProgress
from mctune.cli.search import report_text
from mctune.core.advice import advice
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted, Timed, TimedOut, Wrong
from mctune.core.problem import AGGREGATIONS, Problem
from mctune.core.target import resolve
from mctune.core.work import cached_state_bytes, cached_states
from mctune.core.workload import Case, load_workload
from mctune.study.events import FrontierPoint, Listener, SearchReport, SearchRequest, StudyReport

FIELDS = "T=512,H=1,Dk=16,Dv=16"
GOOD = Timed(ms=1.25, low=1.2, high=1.3, repeats=9, error=1e-7)
BAD = Wrong(error=0.5, tolerance=2e-5, case="T=1")


def study(case: Case, valid: bool = True) -> StudyReport:
    points = []
    for length in case.segment_lengths if valid else ():
        problem = case.problem.replace(segment_length=length)
        config = Config.of({"BT": 16, "segment_length": length})
        points.append(FrontierPoint(problem, cached_states(problem), cached_state_bytes(problem), config, GOOD))
    counts = (("timed", len(points)), ("wrong", 2))
    return StudyReport(case, counts, tuple(points), points[0] if points else None)


class Planted:
    """Stands in for ``mctune.study.run``."""

    def __init__(self) -> None:
        self.request: SearchRequest | None = None
        self.valid, self.interrupted = True, False

    def search(self, request: SearchRequest, listener: Listener, workers: object) -> SearchReport:
        self.request = request
        studies = []
        for case in request.cases:
            listener.study_started(case, request.trials, 0)
            listener.trial_done(0, Config.of({"BT": 8}), BAD, None)
            listener.trial_done(1, Config.of({"BT": 16}), GOOD, GOOD.ms)
            listener.note("two finalists are within noise")
            studies.append(study(case, self.valid))
            listener.study_done(studies[-1])
        return SearchReport(request.target, request.out, tuple(studies), 1.0, self.interrupted)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Planted]:
    monkeypatch.chdir(tmp_path)
    stand_in, module = Planted(), ModuleType("mctune.study.run")
    module.search = stand_in.search  # type: ignore[attr-defined]
    module.ship = lambda request, report, note, workers: []  # type: ignore[attr-defined]
    module.at_work = nullcontext  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mctune.study.run", module)
    yield stand_in


def test_by_default_it_searches_the_quick_workload_for_the_cpu(run: Callable[..., Any], planted: Planted) -> None:
    ran = run("search")
    request = planted.request
    assert ran.code == 0 and request is not None
    assert request.target.name == "cpu" and len(request.cases) == 6
    assert request.out == Path("build/mctune_cpu")
    assert (request.trials, request.timeout_s, request.storage) == (12, 480, None)
    assert [case.trials for case in request.cases] == [20, None, None, None, None, None]
    assert (request.sampler, request.seed, request.max_slowdown, request.trial_timeout_s) == ("chain", 0, 1.10, 60.0)


def test_options_reach_the_request(
    run: Callable[..., Any], planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mctune.cli.search.results_dir", lambda: None)
    ran = run(
        "search", "--gpu", "h100", "--problem", FIELDS, "--segment-lengths", "64,32", "--trials", "7", "--timeout", "9",
        "--sampler", "random", "--seed", "3", "--storage", "sqlite:///x.db", "--out", str(tmp_path / "tuned_here"),
        "--max-slowdown", "1.5", "--trial-timeout", "2.5",
    )  # fmt: skip
    assert ran.code == 0 and "h100 means h100-sxm" in ran.err
    problem, out = Problem(T=512, H=1, Dk=16, Dv=16, segment_length=32, dtype="bfloat16"), tmp_path / "tuned_here"
    assert planted.request == SearchRequest(
        target=resolve("h100")[0], cases=(Case(problem, (32, 64)),), out=out, trials=7, timeout_s=9.0,
        sampler="random", seed=3, storage="sqlite:///x.db", max_slowdown=1.5, trial_timeout_s=2.5,
        measure=False,
    )  # fmt: skip


def test_an_output_directory_can_be_imported(run: Callable[..., Any], planted: Planted) -> None:
    run("search", "--gpu", "a100", "--problem", FIELDS)
    assert planted.request is not None and planted.request.out == Path("build/mctune_a100_80g")


def test_segment_lengths_replace_those_of_a_workload(run: Callable[..., Any], planted: Planted) -> None:
    run("search", "--segment-lengths", "128")
    assert planted.request is not None
    assert {case.segment_lengths for case in planted.request.cases} == {(128,)}


def test_data_on_stdout_and_progress_on_stderr(run: Callable[..., Any], planted: Planted) -> None:
    ran = run("search", "--problem", FIELDS, "--segment-lengths", "32,64")
    lines = [line.split() for line in ran.out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["32", "64"]
    assert "recommended" in lines[0] and "recommended" not in lines[1]
    assert "1.250" in lines[0] and "16" in lines[0]
    assert "trial 0 wrong: error 5.00e-01" in ran.err and "[BT=8]" in ran.err and "BT=8" not in ran.out
    assert "best 1.250 ms" in ran.err and "within noise" in ran.err and "\x1b" not in ran.err
    data = json.loads(run("search", "--problem", FIELDS, "--json").out)
    assert data["studies"][0]["recommended"]["ms"] == 1.25 and data["interrupted"] is False
    assert data["studies"][0]["outcomes"] == {"timed": 4, "wrong": 2}


@pytest.mark.parametrize("aggregation", [name for name in AGGREGATIONS if not AGGREGATIONS[name].sparse])
def test_a_dense_read_of_a_deep_memory_that_exceeds_attention_is_told(
    aggregation: str, run: Callable[..., Any], planted: Planted
) -> None:
    deep = f"T=4096,H=1,Dk=128,Dv=128,recurrence=dla,aggregation={aggregation}"
    told = run("search", "--problem", deep, "--segment-lengths", "128,256,512,1024")
    # E = 4 D = 512: 2 * 512 * 256 operations a state, and for attention 2 C * 256.
    assert told.err.splitlines()[0] == (
        "a dense read of deep memories, E512, in segments of 128, 256 tokens takes 4, 2 times the work of attention: "
        "2 E (Dk + Dv) = 262144 operations a token and state, 2 C (Dk + Dv) = 65536, 131072 for attention to its "
        "segment; take aggregation=ssc, or segments of at least E = 512 tokens"
    )
    assert told.out.count("dense read") == 0


@pytest.mark.parametrize(
    "other", ["recurrence=dla,aggregation=ssc", "recurrence=titans,expansion=1", "recurrence=linear",
              "recurrence=dla,segmentation=logarithmic"],
)  # fmt: skip
def test_other_reads_have_no_such_advice(other: str, run: Callable[..., Any], planted: Planted) -> None:
    problem = f"T=4096,H=1,Dk=128,Dv=128,{other}"
    cases, _, _ = cases_of(resolve("cpu")[0], None, problem, "128,256")
    assert advice(cases) == ()
    one_segment, _, _ = cases_of(resolve("cpu")[0], None, "T=256,H=1,Dk=128,Dv=128,recurrence=dla", "256")
    assert advice(one_segment) == ()


def test_advice_is_given_once_for_a_workload() -> None:
    (line,) = advice(load_workload("deep").cases)
    assert "E256, in segments of 128 tokens takes 2 times" in line


def test_what_the_compiler_says_of_the_recommended_one_is_told(
    run: Callable[..., Any], planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Predicted(1.25, "cost model", notes=("cached_kernel: C7515 serialized",))
    monkeypatch.setattr(sys.modules[__name__], "GOOD", noted)
    ran = run("search", "--problem", FIELDS, "--segment-lengths", "32,64")
    assert "predicted ms" in ran.out
    assert ran.out.count("the compiler on the recommended one: cached_kernel: C7515 serialized") == 1
    (told,) = json.loads(run("search", "--problem", FIELDS, "--segment-lengths", "32", "--json").out)["studies"]
    assert told["recommended"]["notes"] == list(noted.notes)


def test_nothing_valid_is_exit_4(run: Callable[..., Any], planted: Planted) -> None:
    planted.valid = False
    ran = run("search", "--problem", FIELDS)
    assert ran.code == 4
    assert "no valid configuration for cpu: 2 wrong; give more" in ran.err


def test_a_study_without_a_winner_says_why() -> None:
    case = load_workload("deep").cases[0]
    tried = StudyReport(case, (("timed", 0), ("wrong", 2), ("timed_out", 1)), (), None)
    report = SearchReport(resolve("cpu")[0], Path("out"), (tried, StudyReport(case, (), (), None)), 1.0)
    first, second = report_text(report).split("\n\n")
    assert first == f"{case}\nno valid configuration: 2 wrong, 1 timed out"
    assert second == f"{case}\nnot reached"


def test_an_interrupted_search_prints_what_it_has_and_exits_130(run: Callable[..., Any], planted: Planted) -> None:
    planted.interrupted = True
    ran = run("search", "--problem", FIELDS)
    assert ran.code == 130 and "recommended" in ran.out and "interrupted" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "h1"), "unknown target"),
        (("--workload", "fast"), "unknown workload 'fast'"),
        (("--workload", "quick", "--problem", FIELDS), "exclude each other"),
        (("--problem", "T=512"), "'Dk' is missing"),
        (("--problem", "T=512,H"), "'H' is not of the form name=value"),
        (("--problem", "{"), "not JSON"),
        (("--problem", FIELDS, "--segment-lengths", "a"), "not a list of integers"),
        (("--trials", "0"), "0 is not in the range"),
        (("--sampler", "magic"), "'magic' is not one of chain, mix, tpe, gp, cmaes, random, grid, nor module:Class"),
        (("--sampler", "optuna.samplers:"), "'optuna.samplers:' is not one of"),
        (("--max-slowdown", "0.9"), "max_slowdown=0.9"),
        (("--max-slowdown", "nan"), "max_slowdown=nan"),
        (("--timeout", "nan"), "timeout=nan"),
        (("--seed", "-1"), "-1 is not in the range"),
        (("--out", "run-1"), "'run-1' cannot be imported"),
        (("--out", "my kernels"), "'my kernels' cannot be imported"),
        (("--out", "class"), "'class' cannot be imported"),
        (("--out", "\ufb01ne"), "cannot be imported"),
        (("--out", "torch"), "'torch' is a module that is installed here"),
        (("--out", "somewhere/mctune"), "'mctune' is a module that is installed here"),
        (("--out", "json"), "'json' is a module of Python's standard library"),
        (("--out", "aten"), "torch has operators under the name 'aten'"),
        (("--out", "/proc/mctune_cpu"), "--out /proc/mctune_cpu cannot be written to"),
        (("--timeout", "0"), "timeout=0"),
        (("--trial-timeout", "-1"), "trial_timeout=-1"),
    ],
)
def test_usage_errors(run: Callable[..., Any], planted: Planted, arguments: tuple[str, ...], message: str) -> None:
    ran = run("search", *arguments)
    assert ran.code == 2 and message in ran.err
    assert planted.request is None


@pytest.mark.parametrize("name", ("README.md", "__init__.py", "tuned.json", "kernels", "runtime"))
def test_what_others_have_written_is_seen_before_the_search(
    run: Callable[..., Any], planted: Planted, name: str
) -> None:
    Path("mine").mkdir()
    Path("mine", name).write_text("{}")
    ran = run("search", "--out", "mine")
    assert ran.code == 2 and f"mine/{name} is in the way" in ran.err and planted.request is None
    assert [path.name for path in Path("mine").iterdir()] == [name]
    Path("file").write_text("")
    assert run("search", "--out", "file").code == run("search", "--out", "file/below").code == 2
    assert planted.request is None


def test_a_package_for_another_target_is_refused_before_the_search(run: Callable[..., Any], planted: Planted) -> None:
    target = resolve("a100")[0]
    Path("there").mkdir()
    known = {"name": target.name, "title": target.title, "arch": target.arch}
    Path("there", "tuned.json").write_text(json.dumps({"schema": 1, "entries": [], "target": known}))
    ran = run("search", "--out", "there")
    assert ran.code == 2 and "is a package for another target, a100-80g" in ran.err and "--replace" in ran.err
    assert planted.request is None
    assert (
        run("search", "--gpu", "a100", "--out", "there").code == run("search", "--out", "there", "--replace").code == 0
    )


def test_a_full_stdout_is_seen_before_the_search(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "mctune", "search", "--problem", FIELDS]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, stdout=full, stderr=subprocess.PIPE,
            text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "stdout cannot be written to: No space left on device" in done.stderr


def test_problems_as_text_and_as_json() -> None:
    expected = {"T": 8, "aggregation": "ssc", "top_k": 4}
    assert parse_problem("T=8,aggregation=ssc,top_k=4") == parse_problem("T=8 aggregation=ssc top_k=4") == expected
    assert parse_problem(json.dumps(expected)) == expected
    with pytest.raises(UsageError, match="name=value"):
        parse_problem("T:8")


def progress_of(terminal: bool, trials: int = 20) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, highlight=False)
    case = Case(Problem(T=512, H=1, Dk=16, Dv=16, segment_length=32), (32, 64))
    with SearchProgress(console) as progress:
        progress.study_started(case, trials, 2)
        for number in range(2, trials):
            failed = number % 2 == 0
            outcome = TimedOut(60.0, "build") if failed else GOOD
            progress.trial_done(number, Config.of({"BT": number}), outcome, None if number == 2 else 1.25)
        progress.study_done(study(case))
    return stream.getvalue()


def test_off_a_terminal_nothing_moves() -> None:
    text = progress_of(terminal=False)
    assert "\x1b" not in text and "\r" not in text
    assert "C32,64" in text and "2 done before" in text
    assert text.count("timed out: build took longer than 60 s") == 3 and "further timed out trials" in text
    assert "20/20, best 1.250 ms, 9 timed out, about 0 s left" in text
    assert len([line for line in text.splitlines() if "left" in line]) <= 12
    assert "recommended 1.250 ms" in text


def test_on_a_terminal_there_is_a_bar_without_colour_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = progress_of(terminal=True)
    assert "20/20" in coloured and "\x1b[33m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = progress_of(terminal=True)
    assert "20/20" in plain and "\x1b[33m" not in plain


def test_inner_chunks_are_studies_of_their_own_and_compared_at_the_end(
    run: Callable[..., Any], planted: Planted
) -> None:
    ran = run(
        "search", "--problem", f"{FIELDS},recurrence=titans", "--inner-chunks", "64,8", "--segment-lengths", "64,128"
    )
    assert planted.request is not None
    assert [case.problem.inner_chunk for case in planted.request.cases] == [8, 64]
    assert all(case.segment_lengths == (64, 128) for case in planted.request.cases)
    last = ran.out.split("\n\n")[-1].splitlines()
    assert " b8,64 " in last[0] and last[1].split() == ["inner", "chunk", "segment", "ms"]
    assert [line.split() for line in last[2:4]] == [["8", "64", "1.250"], ["64", "64", "1.250"]]


@pytest.mark.parametrize(
    ("fields", "chunks", "said"),
    [("", "8,16", "only with deep memories"), (",recurrence=dla", "8,x", "'8,x' is not a list")],
)
def test_inner_chunks_that_cannot_be(
    fields: str, chunks: str, said: str, run: Callable[..., Any], planted: Planted
) -> None:
    ran = run("search", "--problem", f"{FIELDS}{fields}", "--inner-chunks", chunks)
    assert ran.code == 2 and said in ran.err and planted.request is None


def test_what_is_known_already_reaches_the_request(
    run: Callable[..., Any], planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mctune.cli.search.results_dir", lambda: None)
    assert run("search", "--problem", FIELDS).code == 0
    assert planted.request is not None and planted.request.warm and planted.request.known == ()
    table = Path(__file__).resolve().parents[2] / "results" / "cpu" / "tuned.json"
    assert run("search", "--problem", FIELDS, "--from", str(table), "--from", str(table)).code == 0
    entries = json.loads(table.read_text())["entries"]
    assert len(planted.request.known) == 2 * len(entries)
    first = planted.request.known[0]
    assert first.config.to_dict() == entries[0]["config"] and first.ms == entries[0]["outcome"]["ms"]
    assert first.problem == Problem.from_dict(entries[0]["problem"])
    assert (first.backend, first.measured) == ("tvm", True)
    assert first.machine is not None and first.machine.arch == "x86-64-v4" and first.source == str(table)
    # Without any option: the published tables, and one that cannot be read is not asked for.
    monkeypatch.setattr("mctune.cli.search.results_dir", lambda: table.parents[1])
    assert run("search", "--problem", FIELDS).code == 0
    assert {known.config for known in planted.request.known} >= {first.config}
    assert run("search", "--problem", FIELDS, "--no-warm-start").code == 0
    assert not planted.request.warm and planted.request.known == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "absent.json"), "absent.json does not exist"),
        (("--from", "other.json"), "other.json is neither"),
        (("--from", "broken.json"), "broken.json is not JSON"),
        (("--from", "other.json", "--no-warm-start"), "exclude each other"),
    ],
)
def test_files_that_know_nothing(
    run: Callable[..., Any], planted: Planted, arguments: tuple[str, ...], message: str
) -> None:
    Path("other.json").write_text("{}")
    Path("broken.json").write_text("{")
    ran = run("search", "--problem", FIELDS, *arguments)
    assert ran.code == 2 and message in ran.err and ran.err.count("\n") == 1 and planted.request is None
