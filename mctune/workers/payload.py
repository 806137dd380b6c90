"""What the payloads of worker processes say, and what every one of those answers in the same way.

It imports little: a process that only compiles has started in half the time of one that verifies.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mctune.backends.protocol import Backend, OperationError
from mctune.core.config import Config
from mctune.core.errors import DeviceError
from mctune.core.outcome import FailedBuild
from mctune.core.problem import Problem
from mctune.core.target import Target
from mctune.workers.worker import Stage

_ALWAYS_COMPILE = os.environ.get("TRITON_ALWAYS_COMPILE", "0")


def folder_for(payload: dict[str, Any], folder: Path) -> Path:
    """Where a request's kernels are built: one that is made ``"again"`` uses nothing of what is kept on disk."""
    again = bool(payload.get("again_from_scratch"))
    os.environ["TRITON_ALWAYS_COMPILE"] = "1" if again else _ALWAYS_COMPILE
    if not again:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"again-{os.getpid()}-", dir=folder))


def try_out(backend: Backend, target: Target, folder: Path, stage: Stage) -> dict[str, Any]:
    """Build, load and run a kernel that anything can: what fails then is not a candidate's fault.

    Raises:
        DeviceError: with the reason.
    """
    stage("try out")
    try:
        backend.try_out(target, folder)
    except DeviceError:
        raise
    except Exception as error:
        raise DeviceError(f"a trial kernel failed: {first_line(error)}") from error
    return {}


def maker_of(payload: dict[str, Any]) -> str | None:
    """What compiles the candidate of a payload, if it says so: a name of :func:`mctune.backends.registry.makers`."""
    about = [payload, *(value for value in payload.values() if isinstance(value, dict)), *payload.get("compare", ())]
    return next((one["maker"] for one in about if "maker" in one), None)


def candidate(values: dict[str, Any]) -> tuple[Problem, Config]:
    return Problem.from_dict(values["problem"]), Config.of(values["config"])


@dataclass(frozen=True)
class Beside:
    """A candidate that is timed beside another: its configuration, and the milliseconds that it took at first."""

    config: Config
    ms: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"config": self.config.to_dict(), "ms": self.ms}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Beside | None:
        """That of a candidate, its ``"beside"``; ``None`` where it has none."""
        found = values.get("beside")
        return None if found is None else cls(Config.of(found["config"]), found["ms"])


def failed_build(error: Exception) -> FailedBuild:
    """The outcome of a candidate that does not compile, with the operation that does not where that is known."""
    if isinstance(error, OperationError) and isinstance(error.__cause__, Exception):
        return FailedBuild(first_line(error.__cause__), error.operation)
    return FailedBuild(first_line(error))


def first_line(error: Exception) -> str:
    """An exception's type and the line that tells most, for an outcome: the last, but of torch's CUDA errors the first.

    Those end in advice; an assembler's end in how to call it again, and say before what is wrong.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    refused = [line for line in lines if re.match(r"ptxas\b.*\b(error|fatal)\b", line)]
    line = refused[0] if refused else lines[0 if "CUDA error" in lines[0] else -1] if lines else ""
    return f"{type(error).__name__}: {line[:300]}".rstrip(": ")
