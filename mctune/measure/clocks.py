"""The state of a GPU while something was timed on it: clocks, temperature and power, as nvidia-smi reports them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import lru_cache

_FRESH_S = 3.0
"""Asking takes a tenth of a second or more, of a process that has the GPU for itself."""
_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


@dataclass(frozen=True)
class Clocks:
    """Multiprocessor and memory clock in MHz, degrees Celsius, watts; ``None`` for what a GPU does not report."""

    sm_mhz: float | None
    memory_mhz: float | None
    celsius: float | None
    watts: float | None


def read_clocks() -> Clocks | None:
    """The first visible GPU's, as they were at most ``_FRESH_S`` ago; ``None`` where nvidia-smi is absent or fails."""
    return _read(int(time.monotonic() / _FRESH_S))


@lru_cache(maxsize=1)
def _read(moment: int) -> Clocks | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    # nvidia-smi numbers all GPUs, CUDA only those that this process may see; a UUID means the same to both.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = [tool, f"--id={first}", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return Clocks(*(_number(value) for value in done.stdout.strip().split(",")))
    except (OSError, subprocess.SubprocessError, TypeError):
        return None


def _number(text: str) -> float | None:
    """A field's number; drivers print ``[N/A]``, older ones ``[Not Supported]``, where there is none."""
    try:
        return float(text)
    except ValueError:
        return None


def clock_and_heat(device: str) -> tuple[float | None, float | None]:
    """The clock in MHz and the temperature that a :class:`mctune.core.outcome.Timed` has; ``None`` on a CPU."""
    clocks = read_clocks() if device == "cuda" else None
    return (clocks.sm_mhz, clocks.celsius) if clocks else (None, None)
