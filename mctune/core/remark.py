"""What is said to a person while something runs: remarks on stderr, results on stdout."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """A remark for a person, on stderr."""
    print(text, file=sys.stderr, flush=True)
