"""kernel_tuner's cache files, and those of AutoTuningAssociation/benchmark_hub: every configuration that was tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mctune.core.config import Config, Scalar
from mctune.core.errors import UsageError
from mctune.core.known import Known


def known_of_cache(source: str, document: Mapping[str, Any]) -> tuple[Known, ...]:
    """The configurations of a cache file that have a time; it does not say of which of mctune's problems they are.

    Raises:
        UsageError: if it is no cache file, or was tuned for something else than time.
    """
    objective = document.get("objective", "time")
    if objective != "time":
        raise UsageError(f"was tuned for {objective!r:.40}, not time")
    try:
        names = [str(name) for name in document["tune_params_keys"]]
        spelled = {name: {str(value): value for value in document["tune_params"][name]} for name in names}
        found: list[Known] = []
        for key, record in document["cache"].items():
            time = record.get("time")
            if not isinstance(time, int | float) or isinstance(time, bool) or not 0 < time < float("inf"):
                continue  # the name of a failure
            values: dict[str, Scalar] = {}
            for name, part in zip(names, key.split(","), strict=True):
                value = spelled[name][part]
                if isinstance(value, int | str):
                    values[name] = value
            found.append(Known(Config.of(values), float(time), True, source))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"is no cache file: {type(error).__name__} {str(error)[:120]}") from error
    return tuple(found)
