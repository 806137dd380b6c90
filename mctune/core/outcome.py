"""What became of a candidate: a sum type, matched to the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mctune.core.errors import UsageError


@dataclass(frozen=True)
class FailedBuild:
    """The template could not be rendered or compiled; ``operation`` says which, where that is known."""

    message: str
    operation: str = ""


@dataclass(frozen=True)
class TooLarge:
    """The candidate exceeds the target; ``message`` carries the arithmetic (``need`` and ``limit`` in ``unit``), and
    ``operation`` says which of its operations does, where that is known."""

    message: str
    need: int
    limit: int
    unit: str
    operation: str = ""


@dataclass(frozen=True)
class Crashed:
    """The process that ran the candidate died, or the candidate raised an exception."""

    message: str


@dataclass(frozen=True)
class TimedOut:
    """The candidate did not finish ``stage`` (build, verify or time) within ``seconds``."""

    seconds: float
    stage: str


@dataclass(frozen=True)
class Wrong:
    """The result misses the oracle: ``error`` is RMS(difference) / RMS(reference), ``case`` what it failed on."""

    error: float
    tolerance: float
    case: str


@dataclass(frozen=True)
class Timed:
    """Measured: median and 20th / 80th percentile in milliseconds over ``repeats``; ``error`` against the oracle.

    ``sm_mhz`` and ``celsius`` are a GPU's clock in MHz and its temperature right after, where its driver reports them;
    ``notes`` is what the compiler reports about its kernels. ``parts`` are (operation, median in milliseconds) of each
    operation of the pass, in order; what the whole takes beyond their sum is the host's, or the memory allocator's.

    ``pace`` is what the machine did to this candidate and to another one of the study, the two timed by turns: how many
    times as long they took as in the moment when that one was timed alone. ``ms`` and ``parts`` are as they were
    measured; a search compares them over ``pace``.
    """

    ms: float
    low: float
    high: float
    repeats: int
    error: float
    sm_mhz: float | None = None
    celsius: float | None = None
    notes: tuple[str, ...] = ()
    parts: tuple[tuple[str, float], ...] = ()
    pace: float = 1.0


@dataclass(frozen=True)
class Predicted:
    """Not measured: the time that the cost model ``model`` predicts, in milliseconds.

    ``error`` is against the oracle, ``None`` if it was not verified; ``notes`` is what the compiler reports about its
    kernels, for example that matrix products are serialized. ``parts`` are (operation, milliseconds), in order.
    """

    ms: float
    model: str
    error: float | None = None
    notes: tuple[str, ...] = ()
    parts: tuple[tuple[str, float], ...] = ()


Outcome = FailedBuild | TooLarge | Crashed | TimedOut | Wrong | Timed | Predicted

_KINDS: dict[str, type[Any]] = {
    "failed_build": FailedBuild,
    "too_large": TooLarge,
    "crashed": Crashed,
    "timed_out": TimedOut,
    "wrong": Wrong,
    "timed": Timed,
    "predicted": Predicted,
}
_NAMES = {cls: name for name, cls in _KINDS.items()}


def kind(outcome: Outcome) -> str:
    """The outcome's name in JSON and in tables, for example ``failed_build``."""
    return _NAMES[type(outcome)]


def to_json(outcome: Outcome) -> str:
    """One line of JSON with the field ``kind``.

    Examples:
        >>> to_json(TimedOut(30.0, "build"))
        '{"kind": "timed_out", "seconds": 30.0, "stage": "build"}'
        >>> from_json(_) == TimedOut(30.0, "build")
        True
    """
    return json.dumps({"kind": kind(outcome), **asdict(outcome)}, sort_keys=True)


def from_json(text: str) -> Outcome:
    """The inverse of :func:`to_json`.

    Raises:
        UsageError: for an unknown kind.
    """
    return from_dict(json.loads(text))


def from_dict(values: Mapping[str, Any]) -> Outcome:
    """An outcome from the object that :func:`to_json` writes.

    Raises:
        UsageError: for an unknown kind, or a pace that no machine has.
    """
    name = values.get("kind")
    if name not in _KINDS:
        raise UsageError(f"unknown outcome kind {name!r}; known: {', '.join(_KINDS)}")
    fields = {name: _frozen(value) for name, value in values.items() if name != "kind"}
    outcome: Outcome = _KINDS[name](**fields)
    if isinstance(outcome, Timed) and not 0 < outcome.pace < float("inf"):
        raise UsageError(f"an outcome's pace is a factor above 0, not {outcome.pace!r}")
    return outcome


def _frozen(value: Any) -> Any:
    """A value read from JSON as the dataclasses hold it."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def parts(outcome: Outcome) -> dict[str, float]:
    """What :func:`cost` has of each operation, where that is known."""
    match outcome:
        case Timed(parts=known, pace=pace):
            return {name: ms / pace for name, ms in known}
        case Predicted(parts=known):
            return dict(known)
    return {}


def where(outcome: Outcome) -> str:
    """In words, where the time goes: the share of each operation, and of what is none's; empty where not known.

    Examples:
        >>> where(Timed(4.0, 4.0, 4.0, 7, 0.0, parts=(("segment_states", 1.0), ("read_forward", 2.5))))
        'read_forward 62 %, segment_states 25 %, the rest 12 %'
    """
    return shares_text(shares(outcome))


def shares(outcome: Outcome) -> dict[str, float]:
    """The share of each operation in the time, in order; empty where they are not known."""
    total = cost(outcome)
    return {name: ms / total for name, ms in parts(outcome).items()} if total else {}


def shares_text(found: Mapping[str, float]) -> str:
    """Shares in words, the largest first, and what is none's at the end."""
    if not found:
        return ""
    ordered = sorted(found.items(), key=lambda one: -one[1])
    rest = 1.0 - sum(found.values())
    return ", ".join(
        f"{name} {share:.0%}".replace("%", " %") for name, share in (*ordered, ("the rest", rest)) if share > 0.005
    )


def at_fault(outcome: Outcome) -> str:
    """The operation that is why a candidate cannot win, or nothing where that is not known."""
    return outcome.operation if isinstance(outcome, FailedBuild | TooLarge) else ""


def cost(outcome: Outcome) -> float | None:
    """What a search minimises: the time in milliseconds, ``None`` for every outcome that cannot win.

    Examples:
        >>> cost(Predicted(1.5, "roofline")), cost(Crashed("segmentation fault"))
        (1.5, None)
        >>> cost(Timed(3.0, 2.9, 3.2, 7, 1e-7, pace=1.5))  # on a machine that was busy with something else
        2.0
    """
    match outcome:
        case Timed(ms=ms, pace=pace):
            return ms / pace
        case Predicted(ms=ms):
            return ms
        case FailedBuild() | TooLarge() | Crashed() | TimedOut() | Wrong():
            return None


def describe(outcome: Outcome) -> str:
    """One line for a person.

    Examples:
        >>> describe(Wrong(0.25, 2e-5, "T=37"))
        'wrong: error 2.50e-01 over 2e-05 on T=37'
    """
    match outcome:
        case FailedBuild(message):
            return f"failed to build: {message}"
        case TooLarge(message):
            return f"too large: {message}"
        case Crashed(message):
            return f"crashed: {message}"
        case TimedOut(seconds, stage):
            return f"timed out: {stage} took longer than {seconds:g} s"
        case Wrong(error, tolerance, where):
            return f"wrong: error {error:.2e} over {tolerance:.0e} on {where}"
        case Timed(ms, low, high, notes=notes):
            return "; ".join((f"measured {ms:.3f} ms ({low:.3f} to {high:.3f})", *notes))
        case Predicted(ms, model, notes=notes):
            return "; ".join((f"predicted {ms:.3f} ms ({model})", *notes))
