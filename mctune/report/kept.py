"""The studies that are kept with a target's rows: T4, gzipped, the same bytes for the same trials."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from mctune.report.files import write_whole
from mctune.report.rows import check_name
from mctune.report.t4 import Results, from_t4, to_t4

STUDIES = "studies"
SUFFIX = ".t4.json.gz"


def write_studies(folder: Path, studies: Sequence[tuple[str, Results]]) -> None:
    """Keep studies, by their names, in ``folder/studies``; others that are there stay.

    Raises:
        UsageError: if they cannot be written, or a study's name is none of a file.
    """
    for name, results in studies:
        text = json.dumps(to_t4(results), sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"
        data = gzip.compress(text.encode(), compresslevel=9, mtime=0)
        write_whole(folder / STUDIES / f"{check_name('study', name)}{SUFFIX}", data)


def study_files(folder: Path) -> list[Path]:
    """The files of the studies that are kept in ``folder``, in order."""
    return sorted((folder / STUDIES).glob(f"*{SUFFIX}"))


def read_study(path: Path) -> Results:
    """The inverse, of one file.

    Raises:
        OSError, EOFError, ValueError: if it cannot be read, or is not gzipped JSON.
        UsageError: if it is not T4.
    """
    return from_t4(json.loads(gzip.decompress(path.read_bytes())))
