"""Write the pages of a folder of results: one a target, and the index over them."""

from __future__ import annotations

from pathlib import Path

from mctune.core.errors import UsageError
from mctune.report.files import write_whole
from mctune.report.page.content import folders, read_content
from mctune.report.page.document import library, page
from mctune.report.page.index import index
from mctune.report.page.searches import Importance

PAGE = "index.html"


def write_pages(results: Path, importance: Importance) -> list[Path]:
    """Write ``results/index.html`` and ``results/<target>/index.html`` for every folder with rows; returns them.

    Raises:
        UsageError: if there is no such folder, one of its files is malformed, or a page cannot be written.
    """
    made = pages(results, importance)
    for path, text in made.items():
        write_whole(results / path, text)
    return [results / path for path in made]


def pages(results: Path, importance: Importance) -> dict[str, str]:
    """The pages by their paths below ``results``, the index first; the same files make the same pages, byte by byte.

    Args:
        results: a folder of folders with ``rows.csv``.
        importance: says how much each parameter of a search matters.

    Raises:
        UsageError: if there is no such folder, or one of its files is malformed.
    """
    library()
    contents = [read_content(folder, results) for folder in folders(results)]
    if not contents:
        raise UsageError(f"{results} holds no rows.csv; `mctune report FILE... --out {results}` writes them")
    made = {PAGE: index(contents)}
    for content in contents:
        depth = content.name.count("/") + 1 if content.name != "." else 0
        made[(Path(content.name) / PAGE).as_posix()] = page(content, importance, f"{'../' * depth}{PAGE}")
    return made
