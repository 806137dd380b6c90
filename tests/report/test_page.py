"""The pages of results: self-contained, the same bytes every time, and in a browser what they say they are."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import FailedBuild, Predicted, Timed
from mctune.core.problem import Problem
from mctune.report.compiled import Explanation
from mctune.report.history import Record, append_history
from mctune.report.page.charts import CHARTS
from mctune.report.page.content import read_content
from mctune.report.page.write import write_pages
from mctune.report.rows import Row
from mctune.report.t4 import Results, Tried
from mctune.report.write import Document, write_results
from mctune.study.importance import importance
from tests.cli.conftest import Ran

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
HOSTILE = '<img src=x onerror="window.pwned=1"></script><script>window.pwned=1</script>\'\\"]]>&amp;'
WHEN = datetime(2026, 11, 23, 12, tzinfo=timezone.utc)
VERSIONS = {"mctune": "0.1.0", "torch": "2.13.0"}


def measured(T: int, length: int, ms: float, **more: Any) -> Row:
    problem = Problem(T=T, H=4, Dk=64, Dv=64, segment_length=length, dtype="float32")
    timed = Timed(ms, 0.95 * ms, 1.1 * ms, 21, 1e-6, parts=(("segment_states", 0.3 * ms), ("read", 0.6 * ms)))
    others = {"eager": 3 * ms, "torch.compile": 2.1 * ms}
    config = Config.of({"chunk": 64, "segment_length": length})
    return Row.of("cpu", problem, "tvm", config, timed, baselines=others, versions=VERSIONS, date="2026-11-23", **more)


def predicted(pass_: str, ms: float, target: str = "h100-sxm", backend: str = "triton") -> Row:
    problem = Problem(pass_=pass_, T=16384, H=16, Dk=128, Dv=128, segment_length=256, dtype="bfloat16")
    parts = (("segment_states", 0.4 * ms), ("read", 0.6 * ms))
    config, outcome = Config.of({"BT": 64, "segment_length": 256}), Predicted(ms, "m", parts=parts)
    return Row.of(target, problem, backend, config, outcome, versions=VERSIONS)


def target(name: str, title: str) -> dict[str, Any]:
    return {"name": name, "title": title, "arch": "sm_90" if name != "cpu" else "x86-64-v3", "cores": 2}


def study(backend: str, target_: list[Any], count: int = 30) -> Results:
    about = {
        "target": target_, "problem": predicted("forward", 1.0).problem.to_dict(), "segment_lengths": [256],
        "backend": {"name": backend},
    }  # fmt: skip
    trials = []
    for number in range(count):
        config = Config.of({"BT": (32, 64, 128)[number % 3], "warps": (4, 8)[number % 2], "mode": HOSTILE,
                            "segment_length": 256})  # fmt: skip
        outcome = FailedBuild(HOSTILE) if number % 7 == 3 else Predicted(1.0 + number % 3 + 0.01 * number, "m")
        trials.append(Tried(config, outcome, 0.5, WHEN))
    return Results(about, tuple(trials), "0.1.0", WHEN)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measured CPU, a predicted GPU whose every string is hostile, and a folder with both kinds of figures."""
    root = tmp_path_factory.mktemp("results")
    on_cpu = [measured(T, length, T / length / 4) for T in (1024, 4096) for length in (64, 128, 256)]
    rates = {"matrix_gflops": 140.0, "copy_gbs": 29.0}
    cpu = {"target": target("cpu", "A CPU"), "versions": VERSIONS, **rates}
    write_results([Document(tuple(on_cpu), cpu, None)], root)
    machine = ["h100-sxm", HOSTILE, "sm_90", 132]
    gpu = {"target": target("h100-sxm", HOSTILE), "versions": {**VERSIONS, "odd": HOSTILE[:100]}}
    rows = tuple(predicted(name, ms) for name, ms in (("forward", 0.7), ("backward", 2.6), ("decode", 0.05)))
    rows += (predicted("forward", 0.9, backend="w" + HOSTILE),)
    launch = {"kernel": HOSTILE, "regs": "168", "KiB": "96", "occupancy": "19%", "us": "700", "bound": "products"}
    problem, config = rows[0].problem, rows[0].config
    explained = {"problem": problem.to_dict(), "config": config.to_dict(), "backend": "triton", "launches": [launch]}
    write_results(
        [Document(rows, gpu, None)], root, [("forward-grm", study(HOSTILE, machine))],
        [Explanation("h100-sxm", {"target": "h100-sxm", "explained": [explained]})],
    )  # fmt: skip
    both = [replace(row, target="mixed") for row in on_cpu]
    both += [replace(row, how="predicted", ms=0.8 * row.ms, low=None, high=None, baselines=()) for row in both]
    write_results([Document(tuple(both), {**cpu, "target": target("mixed", "Both")}, None)], root)
    nights = [Record.of(row, date=f"2026-11-{day}", commit=HOSTILE, title=HOSTILE) for row in both for day in (21, 22)]
    append_history(root / "mixed" / "history.jsonl", nights)
    write_pages(root, importance)
    return root


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def opened(browser: Browser, results: Path) -> Iterator[Any]:
    """Opens a page and draws all of it; at the end there must have been no error and no request but for the file."""
    told: list[str] = []
    pages: list[Page] = []

    def go(path: str, **how: Any) -> Page:
        page = browser.new_page(**how)
        page.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "blob:", "data:")) else told.append(request.url),
        )
        page.goto((results / path).as_uri())
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        figures = page.locator("figure.plot").count()
        page.wait_for_function(
            "count => document.querySelectorAll('figure[data-drawn]').length === count", arg=figures, timeout=120_000
        )
        pages.append(page)
        return page

    yield go
    assert told == []
    for page in pages:
        page.close()


def test_pages_are_self_contained_and_the_same_every_time(results: Path, tmp_path: Path) -> None:
    names = {path.relative_to(results).as_posix() for path in results.rglob("index.html")}
    assert names == {"index.html", "cpu/index.html", "h100-sxm/index.html", "mixed/index.html"}
    shutil.copytree(results, tmp_path / "again", ignore=shutil.ignore_patterns("index.html"))
    write_pages(tmp_path / "again", importance)
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (results / name).read_bytes()
    html = (results / "cpu/index.html").read_text()
    outside = re.sub(r"(?s)<script>.*?</script>", "", html)
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=|url\(", outside)
    assert "default-src 'none'" in unescape(outside)


def test_hostile_strings_stay_text(opened: Any) -> None:
    page = opened("h100-sxm/index.html")
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    assert HOSTILE in page.locator("h1").inner_text()
    assert page.locator("#facts td").first.inner_text().startswith("forward linear grm")
    assert HOSTILE in page.locator("#facts").inner_text()
    page.fill("#find", HOSTILE)  # the words of a row are looked for as they are
    assert page.locator("#all tbody tr").count() == 1
    index = opened("index.html")
    assert index.evaluate("window.pwned") is None and index.locator("img").count() == 0


def test_predicted_rows_can_be_hidden_and_are_told_apart(opened: Any) -> None:
    page = opened("mixed/index.html")
    both = page.locator("#count").inner_text()
    page.check("#hide")
    measured_only = page.locator("#count").inner_text()
    assert (both, measured_only) == ("12 rows", "6 of 12 rows")
    assert "predicted" not in page.locator("#all tbody").inner_text()
    page.wait_for_function(
        "() => ![...document.querySelectorAll('figure[data-chart=roofline] [aria-label]')]"
        ".some(one => one.getAttribute('aria-label').includes('how: predicted'))"
    )
    assert page.locator("#decisive tbody tr:visible").count() == 6
    page = opened("h100-sxm/index.html")
    assert "4 of 4 times are predicted by a cost model, not measured" in page.locator("header").inner_text()
    assert all("predicted" in line for line in page.locator("#decisive tbody tr").all_inner_texts())


def test_measured_and_predicted_share_no_mark(results: Path) -> None:
    content = read_content(results / "mixed", results)
    for make in CHARTS:
        chart = make(content)
        assert chart is not None
        marks: dict[str, list[Any]] = {"measured": [], "predicted": []}
        for layer in _layers(chart.spec):
            told = json.dumps(layer.get("transform", ""))
            for how in marks:
                if f"datum.how == '{how}'" in told:
                    marks[how].append(
                        (json.dumps(layer["mark"], sort_keys=True), json.dumps(layer.get("encoding", {}).get("stroke")))
                    )
        assert not set(marks["measured"]) & set(marks["predicted"]), chart.name


def _layers(spec: Any) -> Iterator[dict[str, Any]]:
    if isinstance(spec, list):
        for one in spec:
            yield from _layers(one)
    elif isinstance(spec, dict):
        if "mark" in spec:
            yield spec
        for name in ("layer", "vconcat", "spec"):
            yield from _layers(spec.get(name, []))


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_a_desk_in_both_schemes(opened: Any, width: int, scheme: str) -> None:
    page = opened("h100-sxm/index.html", viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    light = [sum(map(int, re.findall(r"\d+", told)[:3])) for told in (ink, paper)]
    assert (light[0] < light[1]) == (scheme == "light")


def test_tables_sort_by_keyboard_and_rows_can_be_taken_along(opened: Any, results: Path, tmp_path: Path) -> None:
    page = opened("cpu/index.html")
    heading = page.locator("#all th", has_text=re.compile("^ms$"))
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    place = page.locator("#all th").all_inner_texts().index("ms")
    shown = [float(line.locator("td").nth(place).inner_text()) for line in page.locator("#all tbody tr").all()]
    assert shown == sorted(shown, reverse=True) and len(set(shown)) > 3
    for form in ("csv", "json", "parquet"):
        with page.expect_download() as download:
            page.click(f"button[data-as={form}]")
        download.value.save_as(tmp_path / f"rows.{form}")
    with (results / "cpu/rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [(row["T"], row["config"], float(row["ms"])) for row in csv.DictReader(file)] == [
            (row["T"], row["config"], float(row["ms"])) for row in rows
        ]
    assert [row["ms"] for row in json.loads((tmp_path / "rows.json").read_text())] == [float(row["ms"]) for row in rows]
    assert pq.read_table(tmp_path / "rows.parquet").column("T").to_pylist() == [int(row["T"]) for row in rows]


def test_a_search_shows_its_trials_failures_and_importance(opened: Any) -> None:
    page = opened("h100-sxm/index.html")
    kinds = page.locator("figure[data-chart=search-kinds]")
    labels = [one.get_attribute("aria-label") or "" for one in kinds.locator("[aria-roledescription=bar]").all()]
    assert any("failed build" in label for label in labels) and any("predicted" in label for label in labels)
    bars = page.locator("figure[data-chart=search-importance] [aria-roledescription=bar]").count()
    assert bars == 2  # BT and warps vary, the others do not


def test_importance_finds_what_the_time_depends_on() -> None:
    timed = [
        (Config.of({"BT": bt, "warps": warps, "same": 1}), bt + 0.001 * warps) for bt in range(8) for warps in (1, 2)
    ]
    found = importance(timed)
    assert set(found) == {"BT", "warps"} and found["BT"] > 0.8
    assert importance(timed[:5]) == {} and importance([(config, 1.0) for config, _ in timed]) == {}


def test_the_command_makes_pages_of_what_lies_there_and_refuses_the_rest(
    run: Callable[..., Ran], results: Path, tmp_path: Path
) -> None:
    shutil.copytree(results / "cpu", tmp_path / "cpu", ignore=shutil.ignore_patterns("index.html"))
    ran = run("report", "--html", "--out", str(tmp_path), "--json")
    assert ran.code == 0, ran.err
    assert [one["page"] for one in json.loads(ran.out)] == [
        str(tmp_path / "index.html"), str(tmp_path / "cpu/index.html")
    ]  # fmt: skip
    for arguments, said in (
        (("report", "--out", str(tmp_path)), "nothing to report"),
        (("report", "--html", "--format", "t4", str(tmp_path)), "--html makes pages of tables"),
        (("report", "--html", "--out", str(tmp_path / "absent")), "holds no rows.csv"),
    ):
        ran = run(*arguments)
        assert ran.code == 2 and ran.err.count("\n") == 1 and said in ran.err


def test_a_study_is_kept_in_its_folder_whatever_it_is_called(results: Path, tmp_path: Path) -> None:
    document = Document((predicted("forward", 0.7),), {"target": target("h100-sxm", "H100"), "versions": {}}, None)
    with pytest.raises(UsageError, match=r"study '\.\./\.\./up' is not a name"):
        write_results([document], tmp_path / "results", [("../../up", study("b", ["h100-sxm", "", "sm_90", 1]))])
    assert not list(tmp_path.glob("**/*.gz"))


def test_what_is_missing_is_said_in_a_line(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"holds no rows\.csv"):
        write_pages(tmp_path, importance)
    shutil.copytree(results / "cpu", tmp_path / "cpu")
    (tmp_path / "cpu/rows.csv").write_text("nonsense\n1\n")
    with pytest.raises(UsageError, match=r"rows\.csv is malformed"):
        write_pages(tmp_path, importance)
    from mctune.report.page import document

    document.library.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UsageError, match=r"pip install 'mctune\[html\]'"):
        write_pages(results, importance)
    document.library.cache_clear()
