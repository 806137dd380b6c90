"""What is said to a person while something runs: remarks on stderr, results on stdout."""

from __future__ import annotations

import re
import sys
from contextlib import suppress


def say(text: str) -> None:
    """A remark for a person, on stderr; if nobody is there any more, for nobody."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def redacted(text: str) -> str:
    """``text`` without the passwords of the URLs in it.

    Examples:
        >>> redacted("cannot open postgresql://me:s@cret@host/db?password=other")
        'cannot open postgresql://me:***@host/db?password=***'
    """
    text = re.sub(r"(://[^:/@\s]*):[^\s'\"]*(?=@)", r"\1:***", text)
    return re.sub(r"(?i)((?:password|passwd|pwd|secret|token|sslkey)\s*=\s*)[^&\s;'\"]+", r"\1***", text)
