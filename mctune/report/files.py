"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from mctune.core.errors import UsageError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content``, a text as UTF-8, in the place of a file that is there; whoever reads meanwhile sees either.

    Raises:
        UsageError: if it cannot be written.
    """
    beside = path.with_name(f".new-{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
