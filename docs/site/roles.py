"""Docstrings as Markdown: Sphinx roles become code, and arguments that share a line in ``Args:`` a line each."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|attr|data|mod|exc):`~?([^`]+)`")
_SHARED = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*)$")


class Roles(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every object that is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = one_argument_a_line(_ROLE.sub(r"`\1`", obj.docstring.value))


def one_argument_a_line(text: str) -> str:
    """``q, k: queries and keys`` names two parameters: the reference gives each its own entry, with the same text."""
    lines: list[str] = []
    found = text.splitlines()
    number = 0
    while number < len(found):
        shared = _SHARED.match(found[number])
        number += 1
        if shared is None:
            lines.append(found[number - 1])
            continue
        indent = shared["indent"]
        rest = []
        while number < len(found) and found[number].startswith(f"{indent}    "):
            rest.append(found[number])
            number += 1
        for name in shared["names"].split(", "):
            lines += [f"{indent}{name}: {shared['text']}", *rest]
    return "\n".join(lines)
