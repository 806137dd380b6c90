"""Which problems a command is about: the options that `mctune search` and `mctune emit` share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mctune.core.errors import UsageError
from mctune.core.target import Target
from mctune.core.workload import Case, load_workload, on_gpu

_SEGMENT_LENGTHS = (64, 128, 256, 512)
_TRIALS = 100


def default_out(target: Target) -> Path:
    """``build/mctune_<target>``, a name that Python can import."""
    return Path("build") / f"mctune_{target.name.replace('-', '_')}"


def measured(target: Target, insist: bool) -> bool:
    """Whether to time candidates: the target is on this machine, or the user insists and the search will refuse."""
    if target.on_cpu or insist:
        return True
    from mctune.backends.presence import present

    return present(target)


def cases_of(
    target: Target,
    workload: str | None,
    problem: str | None,
    segment_lengths: str | None,
    inner_chunks: str | None = None,
) -> tuple[tuple[Case, ...], int, float | None]:
    """The cases, and the trials and time limit that go with them."""
    cases, trials, timeout_s = _cases(target, workload, problem, segment_lengths)
    if not inner_chunks:
        return cases, trials, timeout_s
    chunks = sorted(set(_integers("--inner-chunks", inner_chunks, "8,16,64")))
    if not any(case.problem.deep for case in cases):
        raise UsageError("--inner-chunks has a meaning only with deep memories: --workload deep, or recurrence=titans")
    every = (
        Case.of(_without_length(case) | {"inner_chunk": chunk}, case.segment_lengths) if case.problem.deep else case
        for case in cases
        for chunk in (chunks if case.problem.deep else chunks[:1])
    )
    return tuple(every), trials, timeout_s


def _cases(
    target: Target, workload: str | None, problem: str | None, segment_lengths: str | None
) -> tuple[tuple[Case, ...], int, float | None]:
    lengths = _integers("--segment-lengths", segment_lengths, "64,128,256") if segment_lengths else None
    if problem is not None:
        if workload is not None:
            raise UsageError("--workload and --problem exclude each other; give one")
        fields = parse_problem(problem)
        fields = fields if target.on_cpu else on_gpu(fields, target.matrix_dtype)
        return (Case.of(fields, lengths or _SEGMENT_LENGTHS),), _TRIALS, None
    loaded = load_workload(workload or "quick", gpu=not target.on_cpu, dtype=target.matrix_dtype)
    cases = loaded.cases
    if lengths:
        cases = tuple(Case.of(_without_length(case), lengths) for case in cases)
    return cases, loaded.trials, loaded.timeout_s


def _without_length(case: Case) -> dict[str, Any]:
    return {name: value for name, value in case.problem.to_dict().items() if name != "segment_length"}


def parse_problem(text: str) -> dict[str, Any]:
    """The fields of a problem, from a JSON object or from ``name=value,name=value``."""
    if text.lstrip().startswith("{"):
        try:
            fields: dict[str, Any] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--problem is not JSON: {error}") from error
        return fields
    fields = {}
    for part in text.replace(" ", ",").split(","):
        name, equals, value = part.partition("=")
        if not part:
            continue
        if not equals or not value:
            raise UsageError(f"--problem: {part!r} is not of the form name=value")
        fields[name] = int(value) if re.fullmatch("-?[0-9]{1,18}", value) else value
    return fields


def _integers(option: str, text: str, example: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of integers such as {example}") from None
