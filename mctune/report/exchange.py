"""Studies as files of the auto-tuning community's formats, each study one file."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from mctune.core.errors import UsageError


def exchange_file(out: Path, target: str, study: str, form: str) -> Path:
    """Where a study's file of a format (``t1`` or ``t4``) lies."""
    return out / target / f"{study}.{form}.json"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document, in the place of one that is there.

    Raises:
        UsageError: if it cannot be written.
    """
    beside = path.with_name(f".new-{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
