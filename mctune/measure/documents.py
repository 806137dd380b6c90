"""What benchmarks leave for `mctune report`: rows, the rates that go with them, and where they were measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mctune.core.environment import today, versions
from mctune.core.target import Target
from mctune.measure.bench import Result, described
from mctune.report.rows import Row


def document(target: Target, results: Sequence[Result]) -> dict[str, Any]:
    """What `mctune report` reads: rows and their environment; the rates that go with each row stand beside them."""
    made_with, date = versions(), today()
    rows = [
        replace(
            Row.of(
                target.name,
                result.problem,
                result.backend,
                result.config,
                result.timed,
                baselines={name: timed.ms for name, timed in result.baselines.items()},
                fraction_of_bound=result.fraction_of_bound,
                versions=made_with,
                date=date,
            ),
            # Of a training step they are shares of its backward, and none of the time in the row.
            shares=() if result.problem.pass_ == "backward" else tuple(result.shares.items()),
        )
        for result in results
    ]
    return {
        "rows": [row.to_dict() for row in rows],
        "rates": [result.rates.to_dict() for result in results],
        "environment": described(target, [result.rates for result in results]),
    }


def write(path: Path, data: dict[str, Any]) -> None:
    """``data`` as JSON in ``path``, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
