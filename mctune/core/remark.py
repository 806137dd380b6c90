"""What is said to a person while something runs: remarks on stderr, results on stdout."""

from __future__ import annotations

import re
import sys
from contextlib import suppress

_SECRET = "(?:password|passwd|pwd|secret|token|sslkey)"


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
    return re.sub(rf"(?i)({_SECRET}\s*=\s*)[^&\s;'\"]+", r"\1***", text)


def redacted_url(url: str) -> str:
    """One URL without its passwords, which may hold spaces and quotes here; nor what follows one in the query.

    Examples:
        >>> redacted_url("postgresql://me:s cret@host/db")
        'postgresql://me:***@host/db'
    """
    url = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url, flags=re.DOTALL)
    return re.sub(rf"(?i)({_SECRET}\s*=).*", r"\1***", url, flags=re.DOTALL)
