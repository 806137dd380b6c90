"""Workloads: the files that ship, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mctune.core.errors import UsageError
from mctune.core.problem import PASSES, RECURRENCES
from mctune.core.work import cached_states
from mctune.core.workload import Case, load_workload, read_workload, workload_names


def test_the_shipped_workloads() -> None:
    assert workload_names() == ("decisive", "decode", "deep", "paper", "quick", "train")
    quick = load_workload("quick")
    assert quick.timeout_s is not None and quick.timeout_s <= 480
    assert load_workload("quick", gpu=True).timeout_s == 420
    assert {(c.problem.pass_, c.problem.aggregation, c.problem.top_k) for c in quick.cases} == {
        (pass_, *read) for pass_ in PASSES for read in (("grm", None), ("ssc", 4))
    }
    assert quick.cases[0].segment_lengths == (64, 128, 256, 512)
    assert all(case.segment_lengths == (256,) for case in quick.cases[1:])
    train = load_workload("train").cases
    assert {c.problem.pass_ for c in train} == set(PASSES)
    assert {c.problem.recurrence for c in train} == set(RECURRENCES)
    deep = load_workload("deep")
    reads = {(c.problem.pass_, c.problem.recurrence, c.problem.aggregation, c.problem.top_k) for c in deep.cases}
    assert len(reads) == len(deep.cases) == len(PASSES) * 2 * 3 and all(c.problem.deep for c in deep.cases)
    on_gpu = load_workload("deep", gpu=True).cases
    assert {(c.problem.T, c.problem.H, c.problem.E, c.problem.dtype) for c in on_gpu} == {(16384, 16, 256, "bfloat16")}
    paper = load_workload("paper")
    shapes = {(c.problem.H * c.problem.Dk, c.problem.T, c.problem.aggregation) for c in paper.cases}
    assert shapes == {
        (hidden, T, a) for hidden in (1536, 2048) for T in (4096, 16384) for a in ("grm", "ssc", "residual")
    }
    assert len(paper.cases) == 12 and paper.cases[0].segment_lengths == (16, 32, 64, 128, 256, 512)
    decisive = load_workload("decisive", gpu=True).cases
    assert {c.problem.pass_ for c in decisive} == set(PASSES) and len(decisive) == 8
    assert all(c.problem.Dk == 128 and c.problem.dtype == "bfloat16" for c in decisive)
    # The recurrence alone is residual, not one long segment.
    assert all(c.segment_lengths == (256,) for c in decisive)
    assert all(c.problem.pass_ == "decode" and cached_states(c.problem) == 64 for c in load_workload("decode").cases)


def test_an_unknown_workload() -> None:
    with pytest.raises(UsageError, match=r"unknown workload 'quik'; did you mean quick\?"):
        load_workload("quik")


def test_cases() -> None:
    fields = {"T": 100, "H": 1, "Dk": 8, "Dv": 8}
    case = Case.of(fields, (64, 32, 64))
    assert case.segment_lengths == (32, 64) and case.problem.segment_length == 32
    assert " C32,64 " in str(case)
    deep = Case.of({**fields, "recurrence": "titans", "inner_chunk": 8}, (64, 32))
    assert " D8 E32 C32,64 b8 float32" in str(deep)
    assert Case.of({**fields, "segment_length": 16}, (32,)).segment_lengths == (16,)
    assert Case.of({**fields, "segmentation": "logarithmic"}, (32,)).segment_lengths == ()
    with pytest.raises(UsageError, match="no segment length"):
        Case.of(fields, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trails = 3", "w.toml: unknown key 'trails'"),
        ("trials = 3", "w.toml: 'description' is missing"),
        (
            "description = ''\ntrials = 1\nsegment_lengths = [8]\n[[problems]]\nT = 1\nH = 1\nDk = 1\nDv = 1\nX = 1",
            "w.toml: unknown problem field 'X'",
        ),
    ],
)
def test_what_is_refused_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "w.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_workload(tmp_path / "w.toml")


def test_a_list_of_values_is_one_problem_each(tmp_path: Path) -> None:
    text = "description = ''\ntrials = 1\nsegment_lengths = [8]\n[[problems]]\nT = [1, 2]\nH = [3, 4]\nDk = 1\nDv = 1"
    (tmp_path / "w.toml").write_text(text)
    cases = read_workload(tmp_path / "w.toml").cases
    assert [(c.problem.T, c.problem.H) for c in cases] == [(1, 3), (1, 4), (2, 3), (2, 4)]


def test_a_gpu_is_given_its_own_sizes_and_dtype(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text(
        'description = ""\ntrials = 1\nsegment_lengths = [64]\n[gpu]\nH = 16\n'
        "[[problems]]\nT = 128\nH = [1, 2]\nDk = 16\nDv = 16\n"
        '[[problems]]\nT = 128\nH = 1\nDk = 16\nDv = 16\ndtype = "float32"\n'
    )
    assert [(case.problem.H, case.problem.dtype) for case in read_workload(path).cases] == [
        (1, "float32"), (2, "float32"), (1, "float32")
    ]  # fmt: skip
    assert [(case.problem.H, case.problem.dtype) for case in read_workload(path, gpu=True).cases] == [
        (16, "bfloat16"), (16, "float32")
    ]  # fmt: skip
