"""What the documents quote and link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_imports import ROOMS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
QUOTES = [
    (page.name, path, quoted)
    for page in PAGES
    for path, quoted in re.findall(r"```python\n# (\S+\.py)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


def test_there_are_quotes() -> None:
    assert sum(page == "extending.md" for page, _, _ in QUOTES) >= 6


@pytest.mark.parametrize(("page", "path", "quoted"), QUOTES, ids=[f"{page}-{path}" for page, path, _ in QUOTES])
def test_quoted_code_stands_in_its_file(page: str, path: str, quoted: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    for line in quoted.splitlines():
        assert line in text.splitlines(), f"{page} quotes {line!r}"
    assert quoted in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    gone = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not gone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:mctune|templates|search_spaces|tests|docs|examples|benchmarks)/[\w/.-]+)`", page.read_text()
    )
    gone = [name for name in named if not (ROOT / name).exists() and not name.endswith("/mine.toml")]
    assert not gone


def test_the_table_of_rooms_is_the_one_that_imports_are_held_to() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| room |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    said = {room.strip("`"): set(re.findall(r"`([\w.]+)`", imports)) for room, _, imports in rows}
    assert said == {room: set(imports) for room, imports in ROOMS.items() if room}
    # templates and search_spaces are beside mctune, all others within.
    folders = {path.name for path in (ROOT / "mctune").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(said) - {"templates", "search_spaces"}
