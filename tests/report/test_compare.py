"""What is slower, faster and neither; what is not compared; what two sides can be read from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.problem import Problem
from mctune.report.compare import FASTER, NOISE, ONLY_NEW, ONLY_OLD, SLOWER, Comparison, compare, timed_by_turns
from mctune.report.compared import as_markdown, as_text
from mctune.report.rows import Row, write_csv
from mctune.report.sides import Side, read_side
from mctune.report.write import Document

GRM = Problem(T=4096, H=4, Dk=64, Dv=64, segment_length=256)
SSC = GRM.replace(aggregation="ssc", top_k=4)
TARGET = {"name": "cpu", "title": "Test CPU", "arch": "x86-64-v3", "cores": 2}
MIRRORED = {SLOWER: FASTER, FASTER: SLOWER, NOISE: NOISE, ONLY_OLD: ONLY_NEW, ONLY_NEW: ONLY_OLD}


def row(problem: Problem = GRM, ms: float = 10.0, spread: float = 0.02, **changes: Any) -> Row:
    made = Row("cpu", problem, "tvm", Config.of({}), "measured", ms, ms / (1 + spread), ms * (1 + spread), 15)
    return replace(made, **changes)


def predicted(problem: Problem = GRM, ms: float = 10.0) -> Row:
    return row(problem, ms, how="predicted", low=None, high=None, repeats=None)


def side(*rows: Row, called: str = "x", target: dict[str, Any] = TARGET, **environment: Any) -> Side:
    return Side(called, (Document(rows, {"target": target, **environment}, None),))


def scaled(rows: list[Row], factor: float) -> list[Row]:
    return [
        replace(one, ms=factor * one.ms, low=one.low and factor * one.low, high=one.high and factor * one.high)
        for one in rows
    ]


def problems(count: int) -> list[Problem]:
    return [GRM.replace(T=256 * (number + 1)) for number in range(count)]


ROWS = st.lists(
    st.builds(
        row,
        st.sampled_from([*problems(6), SSC, SSC.replace(pass_="decode")]),
        st.floats(0.01, 1000.0),
        st.floats(0.0, 0.1),
        backend=st.sampled_from(["tvm", "tvm step"]),
        config=st.sampled_from([Config.of({"rows": n}) for n in (1, 2, 4)]),
    ),
    min_size=1,
    max_size=20,
)


@given(ROWS, st.floats(0.0, 1.0))
def test_a_set_beside_itself_never_regresses(rows: list[Row], threshold: float) -> None:
    found = compare(side(*rows), side(*rows), threshold=threshold)
    assert not found.regressed
    assert {(pair.ratio, pair.verdict) for pair in found.pairs} == {(1.0, NOISE)}
    assert {(one.ratio, one.verdict) for one in found.overall} == {(1.0, NOISE)}


@given(ROWS)
def test_one_and_a_half_times_the_time_regresses_in_every_row(rows: list[Row]) -> None:
    found = compare(side(*rows), side(*scaled(rows, 1.5)))
    assert found.regressed and {pair.verdict for pair in found.pairs} == {SLOWER}
    better = compare(side(*scaled(rows, 1.5)), side(*rows))
    assert not better.regressed and {pair.verdict for pair in better.pairs} == {FASTER}


@given(st.data())
def test_the_order_of_rows_does_not_matter(data: st.DataObject) -> None:
    old, new = data.draw(ROWS), data.draw(ROWS)
    try:
        found: Comparison | str = compare(side(*old), side(*new))
    except UsageError as error:
        found = str(error)
    again = side(*data.draw(st.permutations(old))), side(*data.draw(st.permutations(new)))
    try:
        assert compare(*again) == found
    except UsageError as error:
        assert str(error) == found


@given(ROWS, ROWS, st.floats(0.0, 0.5))
def test_swapping_the_sides_mirrors_the_verdicts(old: list[Row], new: list[Row], threshold: float) -> None:
    old, new = [*old, row(GRM)], [*new, row(GRM, 10.5)]
    there, back = (compare(side(*a), side(*b), threshold=threshold) for a, b in ((old, new), (new, old)))
    assert [MIRRORED[pair.verdict] for pair in there.pairs] == [pair.verdict for pair in back.pairs]
    for a, b in zip(there.pairs, back.pairs, strict=True):
        assert (a.old, a.new) == (b.new, b.old)
        assert (a.ratio is None) is (b.ratio is None) and (a.ratio is None or a.ratio * b.ratio == pytest.approx(1.0))
    for one, other in zip(there.overall, back.overall, strict=True):
        assert (one.slower, one.faster) == (other.faster, other.slower)
        assert one.chance == pytest.approx(other.chance) and MIRRORED[one.verdict] == other.verdict


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (row(ms=10.0), row(ms=10.6), SLOWER),
        # Beyond the spreads, within the threshold.
        (row(ms=10.0, spread=0.001), row(ms=10.4, spread=0.001), NOISE),
        # Beyond the threshold, within the spreads.
        (row(ms=10.0, spread=0.2), row(ms=12.0, spread=0.2), NOISE),
        (row(ms=10.6), row(ms=10.0), FASTER),
        (row(ms=10.0, low=None, high=None), row(ms=10.6), SLOWER),
        (predicted(ms=10.0), predicted(ms=10.4), NOISE),
        (predicted(ms=10.0), predicted(ms=10.6), SLOWER),
    ],
)
def test_a_row_is_beyond_noise_by_the_threshold_and_the_spreads(old: Row, new: Row, verdict: str) -> None:
    found = compare(side(old), side(new))
    assert [pair.verdict for pair in found.pairs] == [verdict] and found.regressed is (verdict == SLOWER)
    bare = old.how == "measured" and old.low is None
    assert any("1 of 1 measured pairs have no spread" in line for line in found.remarks) is bare


def test_rows_that_are_all_a_little_slower_regress_together() -> None:
    """No row is beyond its wide spread; that all go one way is no chance, if there are enough of them."""
    for count, regressed in ((4, False), (5, True)):
        old = [row(problem, 10.0, 0.5) for problem in problems(count)]
        found = compare(side(*old), side(*scaled(old, 1.08)))
        assert {pair.verdict for pair in found.pairs} == {NOISE} and found.regressed is regressed
        (one,) = found.overall
        assert (one.count, one.slower, one.faster) == (count, count, 0)
        assert one.ratio == pytest.approx(1.08) and one.chance == pytest.approx(0.5**count)
    # Sure, but less than the threshold; and large, but as often the other way.
    assert not compare(side(*old), side(*scaled(old, 1.04))).regressed
    assert not compare(side(*old), side(*scaled(old[:3], 1.4), *scaled(old[3:], 0.9))).overall[0].verdict == SLOWER


def test_the_fastest_configuration_counts() -> None:
    slow, fast = row(ms=20.0, config=Config.of({"rows": 1})), row(ms=10.0, config=Config.of({"rows": 2}))
    (pair,) = compare(side(slow, fast), side(slow)).pairs
    assert pair.old == fast and pair.new == slow and pair.verdict == SLOWER


def test_a_predicted_time_is_never_compared_with_a_measured_one() -> None:
    found = compare(side(predicted(SSC, 1.0), row()), side(row(SSC, 9.0), row()))
    assert [pair.problem for pair in found.pairs] == [GRM] and not found.regressed
    assert found.remarks == ("left out: 1 measured on one side and predicted on the other, which is no comparison",)
    both = compare(side(predicted(), row()), side(predicted(ms=20.0), row()))
    assert [(pair.how, pair.verdict) for pair in both.pairs] == [("measured", NOISE), ("predicted", SLOWER)]
    assert [one.how for one in both.overall] == ["measured", "predicted"]
    with pytest.raises(UsageError, match=r"no problem and backend in common \(left out: 1 measured"):
        compare(side(predicted()), side(row()))


def test_what_only_one_side_has_is_shown_and_is_no_regression() -> None:
    found = compare(side(row(), row(SSC)), side(row(), row(backend="triton")))
    assert [(pair.problem, pair.row.backend, pair.verdict) for pair in found.pairs] == [
        (GRM, "triton", ONLY_NEW), (GRM, "tvm", NOISE), (SSC, "tvm", ONLY_OLD),
    ]  # fmt: skip
    assert not found.regressed and [one.count for one in found.overall] == [1]
    with pytest.raises(UsageError, match="old and new have no problem and backend in common"):
        compare(side(row(), called="old"), side(row(SSC), called="new"))


def test_machines_that_differ_are_not_compared_unless_asked() -> None:
    other = {**TARGET, "arch": "x86-64-v4", "cores": 8}
    with pytest.raises(UsageError, match=r"a and b are of different machines \(arch x86-64-v3 before, x86-64-v4 now; "):
        compare(side(row(), called="a"), side(row(), called="b", target=other))
    found = compare(side(row()), side(row(), target=other), across=True)
    assert found.remarks == tuple(
        f"different machines: {what}" for what in ("arch x86-64-v3 before, x86-64-v4 now", "cores 2 before, 8 now")
    )
    gpu = side(row(target="gpu"), target={"name": "gpu"})
    with pytest.raises(UsageError, match="x is of cpu, x of gpu; --across compares different machines"):
        compare(side(row()), gpu)
    assert compare(side(row()), gpu, across=True).pairs[0].verdict == NOISE
    # What only one of them tells is no difference.
    assert not compare(side(row()), side(row(), target={"name": "cpu"})).remarks


def test_versions_and_the_pace_of_the_machine_are_told() -> None:
    old = side(row(baselines=(("eager", 50.0),)), versions={"torch": "2.12", "triton": "3.6"}, copy_gbs=20.0)
    new = side(row(baselines=(("eager", 60.0),)), versions={"torch": "2.13", "triton": "3.6"}, copy_gbs=26.0)
    assert compare(old, new).remarks == (
        "torch 2.12 before, 2.13 now",
        "a copy reached 20.0 GB/s before, 26.0 now",
        "the baselines of the same runs take 1.2 times as long as before (median): the machine, or torch, has another "
        "pace",
    )
    assert not compare(old, old).remarks


def test_targets_are_matched_by_name() -> None:
    def of(*names: str) -> Side:
        return Side(" ".join(names), tuple(Document((row(target=n),), {"target": {"name": n}}, None) for n in names))

    found = compare(of("a", "b"), of("b", "c"))
    assert [pair.row.target for pair in found.pairs] == ["b"]
    assert found.remarks == ("only a b has results of a", "only b c has results of c")
    assert "target" not in as_text(found) and "\na " in as_text(compare(of("a", "b"), of("a", "b")))


def test_rounds_are_judged_by_the_sign_test_of_finalists() -> None:
    drift = [1.0, 1.5, 2.0, 2.5, 3.0]
    slow = [1.2 * ms for ms in drift]
    # The spreads overlap, but in every round one was slower.
    assert timed_by_turns(row(), row(), (drift, slow), 1.2, 0.05).verdict == SLOWER
    assert timed_by_turns(row(), row(), (slow, drift), 1 / 1.2, 0.05).verdict == FASTER
    assert timed_by_turns(row(), row(), (drift, slow), 1.2, 0.25).verdict == NOISE
    assert timed_by_turns(row(), row(), (drift[:4], slow[:4]), 1.2, 0.05).verdict == NOISE


def test_what_is_printed() -> None:
    old, new = side(row(), row(SSC), called="v1"), side(row(ms=12.0), row(SSC), called="a|b")
    found = compare(old, new)
    lines = as_text(found).splitlines()
    assert lines[1].endswith("10 (9.804 to 10.2)   12 (11.76 to 12.24)  1.200      slower")
    assert lines[3].startswith("1 slower, 0 faster, 1 within noise (slower and faster: by more than 5 %")
    assert lines[4].startswith("all 2 measured rows together: 1.095 times as long as before")
    text = as_markdown(found)
    assert text.startswith("### a\\|b (NEW) beside v1 (OLD)\n") and text.index("slower  ") < text.index("<details>")
    folded = text[text.index("<details>") :]
    assert "1 within noise" in folded and "ssc" in folded and "| slower" not in folded
    data = found.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data and data["regressed"] is True
    assert data["rows"][0]["new"]["ms"] == 12.0 and data["rows"][0]["verdict"] == SLOWER


# --- what a side is read from


def results(folder: Path, *rows: Row, environment: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    write_csv(folder / "rows.csv", rows)
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def test_every_form_of_results_is_read(tmp_path: Path) -> None:
    known = row(ms=10.5, low=10.0, high=11.0, repeats=9, error=1e-7, versions=(("tvm", "0"),))
    environment = {"target": TARGET}
    folder = results(tmp_path / "results" / "cpu", known, environment=environment)
    results(tmp_path / "results" / "gpu", replace(known, target="gpu"))
    package, bench = tmp_path / "package", tmp_path / "bench.json"
    package.mkdir()
    outcome = {"kind": "timed", "ms": 10.5, "low": 10.0, "high": 11.0, "repeats": 9, "error": 1e-7}
    entry = {"problem": GRM.to_dict(), "config": {}, "backend": "tvm", "outcome": outcome}
    table = {"schema": 1, "target": TARGET, "versions": {"tvm": "0"}, "entries": [entry]}
    (package / "tuned.json").write_text(json.dumps(table))
    bench.write_text(json.dumps({"rows": [known.to_dict()], "environment": environment}))
    for path in (folder, folder / "rows.csv", package, package / "tuned.json", bench):
        (document,) = read_side(path).documents
        assert document.rows == (known,) and document.environment["target"] == TARGET
    assert [one.environment["target"]["name"] for one in read_side(tmp_path / "results").documents] == ["cpu", "gpu"]


def test_what_is_not_a_side(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"HEAD:x holds no results: neither rows\.csv"):
        read_side(tmp_path, "HEAD:x")
    results(tmp_path / "a", row())
    results(tmp_path / "b", row())
    with pytest.raises(UsageError, match="holds 2 folders with rows of cpu: give one of them"):
        read_side(tmp_path)
    with pytest.raises(UsageError, match="a row is of cpu, its environment of gpu"):
        read_side(results(tmp_path / "c", row(), environment={"target": {"name": "gpu"}}))
    for number, text in enumerate(("", "target,pass\ncpu,forward\n", "\x00\xff", "target\n" + "x" * 200_000)):
        folder = results(tmp_path / f"bad{number}", row())
        (folder / "rows.csv").write_text(text, encoding="latin-1")
        with pytest.raises(UsageError, match=r"^OLD/rows.csv (has no rows|is malformed: \w+)"):
            read_side(folder, "OLD")


def test_times_without_a_ratio_are_refused() -> None:
    with pytest.raises(UsageError, match="have no ratio"):
        compare(side(row(ms=1e-300, low=None, high=None)), side(row(ms=1e300, low=None, high=None)))
