"""Tables: Markdown, and plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_MARKUP = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {mark: f"\\{mark}" for mark in "\\`[]|*~#!"}  # what begins something
)
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]+")
"""Control characters, line ends, what turns the direction of text, and what no encoding has."""


def plain(text: str) -> str:
    """``text`` as Markdown that shows just it: no HTML, link, image, code or table comes of it, and it is one line.

    Examples:
        >>> plain("[x](javascript:y) <b>")
        '\\\\[x\\\\](javascript:y) &lt;b&gt;'
    """
    return plain_text(text).translate(_MARKUP)


def plain_text(text: str) -> str:
    """``text`` with blanks for what is not seen."""
    return _UNSEEN.sub(" ", text)


def one_line(error: Exception) -> str:
    """What an error says, in one line and not at the length of what it is about, which anybody may have written."""
    return " ".join(plain_text(str(error)).split())[:300]


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table of plain text, whose columns line up as text too."""
    cells = [[plain(cell) for cell in line] for line in (header, *lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    layout = "| " + " | ".join(f"{{:{width}}}" for width in widths) + " |\n"
    first, *others = cells
    rule = layout.format(*("-" * width for width in widths))
    return "".join((layout.format(*first), rule, *(layout.format(*line) for line in others)))


def text_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Aligned columns, plain text, no trailing spaces."""
    cells = [list(header), *(list(line) for line in lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(rows)
