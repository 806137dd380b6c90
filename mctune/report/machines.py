"""How the machines and versions differ that two results are of."""

from __future__ import annotations

from typing import Any

from mctune.report.markdown import plain_text

_MACHINE = ("name", "title", "kind", "arch", "cores")
"""What of a target makes times incomparable; a clock is read at one moment, and a cache does not say much."""
_AROUND = ("gpu", "machine", "system", "threads")
_RATES = (("matrix_gflops", "torch's matrix product", "GFLOP/s"), ("copy_gbs", "a copy", "GB/s"))


def machine_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What of the machines differs, in words; what only one environment tells is no difference.

    Examples:
        >>> machine_differences({"target": {"arch": "x86-64-v4"}}, {"target": {"arch": "x86-64-v3", "cores": 2}})
        ['arch x86-64-v4 before, x86-64-v3 now']
    """
    pairs = [(name, *_both(old.get("target"), new.get("target"), name)) for name in _MACHINE]
    pairs += [(name, *_both(old, new, name)) for name in _AROUND]
    return [f"{name} {_short(a)} before, {_short(b)} now" for name, a, b in pairs if a != b]


def other_differences(old: dict[str, Any], new: dict[str, Any], threshold: float) -> list[str]:
    """What else differs: versions, and rates of the machine itself by more than the share ``threshold``.

    Examples:
        >>> other_differences({"versions": {"torch": "2.12"}}, {"versions": {"torch": "2.13"}}, 0.05)
        ['torch 2.12 before, 2.13 now']
        >>> other_differences({"copy_gbs": 20.0}, {"copy_gbs": 25.0}, 0.05)
        ['a copy reached 20.0 GB/s before, 25.0 now']
    """
    before, after = old.get("versions"), new.get("versions")
    names = sorted({*before, *after}) if isinstance(before, dict) and isinstance(after, dict) else []
    pairs = [(name, *_both(before, after, name)) for name in names]
    found = [f"{_short(name)} {_short(a)} before, {_short(b)} now" for name, a, b in pairs if a != b]
    for name, what, unit in _RATES:
        a, b = _both(old, new, name)
        if isinstance(a, float) and isinstance(b, float) and max(a, b) > (1 + threshold) * min(a, b) > 0:
            found.append(f"{what} reached {a:.1f} {unit} before, {b:.1f} now")
    return found


def _both(old: Any, new: Any, name: str) -> tuple[Any, Any]:
    """The values of both sides; ``None`` twice where one does not tell."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return None, None
    a, b = old.get(name), new.get(name)
    return (None, None) if a is None or b is None else (a, b)


def _short(value: Any) -> str:
    """A value in one line of text, whoever has written it."""
    return " ".join(plain_text(str(value)).split())[:80]
