"""The package before this one: what it holds goes on being shipped, unless something better is found for a problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mctune.core.config import Config
from mctune.core.outcome import Predicted, Timed, from_dict
from mctune.core.problem import Problem
from mctune.core.winner import Winner
from mctune.emit.package import runtime_files
from mctune.emit.place import read_json
from mctune.runtime import manifest
from mctune.runtime.errors import PackageError
from mctune.runtime.kernels.table import NAME as TABLE


@dataclass(frozen=True)
class Before:
    """What the package at a place holds. ``winners`` can be shipped as their files are. ``stale`` cannot: this mctune
    has another runtime, or the files have changed; built again from their configurations, they can."""

    winners: tuple[Winner, ...] = ()
    stale: tuple[Winner, ...] = ()


def package_before(out: Path, note: Callable[[str], None], table: str = TABLE) -> Before:
    """What the package at ``out`` holds by one of its tables, if there is one; ``note`` is told what cannot be read."""
    found: list[Winner] = []
    entries = read_json(out / table).get("entries", [])
    for number, record in enumerate(entries if isinstance(entries, list) else []):
        try:
            found.append(_winner(out, record))
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            note(f"entry {number} of the package before this one cannot be read, and is left out: {error}")
    try:
        files = manifest.verify(out).files if found else {}
    except PackageError as error:
        note(f"the kernels of the package before this one are built again: {error}")
        return Before(stale=tuple(found))
    theirs = {name.removeprefix("runtime/"): data for name, data in files.items() if name.startswith("runtime/")}
    if theirs != runtime_files():
        return Before(stale=tuple(found))
    return Before(winners=tuple(found))


def _winner(out: Path, record: dict[str, Any]) -> Winner:
    """An entry of a table; its files lie in ``out``."""
    outcome = from_dict(record["outcome"])
    if not isinstance(outcome, Timed | Predicted) or not outcome.ms > 0:
        raise ValueError("it has no time")
    kernels = out / "kernels"
    return Winner(
        problem=Problem.from_dict(record["problem"]),
        config=Config.of(record["config"]),
        outcome=outcome,
        backend=str(record["backend"]),
        device=str(record.get("device", "cpu" if record["backend"] == "tvm" else "cuda")),
        library=kernels / Path(record["kernel"]).name,
        source=kernels / Path(record["source"]).name,
        portable=kernels / Path(record["portable"]).name if record["portable"] else None,
        cpu_flags=tuple(record["cpu_flags"]),
        recommended=bool(record["recommended"]),
        verified=dict(record["verified"]),
        parts=tuple((operation, kernels / Path(file).name) for operation, file in record["parts"].items()),
    )


def merge(
    before: Sequence[Winner], now: Sequence[Winner], recommend: Callable[[Sequence[Winner]], Winner]
) -> list[Winner]:
    """The better of both for each problem and backend, measured before predicted; of one configuration ``now``'s.

    Where segment lengths of one operation come from both, ``recommend`` says which of them is recommended.
    """
    best = {winner.key: winner for winner in before}
    for winner in now:
        known = best.get(winner.key)
        if known is None or known.config == winner.config or _rank(winner) <= _rank(known):
            best[winner.key] = winner
    touched = {_operation(winner) for winner in now}
    merged = list(best.values())
    chosen = {winner.key for winner in _recommended(merged, recommend)}
    return [
        replace(winner, recommended=winner.key in chosen) if _operation(winner) in touched else winner
        for winner in merged
    ]


def _recommended(winners: Sequence[Winner], recommend: Callable[[Sequence[Winner]], Winner]) -> Iterator[Winner]:
    """One of each operation; a predicted time is not compared with a measured one."""
    groups: dict[str, list[Winner]] = {}
    for winner in winners:
        groups.setdefault(_operation(winner), []).append(winner)
    for group in groups.values():
        measured = [winner for winner in group if isinstance(winner.outcome, Timed)]
        yield recommend(measured or group)


def _rank(winner: Winner) -> tuple[bool, float]:
    return not isinstance(winner.outcome, Timed), winner.outcome.ms


def _operation(winner: Winner) -> str:
    """The problem but for its segment length, and the backend."""
    fields = {name: value for name, value in winner.problem.to_dict().items() if name != "segment_length"}
    return repr((winner.backend, sorted(fields.items())))
