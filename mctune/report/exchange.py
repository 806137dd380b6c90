"""Studies as files of the auto-tuning community's formats, each study one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mctune.report.files import write_whole


def exchange_file(out: Path, target: str, study: str, form: str) -> Path:
    """Where a study's file of a format (``t1`` or ``t4``) lies."""
    return out / target / f"{study}.{form}.json"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document, in the place of one that is there.

    Raises:
        UsageError: if it cannot be written.
    """
    write_whole(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
