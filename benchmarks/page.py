"""How large the page of many rows is, and how long a browser takes to show it.

``python benchmarks/page.py --rows 50000`` makes rows of candidates on 24 problems, each measured and predicted, and
prints the bytes of the page, seconds to write it, and of several loads from a disk the first paint and the moment when
tables and filters work, in a headless Chromium (``pip install playwright``; ``chromium`` on PATH).
``--images docs/images`` takes the pictures of docs/publishing.md instead, of the pages of ``results``.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from playwright.sync_api import sync_playwright

from mctune.core.config import Config
from mctune.core.environment import environment, today
from mctune.core.outcome import Timed
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.report.page.write import PAGE, write_pages
from mctune.report.rows import Row
from mctune.report.write import Document, write_results
from mctune.study.importance import importance

TARGET = "h100-sxm"


def rows(count: int) -> Iterator[Row]:
    """Candidates of 24 problems, every other one predicted too."""
    draw, made_with = random.Random(0), environment(resolve(TARGET)[0])["versions"]
    problems = [
        Problem(pass_=pass_, T=T, H=16, Dk=128, Dv=128, segment_length=length, dtype="bfloat16")
        for pass_ in ("forward", "backward") for T in (4096, 8192, 16384, 32768) for length in (128, 256, 512)
    ]  # fmt: skip
    made = 0
    while made < count:
        problem = problems[made % len(problems)]
        config = Config.of({
            "BT": draw.choice((32, 64, 128)), "BK": draw.choice((32, 64, 128)), "BV": draw.choice((32, 64, 128)),
            "warps": draw.choice((2, 4, 8)), "stages": draw.choice((1, 2, 3, 4)), "seed": made,
            "segment_length": problem.segment_length or 0,
        })  # fmt: skip
        ms = problem.T / 16384 * draw.uniform(0.7, 3.0)
        timed = Timed(ms, 0.97 * ms, 1.05 * ms, 100, 1e-3, 1980.0, 50.0)
        row = Row.of(TARGET, problem, "triton", config, timed, versions=made_with, date=today())
        yield row
        yield replace(row, how="predicted", ms=ms * draw.uniform(0.8, 1.3), low=None, high=None, repeats=None)
        made += 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--loads", type=int, default=7)
    parser.add_argument("--images", type=Path, metavar="DIR")
    given = parser.parse_args()
    if given.images is not None:
        pictures(given.images)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_results([Document(tuple(rows(given.rows)), environment(resolve(TARGET)[0]), None)], root)
        begun = time.perf_counter()
        write_pages(root, importance)
        page = root / TARGET / PAGE
        print(f"{given.rows} rows: {page.stat().st_size:,} bytes, written in {time.perf_counter() - begun:.1f} s")
        paints, ready = loads(page, given.loads)
        for name, seconds in (("first paint", paints), ("tables and filters work", ready)):
            print(f"{name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


def loads(page: Path, count: int) -> tuple[list[float], list[float]]:
    """Seconds from the start of each load to the first paint, and to the moment when the page's script has ended."""
    paints, ready = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(count):
            shown = browser.new_page()
            shown.goto(page.as_uri())
            shown.wait_for_function("() => document.documentElement.dataset.ready")
            ready.append(shown.evaluate("performance.now()") / 1e3)
            paints.append(shown.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1e3)
            shown.close()
        browser.close()
    return paints, ready


PICTURES = (
    ("index", PAGE, 1280, 620),
    ("measured", f"cpu/{PAGE}", 1280, 1500),
    ("predicted", f"{TARGET}/{PAGE}", 1280, 1500),
)
"""Name, page below results, width and height."""


def pictures(folder: Path) -> None:
    """What the pages of ``results`` look like, one in the dark and one as a phone shows it."""
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        root = Path(place) / "results"
        shutil.copytree("results", root)
        write_pages(root, importance)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        sizes = [(*picture, "light") for picture in PICTURES]
        sizes += [("dark", f"cpu/{PAGE}", 1280, 900, "dark"), ("phone", f"{TARGET}/{PAGE}", 390, 1100, "light")]
        for name, path, width, height, scheme in sizes:
            shown = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            shown.goto((root / path).as_uri())
            shown.evaluate("dispatchEvent(new Event('beforeprint'))")
            count = shown.locator("figure.plot").count()
            shown.wait_for_function("n => document.querySelectorAll('figure[data-drawn]').length === n", arg=count)
            shown.screenshot(path=folder / f"page_{name}.png")
            shown.close()
        browser.close()


if __name__ == "__main__":
    main()
